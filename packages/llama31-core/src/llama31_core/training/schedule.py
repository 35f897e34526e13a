"""Learning rates: step number in, learning rate out."""

from __future__ import annotations

import math
from typing import Literal

from llama31_core.errors import ConfigError

ScheduleType = Literal["CosineWithWarmUpLR", "ConstantWarmUpLR", "LinearWithWarmUpLR", "WarmUpStableDecayLR"]

_DECAY_SHARE = 0.1


def learning_rate(
    step: int, *, schedule: ScheduleType, peak: float, end: float, warmup_steps: int, total_steps: int
) -> float:
    """The learning rate of a step, counted from 0.

    It rises linearly from 0 to `peak` during `warmup_steps`, then stays (Constant), falls linearly (Linear) or falls
    along half a cosine (Cosine; Loshchilov and Hutter 2017, equation 5, one cycle) to `end` at `total_steps`.
    WarmUpStableDecay stays at `peak` and falls linearly during the last tenth of all steps (Hu et al. 2024, MiniCPM,
    section 4).
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "ConstantWarmUpLR":
        return peak
    if schedule == "WarmUpStableDecayLR":
        warmup_steps = max(warmup_steps, total_steps - math.ceil(total_steps * _DECAY_SHARE))
        if step < warmup_steps:
            return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    is_cosine = schedule == "CosineWithWarmUpLR"
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if is_cosine else 1 - progress
    return end + (peak - end) * remaining


def plan_warmup(warmup_steps: int | None, warmup_ratio: float | None, total_steps: int) -> int:
    """Warmup steps, given as a number, as a share of all steps, or not at all (0).

    Raises:
        ConfigError: both are given, or the warmup is longer than the run.
    """
    if warmup_steps is not None and warmup_ratio is not None:
        raise ConfigError("lr_schedule has both warmup_steps and warmup_ratio; keep one")
    steps = warmup_steps if warmup_steps is not None else int((warmup_ratio or 0.0) * total_steps)
    if steps > total_steps:
        raise ConfigError(f"lr_schedule.warmup_steps is {steps}, more than the {total_steps} steps of the run")
    return steps
