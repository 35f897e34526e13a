"""The collectives within layers that `plan` counts beside those that the trainer's graphs really run.

Forward and backward of a rank run for real, with a transport that has nobody at the other end: every collective is an
operator that counts when it is executed, so that what MindSpore drops from a graph is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
import numpy.typing as npt
import pytest
from mindspore import Tensor, ops

from llama31_core.config import ModelConfig
from llama31_core.parallel import ParallelConfig, backprop, collectives, gradients, groups, ring, vocabulary
from llama31_core.parallel.groups import Group
from llama31_core.parallel.replica import build_replica
from llama31_core.plan import TrainWorkload, find_device
from llama31_core.plan.counts import stage_rank
from llama31_core.plan.traffic import step_traffic
from llama31_core.training.batch import Batch
from llama31_core.training.head import Objective

SEQ_LENGTH, MICRO_BATCHES = 32, 2
CONFIG = ModelConfig(vocab_size=96, dim=32, n_layers=4, n_heads=8, n_kv_heads=2, ffn_dim=48, max_seq_len=SEQ_LENGTH)


class CountingTransport:
    """Notes, when they run, the axis of every collective, and the numbers that its ranks send.

    Args:
        axes: "tp" or "cp" by group.
    """

    def __init__(self, axes: dict[tuple[int, ...], str]) -> None:
        self._axes = axes
        self.counts: Counter[str] = Counter()
        self.numbers: dict[str, float] = Counter()  # type: ignore[assignment]

    def _noting(
        self,
        group: Group,
        sent: Callable[[int], float],
        compute: Callable[[npt.NDArray[Any]], npt.NDArray[Any]],
        shape: Callable[[Any], Any] = lambda x: x,
    ) -> Callable[[Tensor], Tensor]:
        axis = self._axes.get(group.ranks)

        def run(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
            if axis is not None:
                self.counts[axis] += 1
                self.numbers[axis] += sent(x.size)
            return compute(x)

        return ops.Custom(run, out_shape=shape, out_dtype=lambda x: x, func_type="pyfunc")  # type: ignore[no-any-return]

    def all_reduce(self, group: Group) -> Callable[[Tensor], Tensor]:
        """See Transport."""
        return self._noting(group, lambda size: 2 * size * (group.size - 1) / group.size, np.copy)

    def all_reduce_max(self, group: Group) -> Callable[[Tensor], Tensor]:
        """See Transport."""
        return self.all_reduce(group)

    def reduce_scatter(self, group: Group) -> Callable[[Tensor], Tensor]:
        """See Transport."""
        return self._noting(
            group,
            lambda size: size * (group.size - 1) / group.size,
            lambda x: x[: x.shape[0] // group.size].copy(),
            lambda shape: [shape[0] // group.size, *shape[1:]],
        )

    def all_gather(self, group: Group) -> Callable[[Tensor], Tensor]:
        """See Transport."""
        return self._noting(
            group,
            lambda size: size * (group.size - 1),
            lambda x: np.concatenate([x] * group.size),
            lambda shape: [shape[0] * group.size, *shape[1:]],
        )

    def shift(self, group: Group, distance: int) -> Callable[[Tensor], Tensor]:
        """See Transport."""
        return self._noting(group, float, np.copy)

    def hand_over(self, group: Group, sender: int) -> Callable[[Tensor], Tensor]:
        """See Transport."""
        return lambda x: x


def batch() -> Batch:
    """One sequence, every token of which has a label."""
    tokens = np.arange(SEQ_LENGTH, dtype=np.int32)[None] % CONFIG.vocab_size
    return Batch.unpacked(tokens, tokens)


MESHES: list[dict[str, Any]] = [
    {"tp": 2},
    {"tp": 2, "vocab_parallel": False},
    {"tp": 2, "sequence_parallel": True},
    {"tp": 2, "sequence_parallel": True, "vocab_parallel": False},
    {"tp": 2, "pp": 2, "sequence_parallel": True},
    {"cp": 2},
    {"cp": 4, "tp": 2, "sequence_parallel": True},
]
_IN_CI = {(4, "none"), (6, "full")}
CASES = [
    pytest.param(mesh, recompute, marks=[] if (number, recompute) in _IN_CI else [pytest.mark.slow])
    for number, mesh in enumerate(MESHES)
    for recompute in ("none", "select", "full")
]


@pytest.mark.parametrize(("mesh", "recompute"), CASES)
def test_layers_send_what_plan_counts(
    mesh: dict[str, Any],
    recompute: Any,
    monkeypatch: pytest.MonkeyPatch,
    random_weights: Callable[..., dict[str, npt.NDArray[np.float32]]],
) -> None:
    parallel, whole = ParallelConfig(**mesh), random_weights(CONFIG)
    work = TrainWorkload(CONFIG, parallel, SEQ_LENGTH, 1, MICRO_BATCHES, recompute)
    ms.set_context(mode=ms.GRAPH_MODE)
    monkeypatch.setattr(groups, "_name", lambda members: f"ranks {members}")
    for stage in range(parallel.pp):
        rank = stage_rank(parallel, stage)
        transport = CountingTransport({tuple(parallel.group(axis, rank)): axis for axis in ("tp", "cp")})
        for module in (backprop, collectives, gradients, ring, vocabulary):
            monkeypatch.setattr(module, "transport", lambda: transport)  # noqa: B023
        replica = build_replica(CONFIG, parallel, rank)
        replica.weights.load(lambda name: np.ascontiguousarray(whole[name][replica.shards[name].slices]))  # noqa: B023
        part = replica.backprop(Objective(), recompute)
        monkeypatch.setattr(part, "_sum_over_replica", lambda loss: loss)
        part.accumulate([batch()] * MICRO_BATCHES, 1.0)
        planned = {
            "tp" if traffic.axis == "sp" else traffic.axis: traffic
            for traffic in step_traffic(work, find_device("cpu"), stage)
            if traffic.is_per_micro_batch and traffic.axis in ("tp", "sp", "cp")
        }
        assert transport.counts == {axis: traffic.count for axis, traffic in planned.items()}
        sent_bytes = {axis: traffic.bytes_per_step for axis, traffic in planned.items()}
        assert {axis: 4 * numbers for axis, numbers in transport.numbers.items()} == pytest.approx(sent_bytes)
