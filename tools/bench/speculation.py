"""Tokens guessed ahead, by prompt lookup and by a draft model, beside the engine without guesses.

    python tools/bench/speculation.py MODEL_DIR [--draft DRAFT_DIR] [--guesses 3] [--rounds 3]

Real prompts of two kinds, one request at a time, greedily and past no end token: answers that repeat their prompt (a
text to copy with a change) and answers that do not (questions). Every side is an engine of this process, in turns; a
ratio is the median of the rounds' ratios. All sides must give the same tokens, or the tool fails.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from llama31_core import Engine, SamplingParams
from llama31_core.inference.options import EngineOptions
from llama31_tokenizer import ChatFormat, Tokenizer

_TEXT = (
    "The harbour town had two bridges, and for as long as anyone could remember only one of them opened. Ships that "
    "came in with the evening tide had to wait until the baker, who kept the key, had finished his bread."
)
_CODE = """def area(width, height):
    return width * height

def edge(width, height):
    return 2 * (width + height)"""
PROMPTS = {
    "repeats": (
        f"Repeat this text word for word: {_TEXT}",
        f"Correct the spelling, change nothing else: {_TEXT}",
        f"Add type hints to this code:\n{_CODE}",
    ),
    "does not": (
        "Explain in three sentences why the sky is blue.",
        "Write a short story about a lighthouse.",
        "What should I see in Rome in two days?",
    ),
}


@dataclass(frozen=True)
class Run:
    """Of one kind of prompts on one side."""

    tokens_per_s: float
    right: float
    token_ids: list[list[int]]


def run(engine: Engine, prompts: list[list[int]], max_tokens: int) -> Run:
    """One prompt after the other."""
    before, completions = engine.stats(), []
    started_s = time.perf_counter()
    for prompt in prompts:
        completions += engine.generate([prompt], SamplingParams(max_tokens=max_tokens, temperature=0))
    elapsed_s = time.perf_counter() - started_s
    after = engine.stats()
    drafted = after.num_drafted_tokens - before.num_drafted_tokens
    accepted = after.num_accepted_tokens - before.num_accepted_tokens
    token_ids = [completion.token_ids for completion in completions]
    return Run(sum(map(len, token_ids)) / elapsed_s, accepted / max(1, drafted), token_ids)


def build(model_dir: Path, draft_dir: Path | None, num_guesses: int) -> Engine:
    """An engine that has computed everything once."""
    options = EngineOptions(max_batch_size=1, max_seq_len=1024, num_speculative_tokens=num_guesses)
    engine = Engine.from_pretrained(model_dir, options, draft_model_dir=draft_dir)
    engine.warm_up()
    return engine


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--draft", type=Path, help="a model directory that guesses, of the same vocabulary")
    parser.add_argument("--guesses", type=int, default=3, help="tokens guessed ahead")
    parser.add_argument("--tokens", type=int, default=96, help="the most of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    chat = ChatFormat(Tokenizer.from_pretrained(arguments.model_dir))
    engines = {"none": build(arguments.model_dir, None, 0)}
    engines["prompt lookup"] = build(arguments.model_dir, None, arguments.guesses)
    if arguments.draft is not None:
        engines["draft model"] = build(arguments.model_dir, arguments.draft, arguments.guesses)
    print("| answer | guesses | tokens/s | of none | guesses right |\n|---|---|---|---|---|")
    for kind, texts in PROMPTS.items():
        prompts = [chat.encode_dialog([{"role": "user", "content": t}], add_generation_prompt=True).ids for t in texts]
        rounds = [
            {name: run(engine, prompts, arguments.tokens) for name, engine in engines.items()}
            for _ in range(arguments.rounds)
        ]
        for name in engines:
            if any(found[name].token_ids != found["none"].token_ids for found in rounds):
                print(f"{name}: other tokens than without guesses", file=sys.stderr)
                return 1
            ratio = statistics.median(found[name].tokens_per_s / found["none"].tokens_per_s for found in rounds)
            rate = statistics.median(found[name].tokens_per_s for found in rounds)
            print(f"| {kind} | {name} | {rate:,.0f} | {ratio:.2f} | {rounds[0][name].right:.0%} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
