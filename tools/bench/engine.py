"""Requests at once through the engine, beside one by one and beside transformers' `generate` over the same batch.

    python tools/bench/engine.py MODEL_DIR [--concurrency 1 4 16 64] [--rounds 3] [--json OUT]

N requests come at the same moment; each has a prompt of --prompt_tokens ids, of which the first --shared_tokens are
those of the others of its round, and runs greedily past its end tokens for --tokens. Every side is a process of its own
with the same threads and the type of the model directory's weights, and they take turns; a ratio is the median of the
rounds' ratios. TTFT is from the moment at which all came to a request's first token; gaps are between its tokens, which
come several at once where they were guessed: --guesses N adds the engine with N tokens guessed ahead by prompt lookup.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.inference_weights import write_hf

_VOCABULARY = 40_000


@dataclass(frozen=True)
class Work:
    """What both sides get in a round."""

    prompts: list[list[int]]
    num_tokens: int


@dataclass(frozen=True)
class Figures:
    """Of one round, or the medians of several; the shares (of blocks in use at the most, of prompt tokens found in the
    cache, of guesses that were right) are 0 where there is no such thing."""

    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p95_ms: float
    gap_p50_ms: float
    gap_p95_ms: float
    gap_p99_ms: float
    cache_use: float = 0.0
    hit_rate: float = 0.0
    acceptance_rate: float = 0.0

    @classmethod
    def of(cls, began_s: float, times_s: list[list[float]], *shares: float) -> Figures:
        """From when each token of each request came."""
        first_ms = [(own[0] - began_s) * 1e3 for own in times_s]
        gaps_ms = [gap * 1e3 for own in times_s for gap in np.diff(own)]
        elapsed_s = max(own[-1] for own in times_s) - began_s
        ttft = np.quantile(first_ms, [0.5, 0.95]).tolist()
        gaps = np.quantile(gaps_ms, [0.5, 0.95, 0.99]).tolist()
        return cls(sum(map(len, times_s)) / elapsed_s, *ttft, *gaps, *shares)

    @classmethod
    def median(cls, rounds: list[Figures]) -> Figures:
        """Field by field."""
        columns = zip(*(asdict(figures).values() for figures in rounds), strict=True)
        return cls(*(statistics.median(column) for column in columns))


@dataclass(frozen=True)
class Side:
    """One contender."""

    model_dir: Path
    num_guesses: int
    most: int
    threads: int


def llama31(side: Side) -> Callable[[Work], Figures]:
    """Our engine."""
    from llama31_core import Engine, SamplingParams
    from llama31_core.inference.options import EngineOptions

    os.environ["LLAMA31_NUM_THREADS"] = str(side.threads)
    options = EngineOptions(max_batch_size=side.most, num_speculative_tokens=side.num_guesses)
    engine = Engine.from_pretrained(side.model_dir, options)
    engine.warm_up()
    num_blocks = engine.num_free_blocks

    def run(work: Work) -> Figures:
        params = SamplingParams(work.num_tokens, temperature=0, ignore_eos=True)
        before, used = engine.stats(), 0
        times_s: list[list[float]] = [[] for _ in work.prompts]
        began_s = time.perf_counter()
        for index, prompt in enumerate(work.prompts):
            engine.add(str(index), prompt, params)
        while engine.has_unfinished():
            outputs = engine.step()
            now_s = time.perf_counter()
            for output in outputs:
                times_s[int(output.request_id)] += [now_s] * len(output.token_ids)
            used = max(used, num_blocks - engine.num_free_blocks)
        after = engine.stats()
        hits = after.num_prefix_hit_tokens - before.num_prefix_hit_tokens
        entered = after.num_prefill_tokens - before.num_prefill_tokens
        accepted = after.num_accepted_tokens - before.num_accepted_tokens
        drafted = after.num_drafted_tokens - before.num_drafted_tokens
        return Figures.of(began_s, times_s, used / num_blocks, hits / entered, accepted / max(1, drafted))

    return run


def transformers(side: Side) -> Callable[[Work], Figures]:
    """`generate` over the whole batch, in the type of the checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    torch.set_num_threads(side.threads)
    model = AutoModelForCausalLM.from_pretrained(side.model_dir, dtype="auto").eval()

    class Clock(StoppingCriteria):  # type: ignore[misc]
        def __init__(self) -> None:
            self.times_s: list[float] = []

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
            self.times_s.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

    def run(work: Work) -> Figures:
        clock, ids = Clock(), torch.tensor(work.prompts)
        began_s = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=work.num_tokens,
            min_new_tokens=work.num_tokens,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return Figures.of(began_s, [clock.times_s] * len(work.prompts))

    return run


def serve(pipe: Connection, name: str, side: Side) -> None:
    """Body of a side's process: load, then do each work that comes; None ends it."""
    run = transformers(side) if name == "transformers" else llama31(side)
    pipe.send("ready")
    while (work := pipe.recv()) is not None:
        pipe.send(run(work))


def make_work(rng: np.random.Generator, concurrency: int, arguments: argparse.Namespace) -> Work:
    """Prompts that no round before had."""
    shared = rng.integers(5, _VOCABULARY, arguments.shared_tokens).tolist()
    rest = arguments.prompt_tokens - arguments.shared_tokens
    return Work(
        [shared + rng.integers(5, _VOCABULARY, rest).tolist() for _ in range(concurrency)],
        arguments.tokens,
    )


def measure(pipes: dict[str, Connection], arguments: argparse.Namespace) -> dict[int, dict[str, list[Figures]]]:
    """The figures of every round by concurrency and side; a round of two tokens before them does not count."""
    rng = np.random.default_rng(0)
    found: dict[int, dict[str, list[Figures]]] = {}
    for number in range(arguments.rounds + 1):
        for concurrency in arguments.concurrency:
            work = make_work(rng, concurrency, arguments)
            work = work if number else replace(work, num_tokens=2)
            for side in rng.permutation(list(pipes)):
                pipes[side].send(work)
                figures = pipes[side].recv()
                if number:
                    found.setdefault(concurrency, {}).setdefault(str(side), []).append(figures)
        print(f"round {number} of {arguments.rounds} done", file=sys.stderr)
    return found


def report(found: dict[int, dict[str, list[Figures]]]) -> list[dict[str, object]]:
    """Medians, printed as a table. `to alone` is to a side's first row, `of transformers` to that of the same round."""
    print(
        "| requests at once | | tokens/s | to alone | of transformers | TTFT p50, p95 ms | gap p50, p95, p99 ms "
        "| cache used | prefix hits | guesses right |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    rows: list[dict[str, object]] = []
    alone: dict[str, float] = {}
    for concurrency, sides in found.items():
        for name, rounds in sorted(sides.items()):
            figures = Figures.median(rounds)
            pairs = zip(rounds, sides["transformers"], strict=True)
            ratio = statistics.median(ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs)
            to_alone = figures.tokens_per_s / alone.setdefault(name, figures.tokens_per_s)
            shares = " | ".join(f"{share:.0%}" for share in list(asdict(figures).values())[-3:])
            print(
                f"| {concurrency} | {name} | {figures.tokens_per_s:,.0f} | {to_alone:.1f} | {ratio:.2f} "
                f"| {figures.ttft_p50_ms:,.0f}, {figures.ttft_p95_ms:,.0f} "
                f"| {figures.gap_p50_ms:.1f}, {figures.gap_p95_ms:.1f}, {figures.gap_p99_ms:.1f} | {shares} |"
            )
            rows.append({"concurrency": concurrency, "side": name, "of_transformers": ratio, **asdict(figures)})
    return rows


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--shared_tokens", type=int, default=32, help="of the prompt, the same in all requests")
    parser.add_argument("--tokens", type=int, default=64, help="of each completion")
    parser.add_argument("--guesses", type=int, default=0, help="tokens that a further side guesses ahead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    if not 0 <= arguments.shared_tokens < arguments.prompt_tokens:
        parser.error("--shared_tokens: less than --prompt_tokens")
    if arguments.tokens < 2:
        parser.error("--tokens: at least 2, as gaps are measured")
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        hf_dir = write_hf(arguments.model_dir, Path(scratch) / "hf")
        most, threads = max(arguments.concurrency), arguments.threads
        sides = {
            "llama31": Side(arguments.model_dir, 0, most, threads),
            "transformers": Side(hf_dir, 0, most, threads),
        }
        if arguments.guesses:
            sides[f"llama31, {arguments.guesses} guesses"] = replace(sides["llama31"], num_guesses=arguments.guesses)
        pipes, processes = {}, []
        for name, side in sides.items():
            pipes[name], theirs = spawn.Pipe()
            processes.append(spawn.Process(target=serve, args=(theirs, name, side), daemon=True))
            processes[-1].start()
            theirs.close()
        for pipe in pipes.values():
            pipe.recv()
        found = measure(pipes, arguments)
        for pipe, process in zip(pipes.values(), processes, strict=True):
            pipe.send(None)
            process.join()
    rows = report(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
