"""What a run will do, step by step: its configuration and the size of its data in, numbers of steps out. No tensors."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from llama31_core.errors import ConfigError
from llama31_core.parallel.schedule import check_micro_batches
from llama31_core.run_config import RunConfig
from llama31_core.training.schedule import learning_rate, plan_warmup

_LOG = logging.getLogger(__name__)
_PACE_SHARE = 0.2


@dataclass(frozen=True)
class RunPlan:
    """The steps of a run.

    Attributes:
        num_steps: of the whole run.
        accumulated: micro-batches of a step.
        steps_per_epoch: whole steps that an epoch's data fills.
        save_steps, eval_steps: a checkpoint, an evaluation every so many steps; 0 for none.
    """

    run: RunConfig
    num_steps: int
    accumulated: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    save_steps: int
    eval_steps: int

    @classmethod
    def of(cls, run: RunConfig, batches_per_epoch: int, source: str) -> RunPlan:
        """The plan of a run over data of so many micro-batches.

        Raises:
            ConfigError: the data does not fill a step, or the warmup does not fit.
        """
        runner, schedule = run.runner_config, run.lr_schedule
        accumulated = runner.gradient_accumulation_steps
        if run.parallel.pp > 1:
            accumulated *= run.parallel_config.micro_batch_num
            check_micro_batches(run.parallel.pp, run.parallel.interleave, accumulated)
        steps_per_epoch = batches_per_epoch // accumulated
        if not steps_per_epoch:
            raise ConfigError(
                f"{source}: runner_config.gradient_accumulation_steps is {accumulated}, the data has "
                f"{batches_per_epoch} batches an epoch; lower one of them"
            )
        all_steps = runner.epochs * steps_per_epoch
        num_steps = min(all_steps, runner.max_steps or all_steps)
        if runner.max_steps is not None and runner.max_steps > all_steps:
            _LOG.warning("the data ends after %d steps, before runner_config.max_steps", all_steps)
        total_steps = num_steps if schedule.total_steps == -1 else schedule.total_steps
        warmup_steps = plan_warmup(schedule.warmup_steps, schedule.warmup_ratio, total_steps)
        save_steps = run.callbacks[0].save_checkpoint_steps if run.callbacks else 0
        by_epochs = run.eval_epoch_interval * steps_per_epoch
        eval_steps = (run.eval_step_interval if run.eval_step_interval > 0 else by_epochs) if run.do_eval else 0
        return cls(run, num_steps, accumulated, steps_per_epoch, total_steps, warmup_steps, save_steps, eval_steps)

    def rate(self, index: int) -> float:
        """The learning rate of step `index`, counted from 0."""
        schedule = self.run.lr_schedule
        return learning_rate(
            index,
            schedule=schedule.type,
            peak=schedule.learning_rate,
            end=schedule.lr_end,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
        )

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due after so many steps."""
        return self.save_steps > 0 and step % self.save_steps == 0

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation is due: before the first step, every `eval_steps`, and after the last."""
        return self.eval_steps > 0 and (step % self.eval_steps == 0 or step == self.num_steps)


class Pace:
    """How long a step takes: the latest ones weigh most, and the first one, which compiles, nothing."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._mean_s = 0.0

    def eta_s(self, step_time_s: float, steps_left: int) -> float:
        """Take note of a step's time; gives that of the steps to come."""
        self._num_steps += 1
        share = _PACE_SHARE if self._num_steps > 2 else 1.0
        self._mean_s += share * (step_time_s - self._mean_s)
        return self._mean_s * steps_left
