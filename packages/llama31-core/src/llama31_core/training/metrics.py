"""The metrics of a run: reports in, JSON Lines and TensorBoard's files out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama31_core.checkpoint.staging import staged_file, write_error
from llama31_core.errors import ConfigError, DatasetError
from llama31_core.training.report import EvalReport, StepReport

FILE_NAME = "metrics.jsonl"


class MetricsFile:
    """Appends a line a report to `metrics.jsonl`; `kind` is `step` or `eval`.

    Args:
        directory: that of the run; it is made.
        start_step: what a run that is resumed had done. Lines of later steps, which are taken again, go.
        decode: text of a sample's token ids.
    """

    def __init__(self, directory: Path, start_step: int, decode: Callable[[Sequence[int]], str] | None = None) -> None:
        path = directory / FILE_NAME
        kept = [row for row in read_metrics(path) if row["step"] <= start_step] if start_step else []
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with staged_file(path, overwrite=True) as part:
                part.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise write_error(path, error) from error
        self._decode = decode

    def on_step(self, report: StepReport) -> None:
        """Write its figures."""
        self._write({"kind": "step"} | report.metrics())

    def on_evaluation(self, report: EvalReport) -> None:
        """Write its figures, and the samples as text."""
        samples = [self._decode(ids) for ids in report.samples] if self._decode else []
        self._write({"kind": "eval"} | report.metrics() | ({"samples": samples} if samples else {}))

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")


class TensorBoard:
    """Writes scalars for TensorBoard: `train/loss`, `eval/perplexity` and the like.

    Raises:
        ConfigError: the extra is not installed.
    """

    def __init__(self, directory: Path, start_step: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "tensorboard.tensorboard_dir needs tensorboardX: pip install 'llama31-core[tensorboard]'"
            ) from error
        # What a killed run wrote of steps that are taken again is hidden.
        self._writer = SummaryWriter(str(directory), purge_step=start_step + 1 if start_step else None)

    def on_step(self, report: StepReport) -> None:
        """Write its figures."""
        self._write("train", report.step, report.metrics())

    def on_evaluation(self, report: EvalReport) -> None:
        """Write its figures."""
        self._write("eval", report.step, report.metrics())

    def _write(self, group: str, step: int, figures: dict[str, Any]) -> None:
        for name, value in figures.items():
            if name not in ("step", "num_steps"):
                self._writer.add_scalar(f"{group}/{name.removeprefix('eval_')}", float(value), step)
        self._writer.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; none if there is no file. A last line that a kill cut off is left out.

    Raises:
        DatasetError: it is something else.
    """
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise DatasetError(f"{path}:{number} is no JSON: {error}") from error
        if not isinstance(row, dict) or row.get("kind") not in ("step", "eval") or not isinstance(row.get("step"), int):
            raise DatasetError(f"{path}:{number} is no line of metrics, expected kind and step")
        rows.append(row)
    return rows
