"""What fails harms nobody else: passes, draws, masks, moves and guesses that raise, and logits that are no numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llama31_core.config import ModelConfig
from llama31_core.inference.batch import BlockMove, ForwardInput
from llama31_core.inference.engine import Engine
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.request import StepOutput
from llama31_core.inference.sampling_params import SamplingParams
from llama31_core.inference.sum_runner import SumRunner

VOCAB = 101
CONFIG = ModelConfig.build(
    "test", vocab_size=VOCAB, dim=8, n_layers=1, n_heads=1, n_kv_heads=1, ffn_dim=8, max_seq_len=64, eos_token_ids=(0,)
)
GOOD = {"a": [3, 4], "b": [5, 6, 7], "c": [8] * 9}


def greedy(max_tokens: int = 8, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, **more)


class FaultyRunner(SumRunner):
    """Does `fault` to every batch in which a sequence begins with 77."""

    def __init__(self, fault: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]], **more: Any) -> None:
        super().__init__(VOCAB, 32, 4, **more)
        self.fault = fault
        self.clears: list[int] = []

    def move_blocks(self, moves: list[BlockMove]) -> None:
        super().move_blocks(moves)
        self.clears += [move.target for move in moves if move.kind == "clear"]

    def forward(self, batch: ForwardInput) -> npt.NDArray[np.float32]:
        logits = super().forward(batch)
        first = 0
        for table, count in zip(batch.block_tables, batch.num_logits, strict=True):
            if self.cache[table[0], 0] == 77:
                logits[first : first + count] = self.fault(logits[first : first + count])
            first += count
        return logits


def run(engine: Engine, bad: SamplingParams) -> dict[str, list[StepOutput]]:
    """The outputs of three good requests and of one that begins with 77."""
    outputs: dict[str, list[StepOutput]] = {name: [] for name in (*GOOD, "bad")}
    for name, prompt in GOOD.items():
        engine.add(name, prompt, greedy())
    engine.step()
    engine.step()
    for name in GOOD:
        engine.abort(name)
        engine.add(name, GOOD[name], greedy())
    engine.add("bad", [77, 1, 2, 3, 4, 5], bad)
    while engine.has_unfinished():
        for output in engine.step():
            outputs[output.request_id].append(output)
    return outputs


def check(outputs: dict[str, list[StepOutput]], engine: Engine, message: str) -> None:
    """The bad request has ended with an error; the others have what they have alone."""
    for name, prompt in GOOD.items():
        [alone] = Engine(CONFIG, SumRunner(VOCAB, 32)).generate([prompt], greedy())
        assert [token for output in outputs[name] for token in output.token_ids] == alone.token_ids
        assert outputs[name][-1].finish_reason == "length"
    assert outputs["bad"][-1].finish_reason == "error"
    assert message in (outputs["bad"][-1].error or "")
    assert engine.num_free_blocks == 32
    assert engine.stats().num_failed_requests == 1


def fail(_: object) -> Any:
    raise RuntimeError("no such kernel")


def test_a_pass_that_raises_ends_the_request_at_fault_alone() -> None:
    engine = Engine(CONFIG, FaultyRunner(fail), EngineOptions(max_batch_size=8))
    check(run(engine, greedy()), engine, "RuntimeError: no such kernel")
    assert engine.stats().num_failed_passes_in_a_row == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_end_their_request_and_are_cleared(value: float, temperature: float) -> None:
    runner = FaultyRunner(lambda logits: np.where(np.arange(VOCAB) == 50, np.float32(value), logits))
    engine = Engine(CONFIG, runner, EngineOptions(max_batch_size=8))
    check(run(engine, SamplingParams(temperature=temperature)), engine, f"the model gave {value}")
    engine.generate([[1, 2]], greedy(1))
    assert len(runner.clears) >= 2  # the blocks of six tokens
    # Nobody finds what the request had computed.
    num_hits = engine.stats().num_prefix_hit_tokens
    assert engine.generate([[77, 1, 2, 3, 4, 5]], greedy(1))[0].finish_reason == "error"
    assert engine.stats().num_prefix_hit_tokens == num_hits


def test_a_request_that_bans_every_token_ends_with_an_error() -> None:
    engine = Engine(CONFIG, SumRunner(VOCAB, 32), EngineOptions(max_batch_size=8))
    outputs = run(engine, greedy(bad_words_ids=tuple((token,) for token in range(VOCAB))))
    check(outputs, engine, "every token is banned")


def test_a_mask_that_raises_ends_every_completion_of_its_request() -> None:
    class Mask:
        terminated = False

        def allowed(self) -> npt.NDArray[np.bool_]:
            raise ZeroDivisionError("mask")

        def accept(self, token: int) -> None: ...

    engine = Engine(CONFIG, SumRunner(VOCAB, 32), EngineOptions(max_batch_size=8))
    outputs = run(engine, SamplingParams(n=3, logits_mask=Mask))
    check(outputs, engine, "ZeroDivisionError: mask")
    assert [output.index for output in outputs["bad"]] == [0, 1, 2]


def test_a_mask_of_another_vocabulary_is_an_error_of_its_request() -> None:
    class Mask:
        terminated = False

        def allowed(self) -> npt.NDArray[np.bool_]:
            return np.ones(7, bool)

        def accept(self, token: int) -> None: ...

    engine = Engine(CONFIG, SumRunner(VOCAB, 32), EngineOptions(max_batch_size=8))
    check(run(engine, SamplingParams(logits_mask=Mask)), engine, "the mask has 7 tokens, the model 101")


def test_moves_that_raise_end_the_requests_that_needed_them(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(CONFIG, SumRunner(VOCAB, 32), EngineOptions(max_batch_size=8))
    monkeypatch.setattr(SumRunner, "move_blocks", lambda *_: fail(None))
    # Three branches share the last block of six tokens, so two of them copy it.
    check(run(engine, SamplingParams(n=3, max_tokens=4, seed=1)), engine, "RuntimeError: no such kernel")


def test_guesses_that_raise_cost_nothing_but_time() -> None:
    class Proposer:
        def propose(self, rows: object) -> Any:
            return fail(rows)

        follow = move_blocks = propose

    engine = Engine(CONFIG, SumRunner(VOCAB, 32), EngineOptions(num_speculative_tokens=2), proposer=Proposer())
    [alone] = Engine(CONFIG, SumRunner(VOCAB, 32)).generate([[3, 4]], greedy())
    assert engine.generate([[3, 4]], greedy()) == [alone]
    assert engine.stats().num_drafted_tokens == 0


def test_passes_that_all_fail_are_counted() -> None:
    engine = Engine(CONFIG, FaultyRunner(fail))
    done = engine.generate([[77, 1], [77, 2], [77, 3]], greedy())
    assert [completion.finish_reason for completion in done] == ["error"] * 3
    assert engine.stats().num_failed_passes_in_a_row == 4  # together, and one at a time
    assert engine.generate([[1]], greedy(1))[0].finish_reason == "length"
    assert engine.stats().num_failed_passes_in_a_row == 0
