"""Opening checkpoints: naming told by content, fused tensors, shards with an index, and the check against a config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llama31_core.checkpoint import check_weights, open_weights, parameter_shapes, save_weights, spell
from llama31_core.checkpoint.dtypes import Array
from llama31_core.config import ModelConfig
from llama31_core.errors import CheckpointError

CONFIG = ModelConfig.preset("tiny")
LAYER = "model.layers.1."


@pytest.fixture
def tensors() -> dict[str, Array]:
    rng = np.random.default_rng(3)
    shapes = parameter_shapes(CONFIG)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _assert_reads(path: Path, expected: dict[str, Array]) -> None:
    with open_weights(path) as reader:
        check_weights(reader, CONFIG)
        for name, array in expected.items():
            np.testing.assert_array_equal(reader.read(name), array)


def test_hf_names_read_as_canonical_ones(tensors: dict[str, Array], tmp_path: Path) -> None:
    save_weights(tmp_path, ((spell(name, "hf"), array) for name, array in tensors.items()))
    _assert_reads(tmp_path, tensors)


@pytest.mark.parametrize("index", [(), (slice(1, 40),), (slice(0, 0),)])
def test_what_is_read_begins_at_a_cache_line(
    index: tuple[slice, ...], tensors: dict[str, Array], tmp_path: Path
) -> None:
    save_weights(tmp_path, tensors.items())
    with open_weights(tmp_path) as reader:
        read = [reader.read_slice(name, index) for name in tensors for _ in range(3)]
    assert [array.ctypes.data % 64 for array in read if array.size] == [0] * sum(array.size > 0 for array in read)
    for number, array in enumerate(read):
        np.testing.assert_array_equal(array, list(tensors.values())[number // 3][index])


def test_fused_tensors_read_as_their_parts(tensors: dict[str, Array], tmp_path: Path) -> None:
    fused = dict(tensors)
    for n in range(CONFIG.n_layers):
        layer = f"model.layers.{n}."
        qkv = [fused.pop(f"{layer}attention.{w}.weight") for w in ("wq", "wk", "wv")]
        gate = [fused.pop(f"{layer}feed_forward.{w}.weight") for w in ("w1", "w3")]
        fused[f"{layer}attention.w_qkv.weight"] = np.concatenate(qkv)
        fused[f"{layer}feed_forward.w_gate_hidden.weight"] = np.concatenate(gate)
    save_weights(tmp_path / "m.ckpt", fused.items())
    _assert_reads(tmp_path, tensors)
    with open_weights(tmp_path) as reader:
        name = f"{LAYER}attention.wk.weight"
        assert reader.stored_name(name) == f"{LAYER}attention.w_qkv.weight"
        np.testing.assert_array_equal(reader.read_slice(name, (slice(3, 9), slice(8, 16))), tensors[name][3:9, 8:16])
        assert reader.bytes_read == 6 * 8 * 4


def test_a_fused_tensor_without_wo_cannot_be_split(tmp_path: Path) -> None:
    save_weights(tmp_path / "m.ckpt", [(f"{LAYER}attention.w_qkv.weight", np.ones((96, 64), np.float32))])
    with pytest.raises(CheckpointError, match="cannot be split in 3"):
        open_weights(tmp_path)


def test_optimiser_state_and_rotary_caches_are_left_out(tensors: dict[str, Array], tmp_path: Path) -> None:
    extra = {f"adam_m.{LAYER}attention.wq.weight": np.ones(3, np.float32), "global_step": np.array([7], np.int32)}
    save_weights(tmp_path / "m.ckpt", {**tensors, **extra}.items())
    _assert_reads(tmp_path, tensors)
    with open_weights(tmp_path) as reader:
        assert set(reader.ignored) == set(extra)


def test_two_names_of_one_tensor_are_an_error(tensors: dict[str, Array], tmp_path: Path) -> None:
    tensors["model.norm.weight"] = tensors["model.norm_out.weight"]
    save_weights(tmp_path, tensors.items())
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' and 'model.norm_out.weight' are both"):
        open_weights(tmp_path)


def _shard(directory: Path, tensors: dict[str, Array]) -> dict[str, Array]:
    directory.mkdir(exist_ok=True)
    save_weights(directory, tensors.items(), max_shard_bytes=100_000)
    return tensors


def test_shards_read_as_one(tensors: dict[str, Array], tmp_path: Path) -> None:
    _shard(tmp_path, tensors)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    _assert_reads(tmp_path, tensors)
    _assert_reads(tmp_path / "model.safetensors.index.json", tensors)


def _edit_index(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = directory / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update({"lm_head.weight": "absent.safetensors"}), "names absent.safetensors, which is not there"),
        (lambda m: m.update({"lm_head.weight": "../model.safetensors"}), "expected a plain file name"),
        (lambda m: m.update({"lm_head.weight": "/etc/passwd"}), "expected a plain file name"),
        (lambda m: m.update({"lm_head.weight": ".."}), "expected a plain file name"),
        (lambda m: m.update({"lm_head.weight": 3}), "expected a plain file name"),
        (lambda m: m.update({"other": m["lm_head.weight"]}), "1 tensors that its shards do not hold: other"),
        (lambda m: m.pop("model.norm_out.weight"), "says 'model.norm_out.weight' is in None"),
        (lambda m: m.clear(), "has no weight_map"),
    ],
)
def test_an_index_that_lies_is_an_error(
    change: Callable[[dict[str, str]], object], message: str, tensors: dict[str, Array], tmp_path: Path
) -> None:
    _shard(tmp_path, tensors)
    _edit_index(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        open_weights(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": []}', "[" * 100_000])
def test_an_index_that_is_none_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"GGUF\3\0\0\0", "a GGUF file; convert it"),
        ("a.bin", b"PK\3\4....", "a PyTorch file; convert it"),
        ("a.bin", b"what is this", "neither safetensors nor"),
        ("a.bin", b"", "is empty"),
    ],
)
def test_other_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_weights(tmp_path / name)


def test_a_place_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_weights(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        open_weights(tmp_path)
    for name in ("a.ckpt", "b.ckpt"):
        save_weights(tmp_path / name, [("x", np.ones(1, np.float32))])
    with pytest.raises(CheckpointError, match=r"holds 2 \*.ckpt files"):
        open_weights(tmp_path)


def test_differences_from_the_config_are_listed_up_to_ten(tensors: dict[str, Array], tmp_path: Path) -> None:
    tensors["model.norm_out.weight"] = np.ones(65, np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(64, np.float32)
    for name in [name for name in tensors if name.startswith(LAYER) or "feed_forward" in name]:
        del tensors[name]
    save_weights(tmp_path, tensors.items())
    with open_weights(tmp_path) as reader, pytest.raises(CheckpointError) as error:
        check_weights(reader, CONFIG)
    message = str(error.value)
    assert "12 missing (model.layers.0.feed_forward.w1.weight (160, 64); " in message
    assert "and 2 more)" in message
    assert "1 unexpected (model.layers.0.self_attn.q_proj.bias (64,))" in message
    assert "1 misshapen (model.norm_out.weight is (65,), expected (64,))" in message


def test_integers_are_no_weights(tensors: dict[str, Array], tmp_path: Path) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
    save_weights(tmp_path, tensors.items())
    with open_weights(tmp_path) as reader, pytest.raises(CheckpointError, match=r"lm_head.weight is int8"):
        check_weights(reader, CONFIG)
