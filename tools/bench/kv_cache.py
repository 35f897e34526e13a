"""A cache in bfloat16 beside one in float32: time of decoding and of prompts, and how far the logits differ.

    python tools/bench/kv_cache.py MODEL_DIR [--rounds 5] [--text FILE]

Two engines in one process, native kernels, take turns of eight decode steps, or of a prompt, over the same ids. Figures
are medians in ms and the median of the turns' ratios. Logits are those of every token of FILE (a few hundred of them;
this repository's README otherwise), computed in one go.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llama31_core import Engine, SamplingParams
from llama31_core.inference.batch import ForwardInput
from llama31_core.inference.cache_dtype import KvCacheDtype
from llama31_core.inference.options import EngineOptions
from llama31_tokenizer import Tokenizer

DTYPES: tuple[KvCacheDtype, ...] = ("float32", "bfloat16")
_DECODE = ((1, 64), (1, 1000), (16, 64), (16, 1000))  # sequences, tokens of a prompt
_PROMPTS = (512, 2048)
_TURN = 8  # steps
_VOCABULARY = 40_000  # ids that every model measured here has
_TEXT_TOKENS = 500
_BLOCKS = 1400


def _ids(rng: np.random.Generator, length: int) -> list[int]:
    ids: list[int] = rng.integers(5, _VOCABULARY, length).tolist()
    return ids


def decode(engines: list[Engine], batch: int, length: int, turns: int) -> list[list[float]]:
    """Seconds of a step, of each engine and turn."""
    rng = np.random.default_rng(length + batch)
    prompts = [_ids(rng, length) for _ in range(batch)]
    params = SamplingParams(max_tokens=_TURN * (turns + 2), temperature=0, ignore_eos=True)
    for engine in engines:
        waiting = {str(index) for index in range(batch)}
        for index, prompt in enumerate(prompts):
            engine.add(str(index), prompt, params)
        while waiting:
            waiting -= {output.request_id for output in engine.step()}
    seconds: list[list[float]] = [[] for _ in engines]
    for _ in range(turns):
        for engine, own in zip(engines, seconds, strict=True):
            steps = []
            for _ in range(_TURN):
                start = time.perf_counter()
                engine.step()
                steps.append(time.perf_counter() - start)
            own.append(statistics.median(steps))
    for engine in engines:
        for index in range(batch):
            engine.abort(str(index))
    return seconds


def prefill(engines: list[Engine], length: int, turns: int) -> list[list[float]]:
    """Seconds of a prompt, of each engine and turn."""
    rng = np.random.default_rng(length)
    seconds: list[list[float]] = [[] for _ in engines]
    for _ in range(turns + 1):
        ids = _ids(rng, length)
        for engine, own in zip(engines, seconds, strict=True):
            start = time.perf_counter()
            engine.generate([ids], SamplingParams(max_tokens=1, temperature=0))
            own.append(time.perf_counter() - start)
    return [own[1:] for own in seconds]  # the first round does not count


def text_logits(engine: Engine, ids: list[int]) -> npt.NDArray[np.float32]:
    """Logits of every token of a text, (T, V)."""
    blocks = list(range(-(-len(ids) // engine.options.block_size)))
    return engine._runner.forward(ForwardInput([ids], [0], [blocks], [len(ids)]))


def main() -> None:
    """Print a table and a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[2] / "README.md")
    args = parser.parse_args()
    sizes = {"num_blocks": _BLOCKS, "max_prefill_batch_size": 16}
    engines = [Engine.from_pretrained(args.model_dir, EngineOptions(kv_cache_dtype=d, **sizes)) for d in DTYPES]
    ids = Tokenizer.from_pretrained(args.model_dir).encode(args.text.read_text("utf-8"))[:_TEXT_TOKENS]
    wide, narrow = (text_logits(engine, ids) for engine in engines)
    same = float((wide.argmax(-1) == narrow.argmax(-1)).mean())
    rms = float(np.sqrt(np.square(wide - narrow).mean() / np.square(wide).mean()))
    largest = np.abs(wide - narrow).max()
    print(f"{len(ids)} tokens: largest difference {largest:.3f} of logits up to {np.abs(wide).max():.1f}, ", end="")
    print(f"RMS {rms:.5f} of theirs, the same likeliest token {same:.3f}")
    print(f"\n| | {' | '.join(f'{d}, ms' for d in DTYPES)} | bfloat16 to float32 |\n|---|---|---|---|")
    work = {f"prompt of {n}": prefill(engines, n, args.rounds) for n in _PROMPTS}
    work |= {f"decode {b}, context {n}": decode(engines, b, n, 4 * args.rounds) for b, n in _DECODE}
    for name, (before, after) in work.items():
        ratio = statistics.median(b / a for a, b in zip(before, after, strict=True))
        medians = (f"{statistics.median(own) * 1e3:.2f}" for own in (before, after))
        print(f"| {name} | {' | '.join(medians)} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
