"""What fewer bits cost: the perplexity of a text under a model in float32, 8 and 4 bits, side by side.

    python tools/bench/quantization.py MODEL_DIR --calibration TEXT --text TEXT [--group 128] [--pieces 40]

MODEL_DIR is of float32 or bfloat16. The quantised ones are made of it by `llama31-ckpt quantize`, to nearest and for
the inputs of the calibration text, of which the measured text should be no part. Every model sees the same pieces of
512 tokens; perplexity is e to the mean loss over all but the first of each.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from llama31_ckpt.calibration import read_tokens
from llama31_ckpt.quantize import quantize_checkpoint
from llama31_ckpt.sources import open_source
from llama31_core import Engine, SamplingParams
from llama31_core.config import Quantization
from llama31_core.inference.options import EngineOptions

_LENGTH = 512


def perplexity(model_dir: Path, pieces: list[list[int]]) -> float:
    """Of the pieces' tokens but the first of each."""
    engine = Engine.from_pretrained(model_dir, options=EngineOptions(num_blocks=256, max_batch_size=4))
    results = engine.generate(pieces, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))
    losses = [
        -token.logprob for result in results for token in result.prompt_logprobs or () if token is not None
    ]  # fmt: skip
    assert len(losses) == sum(len(piece) - 1 for piece in pieces)
    return math.exp(math.fsum(losses) / len(losses))


def models(model_dir: Path, calibration: Path, group: int, scratch: Path) -> Iterator[tuple[str, Path]]:
    """Names and directories, made one after the other."""
    yield "as it is", model_dir
    with closing(open_source(model_dir)) as source:
        tokens = read_tokens(calibration, model_dir, 16, _LENGTH)
        for bits in (8, 4):
            for name, inputs in (("to nearest", None), ("for inputs", tokens)):
                path = scratch / f"{bits}-{name.split()[-1]}"
                quantize_checkpoint(source, path, Quantization(bits=bits, group_size=group), tokens=inputs)
                yield f"{bits} bits, {name}", path


def main() -> None:
    """Print a row a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--pieces", type=int, default=40)
    args = parser.parse_args()
    pieces = read_tokens(args.text, args.model_dir, args.pieces, _LENGTH).tolist()
    print(f"{len(pieces)} pieces of {_LENGTH} tokens\n\n| model | MB | perplexity | to the first |\n|---|---|---|---|")
    first = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for name, path in models(args.model_dir, args.calibration, args.group, Path(scratch)):
            found = perplexity(path, pieces)
            first = first or found
            size = sum(file.stat().st_size for file in path.glob("*.safetensors")) / 1e6
            print(f"| {name} | {size:.0f} | {found:.3f} | {100 * (found / first - 1):+.2f}% |", flush=True)


if __name__ == "__main__":
    main()
