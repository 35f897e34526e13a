"""What tools/bench/tokenizer says beyond tiktoken: the limit of its merging, and the optional engine fastokens.

Run with a tokenizer file as its argument it is the engine's process: it loads, encodes each corpus once, prints JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.tokenizer_corpora import load_corpora, size_mb
from bench.tokenizer_timing import print_table, queued_seconds, time_work

from llama31_tokenizer import Tokenizer


def measure_limit(name: str, raw: Any, documents: list[str], total: float, hf_total: float) -> Sequence[str]:
    """A row: how long tiktoken takes without any merging, how long it merges, and what free cutting would give."""
    import regex  # type: ignore[import-untyped]
    import tiktoken

    ranks = dict(raw._mergeable_ranks)
    for document in documents:
        for piece in regex.findall(raw._pat_str, document):
            ranks.setdefault(piece.encode(), len(ranks))
    known = tiktoken.Encoding("pieces", pat_str=raw._pat_str, mergeable_ranks=ranks, special_tokens={})
    cutting = min(time_work(lambda: [known.encode_ordinary(document) for document in documents]) for _ in range(3))
    merging = max(total - cutting, 1e-9)
    return (name, f"{cutting:.2f}", f"{merging:.2f}", f"{hf_total:.2f}", f"{hf_total / merging:.1f}x")


def fast_child(path: Path) -> None:
    """In a process of its own: seconds fastokens takes to load and for each corpus, seen once, and a checksum."""
    queued, start = queued_seconds(), time.perf_counter()
    encode = Tokenizer.from_file(path, engine="fastokens").encode
    found: dict[str, Any] = {"loaded": time.perf_counter() - start - (queued_seconds() - queued)}
    for name, documents in load_corpora().items():
        rows: list[list[int]] = []
        seconds = time_work(lambda d=documents, r=rows: r.extend(encode(text) for text in d))  # type: ignore[misc]
        found[name] = [seconds, checksum(rows)]
    print(json.dumps(found))


def checksum(rows: list[list[int]]) -> int:
    """Of all ids."""
    digest = 0
    for row in rows:
        digest = zlib.crc32(array("i", row).tobytes(), digest)
    return digest


def bench_fast_engine(ours: Tokenizer, corpora: dict[str, list[str]], hf: dict[str, float], rounds: int) -> None:
    """Table of the optional engine, every text seen once by a fresh process."""
    command = [sys.executable, __file__, str(ours.vocabulary.source)]
    runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(rounds)]
    rows: list[Sequence[str]] = []
    total = hf_total = 0.0
    for name in corpora:
        want = checksum([ours.encode(document) for document in corpora[name]])
        assert all(run[name][1] == want for run in runs), "ids differ"
        seconds = statistics.median(run[name][0] for run in runs)
        total, hf_total = total + seconds, hf_total + hf[name]
        rows.append((name, f"{size_mb(corpora[name]) / seconds:.1f}", f"{hf[name] / seconds:.1f}x"))
    rows.append(("all", f"{sum(map(size_mb, corpora.values())) / total:.1f}", f"{hf_total / total:.1f}x"))
    load = statistics.median(run["loaded"] for run in runs)
    print_table(
        f"One thread, engine fastokens, MB/s ({load:.1f} s to load)", ("corpus", "fastokens", "to tokenizers"), rows
    )


if __name__ == "__main__":
    fast_child(Path(sys.argv[1]))
