"""Stages of a pipeline work on different passes at once, and what comes out is what one process says."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama31_core.config import ModelConfig
from llama31_core.inference.batch import BlockMove, ForwardInput
from llama31_core.inference.engine import Engine
from llama31_core.inference.engine_plan import EnginePlan
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.parallel_channel import Hub, connect
from llama31_core.inference.parallel_runner import Follower, LeadingRunner
from llama31_core.inference.sampling_params import SamplingParams
from llama31_core.inference.sum_runner import PipelinedSumRunner, SumRunner
from llama31_core.parallel.mesh import ParallelConfig

VOCAB = 102
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "dim": 8, "n_layers": 4, "n_heads": 2, "n_kv_heads": 2, "ffn_dim": 8}
CONFIG = ModelConfig.build("test", **SIZES, max_seq_len=64, eos_token_ids=(0,))
OPTIONS = EngineOptions(max_seq_len=64, num_blocks=40, block_size=4)
requests = st.lists(
    st.tuples(st.lists(st.integers(1, 100), min_size=1, max_size=20), st.integers(1, 12)), min_size=1, max_size=8
)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


@settings(max_examples=60, deadline=None)
@given(requests, st.integers(2, 4), st.integers(1, 6), st.integers(1, 9), st.integers(8, 20), st.sampled_from([0, 6]))
def test_completions_do_not_depend_on_stages(
    wanted: list[tuple[list[int], int]], num_stages: int, batch: int, prefill: int, num_blocks: int, num_host: int
) -> None:
    runner = PipelinedSumRunner(num_stages, VOCAB, num_blocks, 4, num_host)
    engine = Engine(CONFIG, runner, EngineOptions(max_batch_size=batch, max_prefill_tokens=prefill))
    alone = Engine(CONFIG, SumRunner(VOCAB, 64), OPTIONS)
    asked = [prompt for prompt, _ in wanted], [greedy(count) for _, count in wanted]
    assert engine.generate(*asked) == alone.generate(*asked)
    assert engine.num_free_blocks == num_blocks


def test_every_stage_has_its_share_of_the_sequences_all_the_time() -> None:
    runner = PipelinedSumRunner(3, VOCAB, 40, 4)
    engine = Engine(CONFIG, runner, EngineOptions(max_batch_size=8))
    engine.generate([[5]] * 7, greedy(10))
    assert runner.num_begun == [3] * 28 + [2, 1]
    assert runner.num_rows == 70


def test_an_aborted_request_leaves_its_pass_to_nobody() -> None:
    runner = PipelinedSumRunner(2, VOCAB, 8, 4)
    engine = Engine(CONFIG, runner, EngineOptions(max_batch_size=2))
    for name in "ab":
        engine.add(name, [1, 2, 3], greedy(9))
    engine.step()
    engine.abort("a")
    engine.abort("b")
    assert engine.num_free_blocks == 8
    [completion] = engine.generate([[4, 5]], greedy(9))
    assert [completion] == Engine(CONFIG, SumRunner(VOCAB)).generate([[4, 5]], greedy(9))


class Stages:
    """Notes which pass each rank of a mesh comes to, and holds a pass in the last stage until the first is at the one
    that has all stages at work, of `num_passes`."""

    def __init__(self, parallel: ParallelConfig, num_passes: int) -> None:
        self.parallel = parallel
        self.events: list[tuple[int, int]] = []  # rank, pass
        self._last = num_passes - 1
        self._noted = threading.Condition()

    def come_to(self, rank: int, number: int) -> None:
        pp = self.parallel.pp
        with self._noted:
            self.events.append((rank, number))
            self._noted.notify_all()
            if self.parallel.coordinates(rank).pp == pp - 1:
                wanted = (0, min(number + pp - 1, self._last))
                assert self._noted.wait_for(lambda: wanted in self.events, 60), "the first stage waits for the last"


class FakePart:
    """A rank whose hidden states say which pass it is and how many stages it has been through."""

    def __init__(self, stages: Stages, rank: int) -> None:
        self._stages, self._rank = stages, rank
        self._at = stages.parallel.coordinates(rank)
        self._model = SumRunner(VOCAB, 40)
        self._number = 0
        self.has_columns = self._at.pp == stages.parallel.pp - 1 and stages.parallel.tp > 1

    def move_blocks(self, moves: list[BlockMove]) -> None:
        self._model.move_blocks(moves)

    def forward(
        self, batch: ForwardInput, hidden_BTE: npt.NDArray[np.float32] | None = None
    ) -> npt.NDArray[np.float32]:
        number, self._number = self._number, self._number + 1
        given = np.array([number, self._at.pp], np.float32)
        assert (self._at.pp == 0) == (hidden_BTE is None)
        assert hidden_BTE is None or np.array_equal(hidden_BTE, given)
        self._stages.come_to(self._rank, number)
        logits_NV = self._model.forward(batch)
        if self._at.pp < self._stages.parallel.pp - 1:
            return given + np.array([0, 1], np.float32)
        return np.split(logits_NV, self._stages.parallel.tp, axis=1)[self._at.tp]


@contextmanager
def ranks(stages: Stages) -> Iterator[LeadingRunner]:
    """Rank 0, while the others follow it in threads."""
    parallel, hub = stages.parallel, Hub("127.0.0.1", b"key")

    def follow(rank: int) -> None:
        Follower(FakePart(stages, rank), connect("127.0.0.1", hub.port, b"key", rank), parallel, rank).follow()

    others = [threading.Thread(target=follow, args=(rank,), daemon=True) for rank in range(1, parallel.world_size)]
    for thread in others:
        thread.start()
    hub.accept(range(1, parallel.world_size))
    leader = LeadingRunner(FakePart(stages, 0), hub, parallel, EnginePlan.make(CONFIG, OPTIONS))
    yield leader
    leader.close()
    for thread in others:
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize(("pp", "tp"), [(2, 1), (3, 1), (3, 2)])
def test_stages_work_at_once_and_in_one_order(pp: int, tp: int) -> None:
    prompts, num_tokens = [[number + 1] for number in range(pp)], 6
    stages = Stages(ParallelConfig(pp=pp, tp=tp), pp * num_tokens)
    with ranks(stages) as leader:
        found = Engine(CONFIG, leader, OPTIONS).generate(prompts, greedy(num_tokens))
    assert found == Engine(CONFIG, SumRunner(VOCAB, 40), OPTIONS).generate(prompts, greedy(num_tokens))
    for rank in range(pp * tp):
        assert [number for own, number in stages.events if own == rank] == list(range(pp * num_tokens))


def test_a_pass_that_nobody_waits_for_is_through_before_all_end() -> None:
    stages = Stages(ParallelConfig(pp=2), 1)
    with ranks(stages) as leader:
        engine = Engine(CONFIG, leader, OPTIONS)
        engine.add("a", [1], greedy(2))
        engine._execution._begin_passes(0.0)
        engine.abort("a")
    assert stages.events == [(0, 0), (1, 0)]
