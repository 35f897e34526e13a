"""GGUF in: weights, architecture and scaling of files made with the gguf library, and files that lie."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama31_ckpt.cli import main
from llama31_ckpt.gguf_format.architecture import _frequency_divisors
from llama31_ckpt.gguf_format.header import read_header
from llama31_ckpt.gguf_format.weights import GgufWeights
from llama31_ckpt.rotary import to_half_split, to_interleaved
from llama31_ckpt.sources import open_source
from llama31_core.checkpoint import rotary_heads
from llama31_core.checkpoint.dtypes import Array
from llama31_core.checkpoint.stored import OpenFile
from llama31_core.config import ModelConfig, RopeScaling
from llama31_core.errors import CheckpointError, Llama31Error

GgufBuilder = Callable[..., Path]
Tensors = dict[str, Array]


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16])
def test_plain_types_come_back_in_their_own_dtype(
    kind: GGMLQuantizationType, build_gguf: GgufBuilder, tensors: Tensors
) -> None:
    source = open_source(build_gguf(kind))
    dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[kind.name]
    for name, array in tensors.items():
        assert source.weights.dtype(name) == (dtype if array.ndim == 2 else "float32")
        got = source.weights.read_slice(name, ())
        np.testing.assert_array_equal(got, array.astype(got.dtype))


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q5_0])
def test_quantised_types_are_the_gguf_library_s_values(
    kind: GGMLQuantizationType, build_gguf: GgufBuilder, tensors: Tensors, config: ModelConfig
) -> None:
    source = open_source(build_gguf(kind))
    for name, array in tensors.items():
        stored = array if rotary_heads(name) is None else to_interleaved(array, config.head_dim)
        expected = array
        if array.ndim == 2:
            expected = dequantize(quantize(np.ascontiguousarray(stored), kind), kind)
            expected = expected if rotary_heads(name) is None else to_half_split(expected, config.head_dim)
        np.testing.assert_array_equal(source.weights.read_slice(name, ()), expected)
        assert np.abs(expected - array).max() < 0.5


@given(start=st.integers(0, 64), stop=st.integers(0, 64), left=st.integers(0, 64), right=st.integers(0, 64))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parts_of_rotary_tensors_are_parts_of_the_whole(
    start: int, stop: int, left: int, right: int, build_gguf: GgufBuilder, tensors: Tensors
) -> None:
    weights = open_source(build_gguf()).weights
    index = (slice(start, stop), slice(left, right))
    for name in ("model.layers.0.attention.wq.weight", "model.layers.1.attention.wk.weight", "lm_head.weight"):
        np.testing.assert_array_equal(weights.read_slice(name, index), tensors[name][index])


def test_row_orders_are_each_other_s_inverse() -> None:
    rows = np.arange(2 * 6 * 3).reshape(12, 3)
    assert to_half_split(rows, 6)[:6, 0].tolist() == [0, 6, 12, 3, 9, 15]
    np.testing.assert_array_equal(to_interleaved(to_half_split(rows, 6), 6), rows)


def test_the_architecture_is_read(build_gguf: GgufBuilder, config: ModelConfig) -> None:
    factors = _frequency_divisors(RopeScaling(), config.head_dim, config.rope_theta).astype(np.float32)
    assert factors[0] == 1.0
    assert factors[-1] == 8.0
    metadata = {
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.ggml.eom_token_id": 2,
    }
    source = open_source(build_gguf(metadata=metadata, extra={"rope_freqs.weight": factors}))
    expected = config.model_copy(update={"rope_scaling": RopeScaling(), "bos_token_id": 1, "eos_token_ids": (2, 3)})
    assert source.config == expected
    assert source.ignored == ("rope_freqs.weight",)
    assert "no vocabulary" in source.notes[0]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "kind 'bert', split None"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "other"}, "kind 'gpt2', split 'other'"),
    ],
)
def test_an_unknown_vocabulary_is_a_note_and_not_a_guess(
    metadata: dict[str, Any], message: str, build_gguf: GgufBuilder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = build_gguf(metadata=metadata)
    assert main(["convert", "--input_path", str(path), "--output_path", str(tmp_path / "model")]) == 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model" / "tokenizer.json").exists()


VOCABULARY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 3,
}


def test_a_vocabulary_is_written(build_gguf: GgufBuilder) -> None:
    files = open_source(build_gguf(metadata=VOCABULARY)).build_files()
    tokenizer = json.loads(files["tokenizer.json"])
    assert tokenizer["model"]["vocab"] == {"a": 0, "b": 1, "ab": 2}
    assert [(token["id"], token["content"], token["special"]) for token in tokenizer["added_tokens"]] == [
        (3, "<s>", True)
    ]
    assert json.loads(files["tokenizer_config.json"])["bos_token"] == "<s>"


SENTENCEPIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "\u2581ab"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -3.0, -4.0, -5.0, -1.0, -2.0],
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def test_a_sentencepiece_vocabulary_is_written(build_gguf: GgufBuilder) -> None:
    import sentencepiece

    files = open_source(build_gguf(metadata=SENTENCEPIECE)).build_files()
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "</s>"
    library = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
    assert library.encode("ab a") == [7, 3, 4]
    assert (library.bos_id(), library.eos_id(), library.unk_id()) == (1, 2, 0)


@pytest.mark.parametrize(
    ("vocabulary", "change", "message"),
    [
        (VOCABULARY, {"tokenizer.ggml.tokens": ["a", "a", "ab", "<s>"]}, "must list each token once"),
        (VOCABULARY, {"tokenizer.ggml.token_type": [1]}, "must list each token once"),
        (VOCABULARY, {"tokenizer.ggml.merges": ["a c"]}, "merge 'a c' names tokens"),
        (VOCABULARY, {"tokenizer.ggml.merges": [1, 2]}, "must be a list of texts"),
        (VOCABULARY, {"tokenizer.ggml.bos_token_id": 4}, "bos_token_id is 4, the vocabulary has 4 tokens"),
        (SENTENCEPIECE, {"tokenizer.ggml.scores": [0.0]}, "tokenizer.ggml.scores has 1 entries, expected 8"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(
    vocabulary: dict[str, Any],
    change: dict[str, Any],
    message: str,
    build_gguf: GgufBuilder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = build_gguf(metadata={**vocabulary, **change})
    assert main(["convert", "--input_path", str(path), "--output_path", str(tmp_path / "model")]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


_DEQUANTISED = [kind for kind in GGMLQuantizationType if kind in gguf.quants._type_traits]


@pytest.mark.parametrize("kind", _DEQUANTISED, ids=lambda kind: kind.name)
def test_every_type_the_library_dequantises(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(kind.value).integers(0, 60, (6, 512 // block * block_bytes), np.uint8)
    file = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    file.add_tensor("output.weight", data, raw_dtype=kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    opened = OpenFile(tmp_path / "a.gguf")
    weights = GgufWeights(opened, read_header(opened), head_dim=16)
    got = weights.read_slice("lm_head.weight", (slice(1, 5), slice(100, 300)))
    np.testing.assert_array_equal(got, dequantize(data, kind)[1:5, 100:300].astype(got.dtype))


def test_a_type_the_library_cannot_dequantise_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(_tensor_table((b"output.weight", [64], GGMLQuantizationType.Q8_1.value, 0)))
    file = OpenFile(tmp_path / "bad.gguf")
    weights = GgufWeights(file, read_header(file), head_dim=16)
    with pytest.raises(CheckpointError, match="quantised as Q8_1"):
        weights.read_slice("lm_head.weight", ())


@pytest.mark.parametrize(
    ("metadata", "extra", "message"),
    [
        ({"llama.expert_count": 8}, {}, "mixture of experts"),
        ({"llama.block_count": None}, {}, r"llama\.block_count is None, expected int"),
        ({"llama.block_count": "two"}, {}, r"llama\.block_count is 'two', expected int"),
        ({"llama.attention.head_count_kv": [2, 4]}, {}, "one number for all layers"),
        ({"llama.attention.head_count_kv": 3}, {}, "n_heads=4 is not a multiple of n_kv_heads=3"),
        ({"llama.attention.head_count": 0}, {}, "n_heads"),
        ({"llama.rope.dimension_count": 8}, {}, "dimension_count is 8, this model turns all 16"),
        ({"llama.rope.scaling.type": "yarn"}, {}, "'yarn'"),
        ({}, {"rope_freqs.weight": np.array([1, 2, 3, 4, 5, 6, 7, 9], np.float32)}, "no scaling of Llama 3.1's form"),
        ({}, {"rope_freqs.weight": np.ones(7, np.float32)}, r"rope_freqs.weight is F32 \(7,\)"),
    ],
)
def test_what_is_no_llama_is_refused(
    metadata: dict[str, Any], extra: Tensors, message: str, build_gguf: GgufBuilder
) -> None:
    with pytest.raises(Llama31Error, match=message):
        open_source(build_gguf(metadata=metadata, extra=extra))


def test_every_truncation_is_an_error(build_gguf: GgufBuilder, tmp_path: Path) -> None:
    content = build_gguf().read_bytes()
    for size in (*range(0, 400, 7), len(content) // 2, len(content) - 40):
        (tmp_path / "part.gguf").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"part\.gguf"):
            open_source(tmp_path / "part.gguf")


def _header(*parts: tuple[str, Any]) -> bytes:
    return b"GGUF" + b"".join(struct.pack("<" + kind, value) for kind, value in parts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_header(("I", 1), ("Q", 0), ("Q", 0)), "version 1, allowed are 2 and 3"),
        (_header(("I", 3), ("Q", 2**60), ("Q", 0)), "1152921504606846976 tensors are announced, 8 bytes are left"),
        (_header(("I", 3), ("Q", 0), ("Q", 2**60)), "metadata entries are announced, 0 bytes are left"),
        (_header(("I", 3), ("Q", 0), ("Q", 1), ("Q", 2**62), ("Q", 0), ("Q", 0)), "bytes of text are announced"),
        (
            _header(("I", 3), ("Q", 0), ("Q", 1), ("Q", 1), ("s", b"k"), ("I", 9), ("I", 8), ("Q", 2**60)),
            "texts are announced",
        ),
        (
            _header(("I", 3), ("Q", 0), ("Q", 1), ("Q", 1), ("s", b"k"), ("I", 9), ("I", 6), ("Q", 2**60)),
            "values are announced",
        ),
        (_header(("I", 3), ("Q", 0), ("Q", 1), ("Q", 1), ("s", b"k"), ("I", 99), ("Q", 0)), "unknown type 99"),
    ],
)
def test_counts_that_lie_are_errors(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path / "bad.gguf")


def _tensor_table(*tensors: tuple[bytes, list[int], int, int]) -> bytes:
    parts: list[tuple[str, Any]] = [("I", 3), ("Q", len(tensors)), ("Q", 0)]
    for name, dims, kind, offset in tensors:
        parts += [("Q", len(name)), (f"{len(name)}s", name), ("I", len(dims)), *(("Q", dim) for dim in dims)]
        parts += [("I", kind), ("Q", offset)]
    return _header(*parts) + bytes(256)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([(b"a", [4], 0, 0), (b"a", [4], 0, 32)], "'a' is there twice"),
        ([(b"a", [16], 0, 0), (b"b", [16], 0, 32)], "'a' and 'b' overlap"),
        ([(b"a", [4], 0, 2**63)], "it is truncated or its header lies"),
        ([(b"a", [2**39, 2**39], 0, 0)], "it is truncated or its header lies"),
        ([(b"a", [2**50], 0, 0)], "has dimensions"),
        ([(b"a", [0], 0, 0)], "has dimensions"),
        ([(b"a", [], 0, 0)], "has 0 dimensions"),
        ([(b"a", [1] * 5, 0, 0)], "has 5 dimensions"),
        ([(b"a", [4], 250, 0)], "unknown ggml type 250"),
        ([(b"a", [4], 8, 0)], "needs blocks of 32"),
    ],
)
def test_tensor_tables_that_lie_are_errors(
    tensors: list[tuple[bytes, list[int], int, int]], message: str, tmp_path: Path
) -> None:
    (tmp_path / "bad.gguf").write_bytes(_tensor_table(*tensors))
    with pytest.raises(CheckpointError, match=message):
        read_header(OpenFile(tmp_path / "bad.gguf"))


@given(
    damage=st.lists(st.tuples(st.integers(0, 1500), st.binary(max_size=9), st.integers(0, 12)), min_size=1, max_size=4)
)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_raises_our_error_or_nothing(
    damage: list[tuple[int, bytes, int]], build_gguf: GgufBuilder, tmp_path: Path
) -> None:
    valid = tmp_path / "tiny.gguf"
    content = (valid if valid.exists() else build_gguf()).read_bytes()
    for start, patch, removed in damage:
        content = content[:start] + patch + content[start + removed :]
    (tmp_path / "bad.gguf").write_bytes(content)
    try:
        weights = open_source(tmp_path / "bad.gguf").weights
        for name in weights.names():
            assert weights.read_slice(name, ()).shape == weights.shape(name)
    except Llama31Error:
        pass
