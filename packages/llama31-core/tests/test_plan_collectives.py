"""The collectives that `plan` counts beside those that a rank of a mesh really takes part in.

What the trainer sends is counted where it is sent, by a transport with nobody at the other end: its numbers are wrong,
their sizes and how often they come are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any

import mindspore as ms
import numpy as np
import numpy.typing as npt
import pytest
from mindspore import Tensor, ops

from llama31_core.checkpoint.names import split_layer
from llama31_core.config import ModelConfig
from llama31_core.parallel import ParallelConfig, gradients, groups, plan_shards, zero
from llama31_core.parallel.groups import Group
from llama31_core.parallel.replica import build_replica
from llama31_core.parallel.schedule import plan_pipeline
from llama31_core.plan import TrainWorkload, find_device
from llama31_core.plan.counts import stage_rank
from llama31_core.plan.gradient_sums import count_sums
from llama31_core.plan.traffic import step_traffic

SIZES: dict[str, Any] = {"vocab_size": 96, "dim": 32, "n_layers": 4, "n_heads": 8, "n_kv_heads": 2, "ffn_dim": 42}
CONFIG = ModelConfig(**SIZES, max_seq_len=64)
TIED = CONFIG.model_copy(update={"tie_word_embeddings": True})
MICRO_BATCHES = 4
ZERO1, ZERO2 = {"shard_optimizer": True}, {"shard_optimizer": True, "shard_gradients": True}
Found = Counter[tuple[tuple[int, ...], str]]


class CountingTransport:
    """Notes the group of every collective, and the numbers that its ranks send (rings, as in plan/traffic.py)."""

    def __init__(self) -> None:
        self.counts: Found = Counter()
        self.numbers: Found = Counter()

    def _note(self, group: Group, kind: str, sent: int) -> None:
        self.counts[group.ranks, kind] += 1
        self.numbers[group.ranks, kind] += sent

    def all_reduce(self, group: Group) -> Callable[[Tensor], Tensor]:
        """See Transport."""

        def reduce(x: Tensor) -> Tensor:
            self._note(group, "sum", 2 * (x.size * (group.size - 1) // group.size))
            return x

        return reduce

    def reduce_scatter(self, group: Group) -> Callable[[Tensor], Tensor]:
        """See Transport."""

        def scatter(x: Tensor) -> Tensor:
            self._note(group, "scatter", x.size - x.size // group.size)
            return x[: x.shape[0] // group.size].copy()

        return scatter

    def all_gather(self, group: Group) -> Callable[[Tensor], Tensor]:
        """See Transport."""

        def gather(x: Tensor) -> Tensor:
            self._note(group, "gather", x.size * (group.size - 1))
            return ops.cat([x] * group.size, 0)

        return gather


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> CountingTransport:
    """In the place of a device's."""
    counting = CountingTransport()
    ms.set_context(mode=ms.GRAPH_MODE)
    monkeypatch.setattr(groups, "_name", lambda members: f"ranks {members}")
    monkeypatch.setattr(gradients, "eager_transport", lambda group: counting)
    monkeypatch.setattr(zero, "eager_transport", lambda group: counting)
    return counting


@pytest.mark.parametrize(
    ("config", "mesh"),
    [
        (CONFIG, {"dp": 2}),
        (CONFIG, {"dp": 4} | ZERO1),  # rows of 42 do not divide by 4
        (TIED, {"dp": 2, "pp": 2} | ZERO2),
        (CONFIG, {"cp": 2, "dp": 2, "tp": 2} | ZERO1),
        (CONFIG, {"dp": 2, "tp": 2, "sequence_parallel": True} | ZERO2),
        (CONFIG, {"tp": 4, "sequence_parallel": True, "vocab_parallel": False}),  # copies of key-value heads
    ],
)
def test_sums_of_gradients_are_those_that_the_trainer_takes(
    config: ModelConfig,
    mesh: dict[str, Any],
    transport: CountingTransport,
    random_weights: Callable[..., dict[str, npt.NDArray[np.float32]]],
) -> None:
    config = config.model_copy(update={"ffn_dim": 44}) if mesh.get("tp") == 4 else config
    parallel, whole = ParallelConfig(**mesh), random_weights(config)
    for stage in range(parallel.pp):
        rank = stage_rank(parallel, stage)
        shards = plan_shards(config, parallel, rank)
        replica = build_replica(config, parallel, rank)
        replica.weights.load(lambda name: np.ascontiguousarray(whole[name][shards[name].slices]))  # noqa: B023
        optimizer = replica.optimizer(beta1=0.9, beta2=0.9, eps=1e-5, weight_decay=0.0)
        transport.counts.clear()
        transport.numbers.clear()
        found = {name: Tensor(np.ones(shard.shape, np.float32)) for name, shard in shards.items()}
        for number in range(MICRO_BATCHES if parallel.shard_gradients else 0):
            for name in found:
                if split_layer(name)[1] is not None:  # as MeshBackprop._reduce does after each layer
                    scattered = replica.reduction.scatter(name, Tensor(np.ones(shards[name].shape, np.float32)))
                    found[name] = scattered if number == 0 else found[name] + scattered
        optimizer.step(replica.reduction.sum_gradients(found), 1e-3, 1.0)
        counted, numbers = planned(config, parallel, stage)
        assert transport.counts == counted
        assert transport.numbers == numbers


def planned(config: ModelConfig, parallel: ParallelConfig, stage: int) -> tuple[Found, Found]:
    """What `plan` says of a step's gradients and weights."""
    counts: Found = Counter()
    numbers: Found = Counter()
    for sums in count_sums(config, parallel, stage):
        kind = {"zero": "gather"}.get(sums.axis, "scatter" if "scatters" in sums.what else "sum")
        times = MICRO_BATCHES if sums.is_per_micro_batch else 1
        counts[sums.ranks, kind] += sums.count * times
        numbers[sums.ranks, kind] += int(sums.numbers) * times
    return counts, numbers


@pytest.mark.parametrize(("pp", "interleave", "micro_batches"), [(2, 1, 4), (4, 1, 8), (4, 2, 8), (2, 3, 2)])
def test_stages_hand_over_as_often_as_the_schedule_says(pp: int, interleave: int, micro_batches: int) -> None:
    config = CONFIG.model_copy(update={"n_layers": pp * interleave})
    work = TrainWorkload(config, ParallelConfig(pp=pp, interleave=interleave), 16, 1, micro_batches, "none")
    for stage, actions in enumerate(plan_pipeline(pp, interleave, micro_batches).actions):
        [found] = [part for part in step_traffic(work, find_device("cpu"), stage) if part.axis == "pp"]
        assert found.count == sum(action.kind in ("send", "receive") for action in actions)
        sends = sum(action.kind == "send" for action in actions)
        assert found.bytes_per_step == 4 * sends * 16 * config.dim


@pytest.mark.parametrize(
    ("preset", "mesh"),
    [
        ("llama3.1-8b", {"dp": 8} | ZERO1),
        ("llama3.1-70b", {"tp": 8, "pp": 8, "sequence_parallel": True}),
        (
            "llama3.1-405b",
            {"dp": 4, "tp": 8, "pp": 16, "sequence_parallel": True} | ZERO1,
        ),
    ],
)
def test_large_models_at_8_64_and_512_ranks(preset: str, mesh: dict[str, Any]) -> None:
    """A sum or scatter for each weight that a rank holds and shares, a gather for each that is split; all stages."""
    config, parallel = ModelConfig.preset(preset), ParallelConfig(**mesh)
    assert parallel.world_size in (8, 64, 512)
    for stage in range(parallel.pp):
        shards = plan_shards(config, parallel, stage_rank(parallel, stage)).values()
        split = [s for s in shards if s.optimizer_slices != s.slices]
        found = {(sums.axis, sums.what): sums for sums in count_sums(config, parallel, stage)}
        if parallel.dp > 1:
            gathers = found["zero", "gathers of weights"]
            assert gathers.count == len(split) == found["dp", "scatters of gradients"].count
            assert gathers.numbers == sum(prod(s.shape) for s in split) * (parallel.dp - 1) // parallel.dp
        norms = sum(len(s.full_shape) == 1 and "norm_out" not in s.name for s in shards)
        assert norms == (found["sp", "sums of whole weights' gradients"].count if parallel.sequence_parallel else norms)
