"""Speeds that others measured and published, to set beside what is predicted."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llama31_core.config import ModelConfig
from llama31_core.plan.training import TrainingPlan, plan_training
from llama31_core.run_config.training import RecomputePolicy

_SOURCE = "MindFormers, research/llama3_1 README, Atlas 900 A2 PoD"


@dataclass(frozen=True)
class Published:
    """A published speed of training.

    Attributes:
        axes: dp, cp, tp, pp.
        recompute: of the slowest stage in the file that it was measured with.
    """

    preset: str
    axes: tuple[int, int, int, int]
    seq_length: int
    tokens_per_s_device: float
    recompute: RecomputePolicy
    source: str


PUBLISHED = (
    Published("llama3.1-8b", (8, 1, 1, 1), 8192, 2703.0, "full", f"{_SOURCE}; its file recomputes whole layers"),
    Published(
        "llama3.1-70b",
        (1, 1, 8, 8),
        8192,
        337.0,
        "none",
        f"{_SOURCE}; its file recomputes parts in stages 0 to 4, nothing in the last, for which the others wait",
    ),
)


@dataclass(frozen=True)
class Comparison:
    """A published speed, and the one predicted for its layout and recomputation on the plan's device."""

    published: Published
    predicted_tokens_per_s_device: float

    @property
    def ratio(self) -> float:
        """Predicted over published."""
        return self.predicted_tokens_per_s_device / self.published.tokens_per_s_device


def compare(plan: TrainingPlan) -> Comparison | None:
    """The published speed of the plan's model on its mesh, if there is one."""
    parallel = plan.work.parallel
    for published in PUBLISHED:
        preset = ModelConfig.preset(published.preset)
        same = (plan.work.config.dim, plan.work.config.n_layers, plan.work.seq_length) == (
            preset.dim,
            preset.n_layers,
            published.seq_length,
        )
        if same and (parallel.dp, parallel.cp, parallel.tp, parallel.pp) == published.axes:
            as_published = plan_training(replace(plan.work, recompute=published.recompute), plan.device)
            return Comparison(published, as_published.tokens_per_s_device)
    return None
