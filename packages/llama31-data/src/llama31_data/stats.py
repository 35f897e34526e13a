"""An output in, its figures out: how long samples are, how much of them is trained on, how full records are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama31_data.errors import DataError
from llama31_data.manifest import Manifest, check_files, load_manifest
from llama31_data.reader import read_records, samples_of

_PERCENTILES = (50, 90, 99)
_BINS = 50


def collect_stats(output: Path, progress: Callable[[int], object] = lambda records: None) -> dict[str, Any]:
    """Reads every record of an output.

    Raises:
        DataError: no complete output there.
    """
    manifest = load_manifest(output)
    check_files(output, manifest, hashes=False)
    lengths, labels, samples_a_record = Counter[int](), Counter[int](), Counter[int]()
    for record in read_records(output, manifest):
        samples = samples_of(record, manifest.pad_token_id)
        samples_a_record[len(samples)] += 1
        for sample in samples:
            lengths[len(sample.ids)] += 1
            labels[int(sample.trained.sum())] += 1
        progress(1)
    return {
        "name": output.name,
        **_of_manifest(manifest),
        "sample_tokens": _distribution(lengths),
        "sample_label_tokens": _distribution(labels),
        "samples_a_record": _distribution(samples_a_record),
    }


def _of_manifest(manifest: Manifest) -> dict[str, Any]:
    return {
        "layout": manifest.layout,
        "template": manifest.template,
        "seq_length": manifest.seq_length,
        "records": manifest.num_records,
        "fill_rate": manifest.fill_rate,
        "counts": manifest.counts,
    }


def _distribution(counts: Counter[int]) -> dict[str, Any]:
    """Least, mean, percentiles, greatest, and a histogram of at most 50 bins of equal width."""
    values = np.array(sorted(counts), np.int64)
    weights = np.array([counts[value] for value in values], np.int64)
    width = max(1, -(-(int(values[-1]) + 1) // _BINS))
    bins = np.bincount(values // width, weights=weights).astype(int)
    return {
        "min": int(values[0]),
        "mean": round(float((values * weights).sum() / weights.sum()), 2),
        **{f"p{percent}": _percentile(values, weights, percent) for percent in _PERCENTILES},
        "max": int(values[-1]),
        "histogram": {"bin_width": width, "counts": bins.tolist()},
    }


def _percentile(values: NDArray[np.int64], weights: NDArray[np.int64], percent: int) -> int:
    """The least value that so many percent of all are not above (nearest rank)."""
    return int(values[np.searchsorted(np.cumsum(weights), percent / 100 * weights.sum())])


def plot_stats(stats: dict[str, Any], path: Path) -> None:
    """Draws the two histograms side by side into a PNG.

    Raises:
        DataError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError(f"{path}: needs matplotlib: pip install 'llama31-data[plot]'") from error
    figure = Figure(figsize=(11, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{stats['name']}: {stats['counts']['samples']:,} samples in {stats['records']:,} records, "
        f"{stats['layout']} at {stats['seq_length']:,}, {stats['fill_rate']:.1%} full"
    )
    panels = (("sample_tokens", "tokens a sample", "tab:blue"), ("sample_label_tokens", "trained tokens", "tab:green"))
    for axes, (name, label, colour) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        found = stats[name]
        width, counts = found["histogram"]["bin_width"], found["histogram"]["counts"]
        axes.bar(np.arange(len(counts)) * width, counts, width, align="edge", color=colour)
        for percent in _PERCENTILES:
            axes.axvline(found[f"p{percent}"], color="0.3", linestyle=":", linewidth=1)
            axes.annotate(f"p{percent}", (found[f"p{percent}"], 1), xycoords=("data", "axes fraction"), fontsize=8)
        axes.set_xlabel(f"{label} (mean {found['mean']:,.1f}, max {found['max']:,})")
        axes.set_ylabel("samples")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, format="png", metadata={"Software": None})
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error
