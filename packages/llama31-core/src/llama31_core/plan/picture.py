"""Memory of every stage's ranks as a picture: a plan in, a PNG out. Needs the extra `plot`."""

from __future__ import annotations

from pathlib import Path

from llama31_core.checkpoint.staging import staged_file
from llama31_core.errors import ConfigError
from llama31_core.plan.hardware import GB
from llama31_core.plan.memory import MemoryUse
from llama31_core.plan.prediction import PredictionPlan
from llama31_core.plan.training import TrainingPlan

_COLORS = {
    "weights": "#4c72b0",
    "optimiser": "#8172b3",
    "average": "#937860",
    "gradients": "#dd8452",
    "activations": "#55a868",
    "kv cache": "#55a868",
    "work": "#c9c9c9",
}


def draw_memory(plan: TrainingPlan | PredictionPlan, title: str, path: Path) -> None:
    """Draw a bar for a rank of each stage, and the memory that there is.

    Raises:
        ConfigError: matplotlib is not installed.
        CheckpointError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"{path}: needs matplotlib: pip install 'llama31-core[plot]'") from error
    uses: list[MemoryUse] = (
        [stage.memory for stage in plan.stages] if isinstance(plan, TrainingPlan) else list(plan.stages)
    )
    each = plan.work.parallel.world_size // len(uses)
    labels = [f"{stage * each}-{(stage + 1) * each - 1}" if each > 1 else str(stage) for stage in range(len(uses))]
    figure = Figure(figsize=(max(6.0, 2.5 + 0.7 * len(uses)), 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    below = [0.0] * len(uses)
    for name, color in _COLORS.items():
        sizes = [use.parts.get(name, 0) / GB for use in uses]
        if any(sizes):
            axes.bar(range(len(uses)), sizes, bottom=below, label=name, color=color, width=0.7)
            below = [start + size for start, size in zip(below, sizes, strict=True)]
    for place, total in enumerate(below):
        axes.text(place, total, f"{total:.1f}", ha="center", va="bottom", fontsize=8)
    limit = plan.device.usable_bytes / GB
    axes.axhline(limit, color="#c44e52", linestyle="--", linewidth=1.2, label=f"usable: {limit:.1f}")
    axes.set_ylim(0, 1.25 * max(limit, *below))
    axes.set_xticks(range(len(uses)), labels)
    axes.set_xlabel("ranks")
    axes.set_ylabel("GB on a rank")
    axes.set_title(f"{title} on {plan.device.name}", fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center")
    axes.spines[["top", "right"]].set_visible(False)
    with staged_file(path, overwrite=True) as part:
        figure.savefig(part, format="png", metadata={"Software": None})
