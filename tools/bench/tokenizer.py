"""Speed and memory of llama31-tokenizer beside raw tiktoken and Hugging Face's tokenizers, same vocabulary, same texts.

`python tools/bench/tokenizer.py` prints the tables. All run in turn within each round, so that a busy machine disturbs
them alike; the figures are medians over the rounds, and the ratios medians of each round's ratios. Time that a thread
was ready and waited for a core that others had is taken off (Linux counts it in /proc), so that a shared machine tells
the same as a free one. The ids of all are compared first.

One thread means one: TOKENIZERS_PARALLELISM=false and RAYON_NUM_THREADS=1 for every library. The table of threads is
`encode_batch` against itself, timed in the calling thread, which works too. tokenizers is called in both its ways:
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

from bench.tokenizer_corpora import load_corpora, size_mb
from bench.tokenizer_engines import bench_fast_engine, measure_limit
from bench.tokenizer_timing import Work, print_table, queued_seconds, ratio, time_work

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


def run_rounds(works: dict[str, Work], rounds: int) -> dict[str, list[float]]:
    """Seconds of each work in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        names = list(works)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds[name].append(time_work(works[name]))
    return seconds


def bench_encoding(ours: Tokenizer, raw: Any, hf: Any, corpora: dict[str, list[str]], rounds: int) -> dict[str, float]:
    """Tables of encoding, decoding and counting; returns the seconds of tokenizers for each corpus."""
    single: list[Sequence[str]] = []
    limits: list[Sequence[str]] = []
    hf_seconds: dict[str, float] = {}
    threads: list[Sequence[str]] = []
    decoding: list[Sequence[str]] = []
    for name, documents in corpora.items():
        mb = size_mb(documents)
        rows = [ours.encode(document) for document in documents]
        assert rows == [raw.encode_ordinary(document) for document in documents], "ids differ from tiktoken's"
        hf.encode_special_tokens = True
        assert rows == [hf.encode(document, add_special_tokens=False).ids for document in documents], "ids differ"

        def hf_encode(documents: list[str] = documents) -> object:
            return [hf.encode(document, add_special_tokens=False).ids for document in documents]

        def rate(seconds: list[float], mb: float = mb) -> str:
            return f"{mb / statistics.median(seconds):.1f}"

        t = run_rounds(
            {
                "llama31": lambda d=documents: [ours.encode(text) for text in d],  # type: ignore[misc]
                "tiktoken": lambda d=documents: [raw.encode_ordinary(text) for text in d],  # type: ignore[misc]
                "tokenizers": hf_encode,
                "tokenizers fast": lambda d=documents: [  # type: ignore[misc]
                    hf.encode_batch_fast([text], add_special_tokens=False)[0].ids for text in d
                ],
                "count": lambda d=documents: [ours.count(text) for text in d],  # type: ignore[misc]
            },
            rounds,
        )
        gains = [ratio(t["tiktoken"], t["llama31"]), *(ratio(t["tokenizers"], t[key]) for key in ("llama31", "count"))]
        gains.append(ratio(t["tokenizers fast"], t["llama31"]))
        single.append((name, f"{mb:.1f}", *(rate(t[key]) for key in (*LIBRARIES, "tokenizers fast", "count")), *gains))
        hf_seconds[name] = statistics.median(t["tokenizers"])
        limits.append(measure_limit(name, raw, documents, statistics.median(t["tiktoken"]), hf_seconds[name]))
        t = run_rounds(
            {
                "one": lambda d=documents: ours.encode_batch(d, num_threads=1),  # type: ignore[misc]
                "two": lambda d=documents: ours.encode_batch(d, num_threads=2),  # type: ignore[misc]
                "tiktoken": lambda d=documents: raw.encode_ordinary_batch(d, num_threads=2),  # type: ignore[misc]
            },
            rounds,
        )
        gains = [ratio(t["one"], t["two"]), ratio(t["tiktoken"], t["two"])]
        threads.append((name, *(rate(t[key]) for key in ("one", "two", "tiktoken")), *gains))
        t = run_rounds(
            {
                "llama31": lambda r=rows: [ours.decode(ids) for ids in r],  # type: ignore[misc]
                "tiktoken": lambda r=rows: [raw.decode(ids) for ids in r],  # type: ignore[misc]
                "tokenizers": lambda r=rows: [hf.decode(ids, skip_special_tokens=False) for ids in r],  # type: ignore[misc]
            },
            rounds,
        )
        gains = [ratio(t["tiktoken"], t["llama31"]), ratio(t["tokenizers"], t["llama31"])]
        decoding.append((name, *(rate(t[key]) for key in LIBRARIES), *gains))
    against = ("to tiktoken", "to tokenizers")
    header = ("corpus", "MB", *LIBRARIES, "tokenizers fast", "count()", *against, "count() to tokenizers", "to fast")
    print_table("One thread, MB/s", header, single)
    print_table(
        "Where tiktoken's time goes, seconds",
        ("corpus", "cutting and looking up", "merging", "tokenizers", "most any tiktoken could gain on tokenizers"),
        limits,
    )
    columns = ("corpus", "one thread", "two threads", "tiktoken, two threads")
    print_table("Threads, MB/s", (*columns, "two to one", "two to tiktoken"), threads)
    print_table("Decoding, MB/s", ("corpus", *LIBRARIES, *against), decoding)
    return hf_seconds


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
        corpora["all"] = [document for documents in corpora.values() for document in documents]
        hf = tokenizers.Tokenizer.from_file(str(saved))
        hf_seconds = bench_encoding(ours, build_tiktoken(path), hf, corpora, arguments.rounds)
        bench_fast_engine(ours, corpora, hf_seconds, arguments.rounds)
        bench_processes({"llama31": path, "tiktoken": path, "tokenizers": saved}, arguments.rounds)
    bench_long_runs(ours)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
