"""Cutting sequences over context-parallel ranks: every pair of query and key once, and as much work for all."""

from __future__ import annotations

import numpy as np
import pytest

from llama31_core.errors import ConfigError
from llama31_core.parallel import ParallelConfig
from llama31_core.parallel.sequence import check_sequence, own_tokens, plan_ring, ring_biases, token_order
from llama31_core.training.attention import attention_biases
from llama31_core.training.batch import Batch

TOKENS = 32


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_the_steps_of_all_ranks_see_what_whole_sequences_see(cp: int) -> None:
    segments = np.stack([np.zeros(TOKENS), np.repeat([0, 1, 2, 3], [3, 10, 12, 7])]).astype(np.int32)
    order = token_order(TOKENS, cp)
    seen = np.zeros((2, TOKENS, TOKENS), int)
    for rank in range(cp):
        for step, bias in zip(plan_ring(rank, cp), ring_biases(segments, rank, cp), strict=True):
            half = TOKENS // cp // 2
            queries = order[rank][step.queries[0] * half : step.queries[1] * half]
            keys = order[step.source][step.keys[0] * half : step.keys[1] * half]
            seen[:, queries[:, None], keys[None, :]] += bias == 0
    (whole,) = attention_biases(segments)
    assert (seen == (whole == 0)).all()


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_every_step_of_every_rank_is_as_much_work(cp: int) -> None:
    assert sorted(np.concatenate(token_order(TOKENS, cp))) == list(range(TOKENS))
    for rank in range(cp):
        own, *others = plan_ring(rank, cp)
        assert own.source == rank
        assert {(s.queries[1] - s.queries[0]) * (s.keys[1] - s.keys[0]) for s in others} == {2}
        assert sorted(step.source for step in plan_ring(rank, cp)) == list(range(cp))


def test_a_rank_takes_its_own_tokens() -> None:
    tokens = np.arange(16, dtype=np.int32).reshape(2, 8)
    own = own_tokens(Batch.unpacked(tokens, tokens + 1), 1, 2)
    assert own.tokens.tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert own.labels.tolist() == [[3, 4, 5, 6], [11, 12, 13, 14]]
    assert own.positions.tolist() == [[2, 3, 4, 5]] * 2


def test_sequences_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"seq_length=20 cannot be cut into 2 x cp = 8 equal pieces.*length is 16"):
        check_sequence(ParallelConfig(cp=4), 20)
    with pytest.raises(ConfigError, match=r"the 6 tokens .* do not divide by tp=4; the nearest seq_length is 16"):
        check_sequence(ParallelConfig(cp=2, tp=4, sequence_parallel=True), 12)
