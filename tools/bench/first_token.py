"""From the start of a process to its first token, here, beside transformers and llama.cpp.

    python tools/bench/first_token.py MODEL_DIR --gguf FILE [--rounds 5] [--json OUT]

MODEL_DIR holds bfloat16 weights, FILE is any GGUF file of the same architecture and vocabulary (as for inference.py,
whose processes these are). A process imports, loads, and answers a prompt of 32 tokens (the first token), then another
(the next). Three kinds of start: warm; cold, with the model's files out of the page cache; and ours cold with no
compiled kernels either, as the first on a machine. Contenders take turns in an order of chance. Peers that are not
installed are left out and named.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.ckpt import set_page_cache
from bench.inference import contender_options, missing_peers, start
from bench.inference_weights import write_gguf, write_hf
from bench.tokenizer_timing import print_table

_PROMPT = ("prefill", 32)
_OURS, _FIRST_ON_A_MACHINE = "llama31", "llama31, no compiled kernels"
_KINDS = ("warm", "cold")


class Entry(NamedTuple):
    """A contender: whose code runs, how it is told of the model, and the model's files."""

    name: str
    model: str
    files: list[Path]


class Seconds(NamedTuple):
    """From the start to the first token, and of the next prompt's."""

    first: float
    next: float


def once(entry: Entry, threads: int, *, cold: bool, **variables: str) -> Seconds:
    """A process from its start to the end of its second answer, with `variables` in its environment."""
    for file in entry.files:
        set_page_cache(file, cold=cold)
    started = time.perf_counter()
    contender = start(entry.name, entry.name, entry.model, threads, **variables)
    try:
        contender.run(_PROMPT)
        first_s = time.perf_counter() - started
        return Seconds(first_s, contender.run(_PROMPT))
    finally:
        contender.stop()


def entries(model_dir: Path, like: Path, scratch: Path) -> dict[str, Entry]:
    """Ours, and each peer that is installed, of the same bfloat16 weights."""
    hf, converted = write_hf(model_dir, scratch / "hf"), scratch / "bf16.gguf"
    weights = sorted(hf.glob("*.safetensors"))
    found = {
        _OURS: Entry("llama31", str(model_dir), sorted(model_dir.glob("*.safetensors"))),
        "transformers bf16": Entry("transformers", f"{hf}:bfloat16", weights),
        "transformers fp32": Entry("transformers", f"{hf}:float32", weights),
        "llama.cpp BF16": Entry("llama.cpp", str(converted), [converted]),
    }
    missing = missing_peers()
    if "llama.cpp" not in missing:
        write_gguf(hf, like, "BF16", converted)
    return {label: entry for label, entry in found.items() if entry.name not in missing}


def measure(all_entries: dict[str, Entry], rounds: int, threads: int) -> dict[str, dict[str, Seconds]]:
    """Medians by kind of start and contender."""
    seen: dict[tuple[str, str], list[Seconds]] = {}
    for number in range(rounds):
        for kind in _KINDS:
            for label in random.sample(list(all_entries), len(all_entries)):
                seen.setdefault((kind, label), []).append(once(all_entries[label], threads, cold=kind == "cold"))
        with tempfile.TemporaryDirectory() as cache:
            seconds = once(all_entries[_OURS], threads, cold=True, XDG_CACHE_HOME=cache)
        seen.setdefault(("cold", _FIRST_ON_A_MACHINE), []).append(seconds)
        print(f"round {number + 1} of {rounds} done", file=sys.stderr)
    result: dict[str, dict[str, Seconds]] = {label: {} for label in (*all_entries, _FIRST_ON_A_MACHINE)}
    for (kind, label), found in seen.items():
        middle = Seconds(median(one.first for one in found), median(one.next for one in found))
        result[label][kind] = middle
    return result


def main() -> None:
    """Measure and print."""
    args = contender_options(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(entries(args.model_dir, args.gguf, Path(scratch)), args.rounds, args.threads)
    rows = []
    for label, kinds in result.items():
        row = [label]
        for kind in _KINDS:
            own, theirs = result[_OURS][kind], kinds.get(kind)
            if theirs is None:
                row += [""] * 3
            else:
                row += [f"{theirs.first:.2f}", f"{own.first / theirs.first:.2f}", f"{1000 * theirs.next:,.0f}"]
        rows.append(row)
    header = ["", *(text for kind in _KINDS for text in (f"{kind}: first token s", "ours to it", "next one ms"))]
    print_table(f"From a process' start to its first token, medians of {args.rounds} rounds", header, rows)
    if args.json:
        args.json.write_text(
            json.dumps({who: {kind: s._asdict() for kind, s in kinds.items()} for who, kinds in result.items()})
        )


if __name__ == "__main__":
    main()
