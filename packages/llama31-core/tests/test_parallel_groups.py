"""Groups of ranks and what is done with gradients, for whole meshes at once, without MindSpore's groups."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.parallel import ParallelConfig, plan_shards
from llama31_core.parallel.gradient_plan import plan_gradient
from llama31_core.parallel.groups import plan_groups
from llama31_core.parallel.replica import check_trainable

SMALL = ModelConfig(vocab_size=96, dim=32, n_layers=4, n_heads=8, n_kv_heads=2, head_dim=4, ffn_dim=48, max_seq_len=64)
TIED = SMALL.model_copy(update={"tie_word_embeddings": True})

meshes = st.builds(
    ParallelConfig,
    dp=st.sampled_from([1, 2, 3]),
    cp=st.sampled_from([1, 2]),
    tp=st.sampled_from([1, 2, 4, 8]),
    pp=st.integers(1, 4),
    shard_optimizer=st.booleans(),
    sequence_parallel=st.booleans(),
)


@settings(deadline=None, max_examples=40)
@given(parallel=meshes)
def test_all_members_make_a_group_and_none_waits_in_a_circle(parallel: ParallelConfig) -> None:
    order = [plan_groups(parallel, rank, SMALL.n_kv_heads) for rank in range(parallel.world_size)]
    for rank, groups in enumerate(order):
        assert all(rank in group and len(set(group)) == len(group) for group in groups)
        for group in groups:
            assert all(group in order[member] for member in group)
    waiting = [0] * parallel.world_size  # a group is made when it is next for all of its members
    while any(place < len(groups) for place, groups in zip(waiting, order, strict=True)):
        nexts = {groups[place] for place, groups in zip(waiting, order, strict=True) if place < len(groups)}
        made = [group for group in nexts if all(order[r][waiting[r] : waiting[r] + 1] == [group] for r in group)]
        assert made
        for group in made:
            for rank in group:
                waiting[rank] += 1


@settings(deadline=None, max_examples=40)
@given(parallel=meshes, tied=st.booleans())
def test_every_element_of_a_gradient_counts_once_in_the_norm(parallel: ParallelConfig, tied: bool) -> None:
    config = TIED if tied else SMALL
    counted: dict[str, float] = {}
    for rank in range(parallel.world_size):
        for name, shard in plan_shards(config, parallel, rank).items():
            plan = plan_gradient(shard, config, parallel)
            counted[name] = counted.get(name, 0.0) + prod(plan.shape) / plan.num_holders
    for name, shard in plan_shards(config, ParallelConfig(), 0).items():
        assert counted[name] == pytest.approx(prod(shard.full_shape))


def test_whole_weights_are_summed_where_ranks_saw_other_tokens() -> None:
    parallel = ParallelConfig(tp=4, pp=2, sequence_parallel=True)
    first, last = (plan_shards(TIED, parallel, rank) for rank in (0, 4))
    plans = {name: plan_gradient(shard, TIED, parallel) for name, shard in (first | last).items()}
    assert plans["model.layers.0.attention_norm.weight"].sums_tp
    assert not plans["model.layers.0.attention.wq.weight"].sums_tp
    assert not plans["model.norm_out.weight"].sums_tp  # the head works on all tokens
    assert plans["model.layers.0.attention.wk.weight"].kv_copies == 2
    assert plans["model.tok_embeddings.embedding_weight"].sums_ends


def test_groups_of_405b_on_512_ranks() -> None:
    parallel = ParallelConfig(tp=8, pp=16, cp=2, dp=2, sequence_parallel=True, shard_optimizer=True)
    groups = plan_groups(parallel, 300, 8)
    assert sorted({len(group) for group in groups}) == [2, 8, 16, 512]
    assert all(a < b for a, b in pairwise(groups))


def test_a_head_that_is_a_whole_embedding_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"vocab_emb_dp is True and tp=2.*set vocab_emb_dp=False"):
        check_trainable(TIED, ParallelConfig(tp=2, vocab_parallel=False))
    check_trainable(SMALL, ParallelConfig(tp=2, vocab_parallel=False))
    with pytest.raises(ConfigError, match=r"tp=3 does not fit .*; the nearest that do are \[1, 2, 4\]"):
        check_trainable(SMALL, ParallelConfig(tp=3))
