"""The native CPU kernels against the portable ones, bit-for-bit properties of theirs, and what happens without them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import mindspore as ms
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor, nn

from llama31_core import native_support
from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.inference.native_llama import NativeLlama
from llama31_core.kernels.native import NativeKernelsError, library, load_library, threads
from llama31_core.model import Llama, PagedAttention
from llama31_core.model.layers import Layers

BLOCK_SIZE, NUM_BLOCKS = 4, 24
TYPES = [ms.float32, ms.bfloat16]
Floats = npt.NDArray[np.float32]


needs_native = pytest.mark.usefixtures("native_kernels")


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Sizes that do and do not divide by the width of a vector."""
    n_kv_heads = draw(st.sampled_from([1, 2, 3]))
    return ModelConfig(
        vocab_size=draw(st.integers(5, 70)),
        dim=draw(st.sampled_from([6, 24, 33, 64, 100])),
        n_layers=2,
        n_heads=n_kv_heads * draw(st.sampled_from([1, 2, 4])),
        n_kv_heads=n_kv_heads,
        head_dim=draw(st.sampled_from([2, 8, 18, 64, 72])),
        ffn_dim=draw(st.sampled_from([7, 32, 50, 96])),
        norm_eps=1e-5,
        rope_theta=10000.0,
        max_seq_len=NUM_BLOCKS * BLOCK_SIZE,
        tie_word_embeddings=draw(st.booleans()),
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def _model(config: ModelConfig, dtype: ms.Type, seed: int, cache_dtype: ms.Type = ms.float32) -> Llama:
    rng = np.random.default_rng(seed)
    llama = Llama(config, lambda: PagedAttention(config, NUM_BLOCKS, BLOCK_SIZE, cache_dtype), Layers(dtype))
    for name, parameter in llama.parameters_and_names():
        if not name.endswith("_cache"):
            values = rng.normal(0, 0.3, parameter.shape).astype(np.float32) + float("norm" in name)
            parameter.set_data(Tensor(values).astype(parameter.dtype))
    return llama


class Paged:
    """Calls a model with the tokens of sequences whose blocks lie scattered in the cache."""

    def __init__(self, net: NativeLlama | nn.Cell) -> None:
        if not isinstance(net, NativeLlama):
            ms.set_context(mode=ms.GRAPH_MODE)
            any_shape = Tensor(shape=[None, None], dtype=ms.int32)
            net.set_inputs(any_shape, any_shape, any_shape, any_shape)
        self._net = net
        self._table = np.random.default_rng(3).permutation(NUM_BLOCKS).astype(np.int32).reshape(3, -1)

    def __call__(self, tokens_BT: npt.NDArray[np.int32], start: int, rows: list[int]) -> Floats:
        tables_BM = self._table[rows]
        positions_BT = start + np.arange(tokens_BT.shape[1], dtype=np.int32) + np.zeros_like(tokens_BT)
        slots_BT = np.take_along_axis(tables_BM, positions_BT // BLOCK_SIZE, axis=1) * BLOCK_SIZE
        slots_BT = (slots_BT + positions_BT % BLOCK_SIZE).astype(np.int32)
        arrays = (tokens_BT, positions_BT, slots_BT, tables_BM)
        logits: Floats
        if isinstance(self._net, NativeLlama):
            logits = self._net(*arrays, np.arange(tokens_BT.size, dtype=np.int32))
        else:
            logits = self._net(*(Tensor(array) for array in arrays)).asnumpy()
        return logits.reshape(*tokens_BT.shape, -1)


@needs_native
@settings(max_examples=8, deadline=None)
@given(configs(), st.sampled_from(TYPES), st.sampled_from(TYPES), st.integers(0, 2**16))
def test_logits_equal_the_portable_kernels_and_no_bit_depends_on_batch_or_chunks(
    config: ModelConfig, dtype: ms.Type, cache_dtype: ms.Type, seed: int
) -> None:
    llama = _model(config, dtype, seed, cache_dtype)
    native = Paged(NativeLlama(llama))
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (3, 23)).astype(np.int32)
    whole = native(tokens, 0, [0, 1, 2])

    chunks = [native(tokens[:, start : start + size], start, [2, 0, 1]) for start, size in ((0, 9), (9, 1), (10, 13))]
    assert (np.concatenate(chunks, axis=1) == whole).all()
    alone = native(tokens[1:2], 0, [0])
    assert (alone[0] == whole[1]).all()

    exact = _model(config, ms.float32, seed)
    if dtype == ms.bfloat16:
        for mine, theirs in zip(exact.get_parameters(), llama.get_parameters(), strict=True):
            mine.set_data(theirs.astype(ms.float32))
    expected = Paged(exact)(tokens, 0, [0, 1, 2])
    scale = np.abs(expected).max()
    if dtype == cache_dtype == ms.float32:
        assert np.abs(whole - expected).max() < 2e-5 * scale
    else:  # activations are rounded to 8 bits before each of the 15 products in a row, or keys and values are
        error = np.sqrt(np.square(whole - expected).mean() / np.square(expected).mean())
        assert 0 < error < 0.04


@needs_native
@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16])
def test_rows_that_are_cut_into_parts_and_panels_give_the_same_bits(dtype: ms.Type) -> None:
    """96 rows of 3,300 numbers are more than a cache takes at once, 32 and less are not."""
    config = ModelConfig.preset("tiny").model_copy(update={"dim": 64, "ffn_dim": 3300, "vocab_size": 40})
    llama = _model(config, dtype, 1)
    native = Paged(NativeLlama(llama))
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (3, 32)).astype(np.int32)
    whole = native(tokens, 0, [0, 1, 2])
    chunks = [native(tokens[:, start : start + size], start, [2, 0, 1]) for start, size in ((0, 10), (10, 1), (11, 21))]
    assert (np.concatenate(chunks, axis=1) == whole).all()
    assert (native(tokens[1:2], 0, [0])[0] == whole[1]).all()
    if dtype == ms.float32:
        expected = Paged(_model(config, ms.float32, 1))(tokens, 0, [0, 1, 2])
        assert np.abs(whole - expected).max() < 2e-5 * np.abs(expected).max()


@needs_native
def test_a_token_that_shares_a_slot_with_padding_is_not_turned_twice() -> None:
    config = ModelConfig.preset("tiny")
    native = Paged(NativeLlama(_model(config, ms.float32, 0)))
    tokens = np.array([[5, 6, 7]], np.int32)
    alone = native(tokens, 0, [0])
    assert (native(np.repeat(tokens, 2, axis=0), 0, [0, 0]) == alone).all()


@needs_native
def test_logits_of_the_wanted_tokens_alone() -> None:
    native = NativeLlama(_model(ModelConfig.preset("tiny"), ms.float32, 0))
    tokens = np.array([[5, 6, 7], [8, 9, 10]], np.int32)
    positions, slots = np.array([[0, 1, 2]] * 2, np.int32), np.array([[0, 1, 2], [4, 5, 6]], np.int32)
    tables = np.array([[0], [1]], np.int32)
    every, some = (
        native(tokens, positions, slots, tables, np.array(wanted, np.int32)) for wanted in (range(6), [5, 0])
    )
    assert (some == every[[5, 0]]).all()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LLAMA31_NUM_THREADS": "3", "OMP_NUM_THREADS": "1"}, 3),
        ({"OMP_NUM_THREADS": "5"}, 5),
        ({}, 2),  # four processors, of which two pairs share a core
    ],
)
def test_threads_are_what_the_user_says_or_one_a_core(
    variables: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("LLAMA31_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for cpu in range(4):
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    monkeypatch.setattr(threads, "_TOPOLOGY", tmp_path)
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert threads.num_threads() == expected


def test_a_quota_of_the_control_group_limits_the_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LLAMA31_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "_TOPOLOGY", tmp_path)  # empty: every processor is a core
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")
    for text, expected in (("max 100000", 8), ("350000 100000", 3), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(text)
        assert threads.num_threads() == expected


def test_a_number_of_threads_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA31_NUM_THREADS", "all")
    with pytest.raises(ConfigError, match="LLAMA31_NUM_THREADS is 'all', expected a number"):
        threads.num_threads()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No library loaded, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library._load.cache_clear()
    yield tmp_path
    library._load.cache_clear()


def test_the_switch_turns_them_off(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA31_NATIVE_KERNELS", "0")
    with pytest.raises(NativeKernelsError, match="LLAMA31_NATIVE_KERNELS=0"):
        load_library()


def test_a_cpu_without_the_instructions_is_told(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_support, "_cpu_features", lambda: {"avx", "fma"})
    with pytest.raises(NativeKernelsError, match="need a CPU with avx2 and fma"):
        load_library()


def test_the_best_instructions_of_a_cpu_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = {name for names in native_support.INSTRUCTION_SETS for name in names}
    lacking = [(everything - {name}, "-mavx2") for name in ("avx512_bf16", "avx512vbmi")]
    for features, best in ((everything, "-mavx512bf16"), *lacking):
        monkeypatch.setattr(native_support, "_cpu_features", lambda: features)  # noqa: B023
        options = native_support.instruction_options()
        assert options is not None
        assert best in options


@needs_native
def test_a_compiler_that_fails_or_is_missing_leaves_nothing_in_the_cache(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for compiler, message in (("/bin/false", "could not compile"), ("no-such-compiler", "no-such-compiler")):
        monkeypatch.setenv("CXX", compiler)
        with pytest.raises(NativeKernelsError, match=message):
            load_library()
    assert not list(fresh.rglob("*.so"))


@needs_native
def test_it_is_compiled_once_and_again_for_another_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    run = subprocess.run

    def counted(*args: object, **options: object) -> object:
        runs.append(args)
        return run(*args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", counted)
    first = load_library()
    library._load.cache_clear()
    assert load_library() == first
    assert len(runs) == 1
