"""Speed and memory of llama31-tokenizer beside raw tiktoken and Hugging Face's tokenizers, same vocabulary, same texts.

`python tools/bench/tokenizer.py` prints the tables. All run in turn within each round, so that a busy machine disturbs
them alike; the figures are medians over the rounds, and the ratios medians of each round's ratios. Time that a thread
was ready and waited for a core that others had is taken off (Linux counts it in /proc), so that a shared machine tells
the same as a free one. The ids of all are compared first.

One thread means one: TOKENIZERS_PARALLELISM=false and RAYON_NUM_THREADS=1 for every library. The table of threads is
described in tokenizer_threads.py. tokenizers is called in both its ways:
`encode(text).ids`, and `encode_batch_fast([text])`, which leaves out the offsets nobody asked for; ratios are to the
first unless the column says fast. Raw tiktoken is its Encoding built by tiktoken's own loader with the pattern Meta
publishes, called through `encode_ordinary`. The engine fastokens remembers pieces it has seen, so each
of its rounds is a process of its own that sees every text once; the time to load stands beside. The merging limit is
what tiktoken's merging alone allows: the same texts in a vocabulary that has every one of their pieces as a token, so
that no piece is merged, give the seconds for cutting and looking up, and the rest is merging.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.tokenizer_corpora import load_corpora
from bench.tokenizer_engines import bench_fast_engine, measure_limit
from bench.tokenizer_threads import bench_threads
from bench.tokenizer_timing import (
    Corpora,
    Work,
    measure,
    print_rates,
    print_table,
    queued_seconds,
    ratio,
    run_rounds,
)

from llama31_tokenizer import Tokenizer
from llama31_tokenizer.patterns import LLAMA3
from model_assets import fetch

LIBRARIES = ("llama31", "tiktoken", "tokenizers")


def build_tiktoken(path: Path) -> Any:
    """Raw tiktoken over Meta's file."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # read the file itself, not a copy of it
    assert LLAMA3.split is not None
    return tiktoken.Encoding(
        "llama3", pat_str=LLAMA3.split, mergeable_ranks=load_tiktoken_bpe(str(path)), special_tokens={}
    )


def bench_encoding(ours: Tokenizer, raw: Any, hf: Any, corpora: Corpora, rounds: int) -> dict[str, float]:
    """Tables of encoding and counting in one thread; returns the seconds of tokenizers for each corpus."""

    def works(documents: list[str]) -> dict[str, Work]:
        rows = [ours.encode(document) for document in documents]
        assert rows == [raw.encode_ordinary(document) for document in documents], "ids differ from tiktoken's"
        assert rows == [hf.encode(document, add_special_tokens=False).ids for document in documents], "ids differ"
        return {
            "llama31": lambda: [ours.encode(text) for text in documents],
            "tiktoken": lambda: [raw.encode_ordinary(text) for text in documents],
            "tokenizers": lambda: [hf.encode(text, add_special_tokens=False).ids for text in documents],
            "tokenizers fast": lambda: [
                hf.encode_batch_fast([text], add_special_tokens=False)[0].ids for text in documents
            ],
            "count()": lambda: [ours.count(text) for text in documents],
        }

    hf.encode_special_tokens = True
    found = measure(corpora, works, rounds)
    gains = [("llama31", other) for other in ("tiktoken", "tokenizers", "tokenizers fast")] + [
        ("count()", "tokenizers")
    ]
    print_rates("One thread, MB/s", corpora, found, gains)
    hf_seconds = {name: statistics.median(t["tokenizers"]) for name, t in found.items()}
    print_table(
        "Where tiktoken's time goes, seconds",
        ("corpus", "cutting and looking up", "merging", "tokenizers", "most any tiktoken could gain on tokenizers"),
        [
            measure_limit(name, raw, documents, statistics.median(found[name]["tiktoken"]), hf_seconds[name])
            for name, documents in corpora.items()
        ],
    )
    return hf_seconds


def bench_decoding(ours: Tokenizer, raw: Any, hf: Any, corpora: Corpora, rounds: int) -> None:
    """The table of decoding."""

    def works(documents: list[str]) -> dict[str, Work]:
        rows = [ours.encode(document) for document in documents]
        return {
            "llama31": lambda: [ours.decode(ids) for ids in rows],
            "tiktoken": lambda: [raw.decode(ids) for ids in rows],
            "tokenizers": lambda: [hf.decode(ids, skip_special_tokens=False) for ids in rows],
        }

    gains = [("llama31", "tiktoken"), ("llama31", "tokenizers")]
    print_rates("Decoding, MB/s", corpora, measure(corpora, works, rounds), gains)


def bench_long_runs(ours: Tokenizer) -> None:
    """Seconds over texts of one kind of character: linear when the last column stays near the ratio of sizes."""
    rng = random.Random(0)
    kinds: dict[str, Callable[[int], str]] = {
        "one letter": lambda size: "a" * size,
        "spaces": lambda size: " " * size,
        "emoji": lambda size: "😀" * (size // 4),
        "random bytes": lambda size: rng.randbytes(size * 2 // 3).decode("utf-8", "replace"),
        "random letters": lambda size: "".join(rng.choices("abcdefgh", k=size)),
    }
    sizes = (1, 2, 5, 10)
    rows: list[Sequence[str]] = []
    for name, make in kinds.items():
        texts = [make(size * 1_000_000) for size in sizes]
        t = [statistics.median(run_rounds({"": lambda text=text: ours.encode(text)}, 3)[""]) for text in texts]  # type: ignore[misc]
        rows.append((name, *(f"{seconds:.2f}" for seconds in t), f"{t[-1] / t[0]:.1f}x"))
    print_table("Long runs, seconds", ("text", *(f"{size} MB" for size in sizes), "10 MB to 1 MB"), rows)


def child(library: str, path: Path, with_corpora: bool) -> None:
    """In a process of its own: load, encode, and print seconds and peak memory."""
    queued, start = queued_seconds(), time.perf_counter()
    encode: Callable[[str], object]
    if library == "llama31":
        encode = Tokenizer.from_file(path).encode
    elif library == "tiktoken":
        encode = build_tiktoken(path).encode_ordinary
    else:
        import tokenizers

        queued, start = queued_seconds(), time.perf_counter()
        encode = tokenizers.Tokenizer.from_file(str(path)).encode
    loaded = time.perf_counter() - start - (queued_seconds() - queued)
    encode("hello")
    if with_corpora:
        for documents in load_corpora().values():
            for document in documents:
                encode(document)
    peak_kb = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    print(json.dumps({"loaded": loaded, "peak_mb": int(peak_kb) / 1024}))


def bench_processes(paths: dict[str, Path], rounds: int) -> None:
    """Tables of loading and of memory, each in fresh processes."""
    loads: dict[str, list[float]] = {name: [] for name in LIBRARIES}
    peaks: dict[str, list[float]] = {}

    def start(name: str, *flags: str) -> dict[str, float]:
        command = [sys.executable, __file__, "--child", name, str(paths[name]), *flags]
        found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        return found

    for _ in range(rounds):
        for name in LIBRARIES:
            loads[name].append(start(name)["loaded"])
    for name in LIBRARIES:
        peaks[name] = [start(name)["peak_mb"], start(name, "--with-corpora")["peak_mb"]]
    rows: list[Sequence[str]] = [
        (
            name,
            f"{statistics.median(loads[name]) * 1000:.0f}",
            ratio(loads[name], loads["llama31"]),
            *(f"{peak:.0f}" for peak in peaks[name]),
        )
        for name in LIBRARIES
    ]
    header = ("library", "load, ms", "llama31 is faster by", "peak MB, loaded", "peak MB, all corpora")
    print_table("Loading and memory", header, rows)


def main() -> int:
    """Run everything."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=2, metavar=("LIBRARY", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--with-corpora", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], Path(arguments.child[1]), arguments.with_corpora)
        return 0
    import tokenizers

    path = fetch("llama3-tokenizer")
    ours = Tokenizer.from_file(path)
    with tempfile.TemporaryDirectory() as directory:
        ours.save_pretrained(directory)
        saved = Path(directory) / "tokenizer.json"
        corpora = load_corpora()
        raw, hf = build_tiktoken(path), tokenizers.Tokenizer.from_file(str(saved))
        bench_threads(ours, raw, corpora, arguments.rounds)
        hf_seconds = bench_encoding(ours, raw, hf, corpora, arguments.rounds)
        bench_decoding(ours, raw, hf, corpora, arguments.rounds)
        bench_fast_engine(ours, corpora, hf_seconds, arguments.rounds)
        bench_processes({"llama31": path, "tiktoken": path, "tokenizers": saved}, arguments.rounds)
    bench_long_runs(ours)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
