"""What fewer bits cost: the perplexity of a text under a model in float32, 8 and 4 bits, side by side.

    python tools/bench/quantization.py MODEL_DIR [--groups 128 64] [--pieces 80] [--sequences 64]

MODEL_DIR is of float32. The quantised ones are made of it by what `llama31-ckpt quantize` runs, to nearest and for the
inputs of a calibration text. Both texts are English prose (tokenizer_corpora.py): every second document is for
calibration, the others are measured, and a paragraph is in one document only. `--calibration FILE` and `--text FILE`
name others. Every model sees the same pieces of 512 tokens. Perplexity is e to the mean loss over all but the first of
each; the error of its ratio to the first is that of the mean difference in loss over pieces.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.tokenizer_corpora import load_prose

from llama31_ckpt.calibration import read_tokens
from llama31_ckpt.quantize import quantize_checkpoint
from llama31_ckpt.sources import open_source
from llama31_core import Engine, SamplingParams
from llama31_core.config import Quantization
from llama31_core.inference.options import EngineOptions

_LENGTH = 512
_BITS: tuple[Literal[8, 4], ...] = (8, 4)

Floats = npt.NDArray[np.float64]


def split_prose() -> tuple[str, str]:
    """Text for calibration, and text to measure that has no paragraph of it."""
    seen: set[str] = set()
    documents = []
    for document in load_prose():
        kept = []
        for paragraph in document.split("\n\n"):
            key = "".join(paragraph.split())
            if key not in seen and not key.startswith("Metadata-Version:"):
                seen.add(key)
                kept.append(paragraph)
        documents.append("\n\n".join(kept))
    return "\n\n".join(documents[0::2]), "\n\n".join(documents[1::2])


def losses(model_dir: Path, pieces: list[list[int]]) -> Floats:
    """Mean loss of each piece's tokens but the first."""
    engine = Engine.from_pretrained(model_dir, options=EngineOptions(num_blocks=256, max_batch_size=4))
    results = engine.generate(pieces, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))
    found = [[-token.logprob for token in result.prompt_logprobs or () if token is not None] for result in results]
    assert all(len(of_piece) == _LENGTH - 1 for of_piece in found)
    means: Floats = np.array(found).mean(axis=1)
    return means


def models(
    model_dir: Path, calibration: npt.NDArray[np.int64], groups: list[int], scratch: Path
) -> Iterator[tuple[str, Path]]:
    """Names and directories, made one after the other."""
    yield "as it is", model_dir
    with closing(open_source(model_dir)) as source:
        for bits in _BITS:
            for group in groups:
                for name, tokens in (("to nearest", None), ("for inputs", calibration)):
                    path = scratch / f"{bits}-{group}-{name.split()[-1]}"
                    quantize_checkpoint(source, path, Quantization(bits=bits, group_size=group), tokens=tokens)
                    yield f"{bits} bits, groups of {group}, {name}", path


def report(model: str, path: Path, found: Floats, first: Floats) -> None:
    """Print a row."""
    difference = found - first
    change = 100 * np.expm1(difference.mean())
    error = 100 * difference.std(ddof=1) / np.sqrt(len(difference))
    size = sum(file.stat().st_size for file in path.glob("*.safetensors")) / 1e6
    print(f"| {model} | {size:.0f} | {np.exp(found.mean()):.3f} | {change:+.2f} ± {error:.2f} |", flush=True)


def main() -> None:
    """Print a row a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--calibration", type=Path, help="a text file instead of half of the prose")
    parser.add_argument("--text", type=Path, help="the same for the text that is measured")
    parser.add_argument("--groups", type=int, nargs="+", default=[128])
    parser.add_argument("--pieces", type=int, default=80)
    parser.add_argument("--sequences", type=int, default=64, help=f"of {_LENGTH} tokens for calibration")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        calibration, text = scratch / "calibration.txt", scratch / "text.txt"
        for path, part in zip((calibration, text), split_prose(), strict=True):
            path.write_text(part, encoding="utf-8")
        tokens = read_tokens(args.calibration or calibration, args.model_dir, args.sequences, _LENGTH)
        pieces = read_tokens(args.text or text, args.model_dir, args.pieces, _LENGTH).tolist()
        print(f"{len(pieces)} pieces of {_LENGTH} tokens; {tokens.size:,} tokens for calibration\n")
        print("| model | MB | perplexity | to the first, % |\n|---|---|---|---|")
        first: Floats | None = None
        for name, path in models(args.model_dir, tokens, args.groups, scratch):
            found = losses(path, pieces)
            first = found if first is None else first
            report(name, path, found, first)


if __name__ == "__main__":
    main()
