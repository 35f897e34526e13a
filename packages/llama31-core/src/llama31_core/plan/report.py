"""A plan as text for a terminal, and as a JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama31_core.plan.hardware import GB, Device
from llama31_core.plan.prediction import PredictionPlan
from llama31_core.plan.published import compare
from llama31_core.plan.search import SearchResult
from llama31_core.plan.training import StagePlan, TrainingPlan
from llama31_core.plan.workload import PredictWorkload, TrainWorkload

_LISTED = 8
_LAYOUT_COLUMNS = (
    "dp", "cp", "tp", "pp", "micro-batches", "recomputed", "GB", "tokens/s/device", "MFU", "bubble",
)  # fmt: skip


def training_text(plan: TrainingPlan, source: str) -> str:
    """Memory, traffic, time and speed of a training step."""
    work, parallel = plan.work, plan.work.parallel
    shape = f"{parallel.dp} (dp) x {work.micro_batches} micro-batches of {work.batch_size} x {work.seq_length}"
    lines = [
        *_heading(work, plan.device, source),
        f"a step is {work.tokens_per_step:,} tokens, {shape}; recomputed: {work.recompute}",
        "",
        *_memory_table([(s.stage, s.layers, s.memory.parts) for s in plan.stages], plan.device),
        _verdict(plan.largest.memory.total, plan.largest.stage, plan.device) + f", at {plan.largest.memory.moment}",
        "",
        *_traffic_table(plan.slowest),
        "",
        *_time_table(plan),
        "",
        f"{plan.flops_per_token / 1e9:,.1f} GFLOP a token, {plan.seconds:,.2f} s a step, "
        f"{plan.tokens_per_s_device:,.0f} tokens/s/device, MFU {plan.mfu:.1%}, pipeline bubble {plan.bubble:.1%}",
    ]
    found = compare(plan)
    if found is not None:
        lines.append(
            f"published: {found.published.tokens_per_s_device:,.0f} tokens/s/device ({found.published.source}); "
            f"predicted for that: {found.predicted_tokens_per_s_device:,.0f}, {found.ratio:.2f} of it"
        )
    return "\n".join([*lines, "", *_assumptions(plan.device)])


def prediction_text(plan: PredictionPlan, source: str) -> str:
    """Memory, cache and speed of an engine."""
    work = plan.work
    layers = work.parallel.stage_layers(work.config)
    rows = [(i, len(layers[i]), memory.parts) for i, memory in enumerate(plan.stages)]
    largest = max(range(len(plan.stages)), key=lambda i: plan.stages[i].total)
    speeds = [("sequences", "tokens/s", "tokens/s each")]
    speeds += [(str(n), f"{rate:,.0f}", f"{rate / n:,.1f}") for n, rate in plan.decode.items()]
    lines = [
        *_heading(work, plan.device, source),
        "",
        *_memory_table(rows, plan.device),
        _verdict(plan.stages[largest].total, largest, plan.device),
        f"the cache holds {plan.cache_tokens:,} tokens ({work.num_blocks} blocks of {work.block_size}); "
        f"all free memory would hold {plan.free_cache_tokens:,}",
        "",
        f"decoding with {work.seq_length // 2:,} tokens behind each sequence",
        *_table(speeds),
        f"a prompt: {plan.prefill_tokens_per_s:,.0f} tokens/s in chunks of {work.chunk_tokens}; "
        f"{plan.flops_per_token / 1e9:,.1f} GFLOP a token without attention",
    ]
    return "\n".join([*lines, "", *_assumptions(plan.device)])


def search_text(result: SearchResult, device: Device, num_devices: int) -> str:
    """The fastest layouts, and why others were dropped."""
    head = f"layouts of {num_devices} {device.name}: {result.num_layouts:,} planned, {len(result.plans)} fit"
    rows: list[tuple[str, ...]] = [_LAYOUT_COLUMNS]
    rows += [_layout_row(plan) for plan in result.plans[:_LISTED]]
    lines = [head, *_table(rows)] if result.plans else [head]
    lines += [f"dropped {count:,}: {reason}" for reason, count in result.dropped.most_common()]
    if not result.plans and result.closest is not None:
        closest = result.closest
        row = ", ".join(f"{name} {value}" for name, value in zip(_LAYOUT_COLUMNS, _layout_row(closest), strict=True))
        lines.append(f"closest: {row}, of {closest.device.usable_bytes / GB:.1f} GB")
    return "\n".join(lines)


def training_json(plan: TrainingPlan) -> dict[str, Any]:
    """All figures; bytes and seconds."""
    found = compare(plan)
    return {
        **_json_heading(plan.work, plan.device),
        "seq_length": plan.work.seq_length,
        "batch_size": plan.work.batch_size,
        "micro_batches": plan.work.micro_batches,
        "recompute": plan.work.recompute,
        "fits": plan.fits,
        "stages": [
            {
                "stage": stage.stage,
                "layers": stage.layers,
                "memory_bytes": {**stage.memory.parts, "total": stage.memory.total},
                "moment": stage.memory.moment,
                "traffic": [
                    {"axis": t.axis, "what": t.what, "bytes": t.bytes_per_step, "count": t.count, "seconds": t.seconds}
                    for t in stage.traffic
                ],
                "micro_batch_seconds": stage.micro_batch_s,
                "step_seconds": stage.step_s,
            }
            for stage in plan.stages
        ],
        "bubble": plan.bubble,
        "flops_per_token": plan.flops_per_token,
        "seconds": plan.seconds,
        "tokens_per_s_device": plan.tokens_per_s_device,
        "mfu": plan.mfu,
        "published": None
        if found is None
        else {
            "tokens_per_s_device": found.published.tokens_per_s_device,
            "source": found.published.source,
            "recompute": found.published.recompute,
            "predicted_tokens_per_s_device": found.predicted_tokens_per_s_device,
        },
    }


def prediction_json(plan: PredictionPlan) -> dict[str, Any]:
    """All figures; bytes and seconds."""
    return {
        **_json_heading(plan.work, plan.device),
        "seq_length": plan.work.seq_length,
        "fits": plan.fits,
        "stages": [
            {"stage": i, "memory_bytes": {**memory.parts, "total": memory.total}}
            for i, memory in enumerate(plan.stages)
        ],
        "cache_tokens": plan.cache_tokens,
        "free_cache_tokens": plan.free_cache_tokens,
        "decode_tokens_per_s": {str(batch): rate for batch, rate in plan.decode.items()},
        "prefill_tokens_per_s": plan.prefill_tokens_per_s,
        "flops_per_token": plan.flops_per_token,
    }


def search_json(result: SearchResult) -> dict[str, Any]:
    """The fastest layouts, and why others were dropped."""
    return {
        "layouts": result.num_layouts,
        "dropped": dict(result.dropped),
        "best": [training_json(plan) for plan in result.plans[:_LISTED]],
    }


def _heading(work: TrainWorkload | PredictWorkload, device: Device, source: str) -> list[str]:
    parallel = work.parallel
    mesh = f"pp={parallel.pp} x dp={parallel.dp} x cp={parallel.cp} x tp={parallel.tp}"
    return [
        f"{source} on {device.title}",
        f"{work.config.num_parameters:,} parameters over {mesh} = {parallel.world_size} devices",
    ]


def _json_heading(work: TrainWorkload | PredictWorkload, device: Device) -> dict[str, Any]:
    return {
        "device": device.name,
        "usable_bytes": device.usable_bytes,
        "constants": dict(device.sources),
        "parameters": work.config.num_parameters,
        "parallel": work.parallel.model_dump(mode="json"),
    }


def _memory_table(rows: Sequence[tuple[int, int, dict[str, int]]], device: Device) -> list[str]:
    names = list(dict.fromkeys(name for _, _, parts in rows for name in parts))
    table = [("stage", "layers", *names, "GB")]
    for stage, layers, parts in rows:
        sizes = [parts.get(name, 0) for name in names]
        table.append((str(stage), str(layers), *(f"{size / GB:.2f}" for size in (*sizes, sum(sizes)))))
    return [f"memory of a rank in GB, of {device.usable_bytes / GB:.1f} usable", *_table(table)]


def _verdict(total: int, stage: int, device: Device) -> str:
    room = (device.usable_bytes - total) / GB
    return (
        f"fits, stage {stage} leaves {room:.1f} GB"
        if room >= 0
        else f"DOES NOT FIT: stage {stage} lacks {-room:.1f} GB"
    )


def _traffic_table(stage: StagePlan) -> list[str]:
    if not stage.traffic:
        return ["nothing is sent"]
    rows = [("axis", "what", "GB", "collectives", "s")]
    rows += [
        (t.axis, t.what, f"{t.bytes_per_step / GB:,.2f}", f"{t.count:,}", f"{t.seconds:,.2f}") for t in stage.traffic
    ]
    return [f"sent by a rank of stage {stage.stage} in a step", *_table(rows)]


def _time_table(plan: TrainingPlan) -> list[str]:
    stage, count = plan.slowest, plan.work.micro_batches
    parts = {name: seconds * count for name, seconds in stage.micro_batch_s.items()}
    if plan.bubble:
        parts["bubble"] = sum(parts.values()) * plan.bubble / (1 - plan.bubble)
    parts |= {f"{name} (once)": seconds for name, seconds in stage.step_s.items()}
    total = sum(parts.values())
    rows = [("what", "s", "share"), *((name, f"{s:,.2f}", f"{s / total:.1%}") for name, s in parts.items())]
    return [f"a step of stage {stage.stage}, the slowest", *_table(rows)]


def _layout_row(plan: TrainingPlan) -> tuple[str, ...]:
    work, parallel = plan.work, plan.work.parallel
    sizes = (str(parallel.dp), str(parallel.cp), str(parallel.tp), str(parallel.pp))
    batches = f"{work.micro_batches} x {work.batch_size}"
    memory = f"{plan.largest.memory.total / GB:.1f}"
    return (
        *sizes,
        batches,
        work.recompute,
        memory,
        f"{plan.tokens_per_s_device:,.0f}",
        f"{plan.mfu:.1%}",
        f"{plan.bubble:.1%}",
    )


def _assumptions(device: Device) -> list[str]:
    shares = device.efficiency
    return [
        f"constants of {device.name}:",
        *(f"  {value}: {source}" for value, source in device.sources),
        f"assumed: products reach {shares.products:.0%} of the rate, attention {shares.attention:.0%}, memory "
        f"{shares.memory:.0%}, links {shares.links:.0%}; nothing overlaps; gradients have their weight's type, AdamW's "
        f"moments are float32, there is no copy of the weights",
    ]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of words to the left, of numbers to the right."""
    columns = list(zip(*rows, strict=True))
    lines = []
    for row in rows:
        cells = []
        for cell, column in zip(row, columns, strict=True):
            width = max(map(len, column))
            cells.append(cell.rjust(width) if column[-1][:1].isdigit() else cell.ljust(width))
        lines.append("  " + "  ".join(cells).rstrip())
    return lines
