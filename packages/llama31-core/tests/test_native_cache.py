"""The native kernels' cache in bfloat16: what is written is the nearest, what is read is what was written."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore as ms
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from mindspore import Tensor

from llama31_core.config import ModelConfig
from llama31_core.inference.batch import ForwardInput
from llama31_core.inference.runner import GraphRunner
from llama31_core.inference.values import caches
from llama31_core.kernels import native
from llama31_core.model import Llama, PagedAttention
from llama31_core.native_support import INSTRUCTION_SETS, _cpu_features, find_compiler

BLOCK_SIZE, NUM_BLOCKS = 4, 24
Floats = npt.NDArray[np.float32]
Weights = dict[str, Floats]
Build = Callable[..., GraphRunner]


class _OverAGivenCache(PagedAttention):
    """Attention that leaves the cache as it is."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._write = _write_nothing


def _write_nothing(k_cache: Tensor, v_cache: Tensor, slots_BT: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
    return slots_BT


def _config(head_dim: int) -> ModelConfig:
    sizes = {"dim": 48, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "ffn_dim": 64, "max_seq_len": 96}
    return ModelConfig.build("test", vocab_size=61, head_dim=head_dim, **sizes)


def _batch() -> ForwardInput:
    """Three sequences whose blocks lie scattered, logits of every token."""
    rng = np.random.default_rng(0)
    tables = rng.permutation(NUM_BLOCKS)[:18].reshape(3, -1).tolist()
    return ForwardInput(rng.integers(0, 61, (3, 23)).tolist(), [0] * 3, tables, [23] * 3)


def _written(runner: GraphRunner) -> list[Floats]:
    """The caches as float32."""
    return [cache.astype(ms.float32).asnumpy() for cache in caches(runner.llama)]


@pytest.mark.parametrize("head_dim", [2, 18, 64, 72])
def test_attention_is_the_portable_kernels_over_the_same_keys_and_values(
    head_dim: int, random_weights: Callable[..., Weights], build_runner: Build
) -> None:
    """Widths that do and do not divide by that of a vector; the tolerance is that of a cache in float32."""
    config = _config(head_dim)
    weights = random_weights(config)
    runner = build_runner(config, weights, NUM_BLOCKS, BLOCK_SIZE, native=True, cache_dtype=ms.bfloat16)
    logits = runner.forward(_batch())
    llama = Llama(config, lambda: _OverAGivenCache(config, NUM_BLOCKS, BLOCK_SIZE))
    for name, parameter in llama.parameters_and_names():
        if not name.endswith("_cache"):
            parameter.set_data(Tensor(weights[name]))
    for cache, values in zip(caches(llama), _written(runner), strict=True):
        cache.set_data(Tensor(values))
    expected = GraphRunner(llama, NUM_BLOCKS, BLOCK_SIZE).forward(_batch())
    assert np.abs(logits - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("head_dim", [18, 64])
def test_keys_and_values_are_the_nearest_and_cost_little(
    head_dim: int, random_weights: Callable[..., Weights], build_runner: Build
) -> None:
    config = _config(head_dim)
    weights = random_weights(config)
    exact = build_runner(config, weights, NUM_BLOCKS, BLOCK_SIZE, native=True)
    narrow = build_runner(config, weights, NUM_BLOCKS, BLOCK_SIZE, native=True, cache_dtype=ms.bfloat16)
    expected, logits = exact.forward(_batch()), narrow.forward(_batch())
    # The first layer's have seen no rounding yet: the nearest of 8 bits is within half of the last one's worth.
    for wide, rounded in zip(_written(exact)[:2], _written(narrow)[:2], strict=True):
        np.testing.assert_array_equal(rounded, wide.astype(ml_dtypes.bfloat16).astype(np.float32))
        assert np.abs(wide).max() > 1
    error = np.sqrt(np.square(logits - expected).mean() / np.square(expected).mean())
    assert 0 < error < 0.01


_ROUNDING = """
#include <cstdio>
#include "numbers.h"
using namespace llama31;

// Floats from standard input; each rounded, and widened again both ways, out of an array of its length.
int main() {
  float all[64], back[64];
  Bf16 small[65];
  const int64_t count = static_cast<int64_t>(fread(all, sizeof(float), 64, stdin));
  small[count].bits = 0x1234;
  Convert(all, small, count);
  if (small[count].bits != 0x1234) return 1;
  Widen(small, back, count);
  for (int64_t i = 0; i < count; i += kLanes) {
    float lanes[kLanes];
    Store(lanes, LoadWide(small + i, count - i));
    for (int64_t j = 0; j < kLanes; ++j) {
      const float wanted = i + j < count ? back[i + j] : 0.0f;
      if (std::memcmp(lanes + j, &wanted, sizeof(float)) != 0) return 2;
    }
    if (count - i < kLanes) continue;
    float whole[kLanes];
    Store(whole, LoadWide(small + i));
    if (std::memcmp(whole, back + i, sizeof(whole)) != 0) return 3;
  }
  fwrite(small, sizeof(Bf16), count, stdout);
}
"""


@pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("options", INSTRUCTION_SETS, ids=["avx512", "avx2"])
def test_rounding_is_to_nearest_and_of_two_to_the_even_one(options: dict[str, str], tmp_path: Path) -> None:
    """As ml_dtypes rounds: ties, overflow, infinities, what is no number; any count, and nothing behind it."""
    if not _cpu_features().issuperset(options):
        pytest.skip("this CPU has not these instructions")
    source, program = tmp_path / "rounding.cc", tmp_path / "rounding"
    source.write_text(_ROUNDING)
    headers = str(Path(native.__file__).parent)
    command = [find_compiler() or "", "-std=c++17", "-O2", *options.values(), "-I", headers, "-o", str(program)]
    subprocess.run([*command, str(source)], check=True, timeout=60)
    ties = [1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, -1 - 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 255.5, 256.5]
    odd = [0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 3.39e38, 1.2e-38]
    random = np.random.default_rng(0).normal(size=64 - len(ties) - len(odd))
    values = np.concatenate([ties, odd, random]).astype(np.float32)
    values[len(ties) + 4] = np.array(0x7FFFFFFF, np.uint32).view(np.float32)  # its bits overflow when they are added to
    for count in (1, 7, 8, 15, 16, 17, 31, 64):
        given = values[:count]
        run = subprocess.run([str(program)], input=given.tobytes(), check=True, capture_output=True, timeout=60)
        got, want = np.frombuffer(run.stdout, ml_dtypes.bfloat16), given.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))
        assert (np.signbit(got) == np.signbit(want))[~np.isnan(want)].all()
