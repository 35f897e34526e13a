"""The course of a run as a picture: rows of metrics in, a PNG out. Needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from llama31_core.checkpoint.staging import staged_file
from llama31_core.errors import ConfigError, DatasetError

_SMOOTHED_OVER = 20  # parts of the run
_PANELS = (
    ("loss", "loss"),
    ("learning_rate", "learning rate"),
    ("grad_norm", "gradient norm (before clipping)"),
    ("tokens_per_s", "tokens/s/device"),
)


def plot_metrics(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw loss (held-out too), learning rate, gradient norm and speed over the steps.

    Raises:
        ConfigError: matplotlib is not installed.
        DatasetError: there are no steps.
        CheckpointError: the file cannot be written.
    """
    steps = [row for row in rows if row["kind"] == "step"]
    if not steps:
        raise DatasetError(f"{title}: there is no step in the metrics; train first")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"{path}: needs matplotlib: pip install 'llama31-core[plot]'") from error
    figure = Figure(figsize=(11, 7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    numbers = [row["step"] for row in steps]
    for axes, (key, label) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        values = [row[key] for row in steps]
        if key == "tokens_per_s":
            axes.plot(numbers[1:] or numbers, values[1:] or values, color="tab:green")  # the first step compiles
            axes.set_ylim(bottom=0)
        elif key == "loss":
            _plot_losses(axes, numbers, values, [row for row in rows if row["kind"] == "eval"])
        else:
            axes.plot(numbers, values, color="tab:blue")
        axes.set_xlabel("step")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    with staged_file(path, overwrite=True) as part:
        figure.savefig(part, format="png", metadata={"Software": None})


def _plot_losses(axes: Any, numbers: Sequence[int], losses: Sequence[float], evaluations: Sequence[Any]) -> None:
    axes.plot(numbers, losses, color="tab:blue", alpha=0.35, label="of each step")
    width = max(1, len(losses) // _SMOOTHED_OVER)
    if width > 1:
        means = [fmean(losses[max(0, i - width) : i]) for i in range(1, len(losses) + 1)]
        axes.plot(numbers, means, color="tab:blue", label=f"mean of {width} steps")
    if evaluations:
        points = [(row["step"], row["eval_loss"]) for row in evaluations]
        axes.plot(*zip(*points, strict=True), color="tab:red", marker="o", label="held out")
    axes.legend(frameon=False, fontsize=8)
