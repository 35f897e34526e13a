"""A fine-tuning run: a RunConfig in; reports to observers, and a trained model directory, out."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import mindspore as ms
import numpy as np
import numpy.typing as npt

from llama31_core.checkpoint.staging import check_destination, staged_file
from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError, Llama31Error
from llama31_core.run_config import RunConfig
from llama31_core.training.batch import IGNORED_LABEL, Batch
from llama31_core.training.checkpoints import (
    AdapterFiles,
    Checkpoints,
    ModelFiles,
    TrainerState,
    load_average,
    load_checkpoint,
    whole,
)
from llama31_core.training.device import measure_flops_per_s, peak_memory_bytes
from llama31_core.training.ema import MovingAverage
from llama31_core.training.evaluation import evaluate
from llama31_core.training.flops import StepFlops
from llama31_core.training.generation import SampleGenerator
from llama31_core.training.head import Objective
from llama31_core.training.label_watch import LabelWatch
from llama31_core.training.loss_scale import LossScale
from llama31_core.training.ranks import Alone, Ranks
from llama31_core.training.report import EvalReport, Observer, StepReport
from llama31_core.training.run_plan import Pace, RunPlan
from llama31_core.training.start import check_room, check_run, open_data, plan_lora
from llama31_core.training.step import StepResult, TrainStep

_LOG = logging.getLogger(__name__)


class Trainer:
    """One run, on one device or as one rank of several.

    Everything that can be wrong is checked here, before the first step: configuration, data, weights, output.

    Args:
        run: the configuration.
        source: what messages call it.
        sample_prompts: token ids of what is completed at every evaluation.
        ranks: of the run; this process alone if None.

    Attributes:
        config: the model.
        num_steps: of the whole run.
        start_step: steps that were taken before; 0 unless the run is resumed.

    Raises:
        ConfigError, CheckpointError, DatasetError, RequestError: naming the file and key.
    """

    def __init__(
        self,
        run: RunConfig,
        source: str,
        sample_prompts: Sequence[Sequence[int]] = (),
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks or Alone()
        check_run(run, source, self._ranks.num_data_ranks * self._ranks.replica_size)
        self._run, self._source = run, source
        self._model_dir = Path(run.load_checkpoint)
        self.config = ModelConfig.from_pretrained(self._model_dir)
        run.model_section.check_against(self.config, source)
        place = (self._ranks.data_rank, self._ranks.num_data_ranks)
        self._dataset = open_data(run, run.train_dataset, self.config, run.runner_config.batch_size, *place)
        self._held_out = open_data(run, run.eval_dataset, self.config, 1, *place) if run.do_eval else None
        self._plan = RunPlan.of(run, self._dataset.batches_per_epoch, source)
        self.num_steps = self._plan.num_steps
        self._lora = plan_lora(run, self.config)
        self._output_dir = Path(run.output_dir) / ("model" if self._lora is None else "adapter")
        self._average_dir = self._output_dir.with_name(f"{self._output_dir.name}_ema")
        self._plan_output()
        self._build(sample_prompts)

    def _plan_output(self) -> None:
        """See that the results can be written, and find what to resume from."""
        run = self._run
        check_destination(self._output_dir)
        monitor = run.callbacks[0] if run.callbacks else None
        if self._lora is None:
            files, num_copies = ModelFiles(self._model_dir, self.config), 1
            if run.runner_wrapper.ema_decay is not None:
                check_destination(self._average_dir)
            if monitor is not None:
                num_copies += 3 * (monitor.keep_checkpoint_max + 1) + int(run.do_eval)
            check_room(self._output_dir, 4 * self.config.num_parameters * num_copies)
        else:
            files = AdapterFiles(self._model_dir, self.config, self._lora)
        self._files = files
        self._checkpoints = Checkpoints(
            Path(run.output_dir).absolute() / "checkpoints",
            files,
            keep=1 if monitor is None else monitor.keep_checkpoint_max,
            is_async=monitor is not None and monitor.async_save,
        )
        newest = self._checkpoints.newest()
        if newest is not None and not run.resume_training:
            raise ConfigError(
                f"output_dir: {newest} is there; set resume_training=True to go on from it, or another output_dir"
            )
        if newest is None and run.resume_training:
            _LOG.warning("there is no checkpoint in %s: the run begins at its first step", run.output_dir)
        self._resumed_from = newest

    def _build(self, sample_prompts: Sequence[Sequence[int]]) -> None:
        ms.set_context(mode=ms.GRAPH_MODE)
        run, wrapper = self._run, self._run.runner_wrapper
        self._weights = self._ranks.load_weights(run, self.config, self._lora, self._resumed_from)
        self._optimizer = self._ranks.build_optimizer(self._weights, run)
        objective = Objective(wrapper.label_smoothing, wrapper.z_loss)
        self._backprop = self._ranks.build_backprop(self._weights, objective, run.recompute_config.policy)
        self._step = TrainStep(
            self._backprop,
            self._optimizer,
            max_norm=wrapper.max_grad_norm if wrapper.use_clip_grad else None,
            loss_scale=LossScale(wrapper.loss_scale_value, wrapper.loss_scale_factor, wrapper.scale_window),
            reduction=self._ranks.reduction,
        )
        self._average = None if wrapper.ema_decay is None else MovingAverage(self._weights, wrapper.ema_decay)
        self._samples = None
        if sample_prompts:
            self._samples = SampleGenerator(self._weights, self._lora, sample_prompts, run.eval_max_tokens)
        self._flops = StepFlops.of(self.config, trains_weights=self._lora is None)
        self._pace = Pace()
        self.start_step = 0 if self._resumed_from is None else self._resume(self._resumed_from)
        patience = min(self._plan.steps_per_epoch, self.num_steps - self.start_step)
        self._labels = LabelWatch(run.train_dataset.data_loader.dataset_dir, patience)

    def _resume(self, checkpoint: Path) -> int:
        shapes = {name: tuple(moment.shape) for name, moment in self._optimizer.moments.items()}
        slices = self._ranks.slices if self._ranks.replica_size * self._ranks.num_data_ranks > 1 else whole
        moments, state = load_checkpoint(checkpoint, shapes, slices)
        for key, value in self._order().items():
            if state.order.get(key) != value:
                raise ConfigError(
                    f"{self._source}: {checkpoint} was made with {key} {state.order.get(key)}, the run has {value}; "
                    "the order of the data would differ, so set it back, or begin anew in another output_dir"
                )
        self._optimizer.load(moments, state.num_updates)
        self._step.loss_scale.value = state.loss_scale
        self._step.loss_scale.num_good_steps = state.num_good_steps
        if self._average is not None:
            shapes = {name: self._weights.shape(name) for name in self._optimizer.trained}
            self._average.load(load_average(checkpoint, shapes, slices))
        return state.step

    def _order(self) -> dict[str, int | None]:
        """What the order of the data follows from."""
        shuffled = self._run.train_dataset.data_loader.shuffle
        return {
            "seed": self._run.seed if shuffled else None,
            "num_records": self._dataset.num_records,
            "batch_size": self._run.runner_config.batch_size * self._ranks.num_data_ranks,
            "gradient_accumulation_steps": self._plan.accumulated,
        }

    def train(self, observers: Sequence[Observer] = (), should_stop: Callable[[], bool] = lambda: False) -> Path:
        """Run all steps and save the model.

        Args:
            observers: are told after every step and evaluation.
            should_stop: asked after every step; if it says so, a checkpoint is written and the run ends there.

        Returns:
            The model directory that was written, or the checkpoint of a run that was stopped.

        Raises:
            Llama31Error: the loss is no longer a number (the weights of the step before are not saved), or a
                checkpoint cannot be written.
        """
        if self._ranks.is_first:
            self._checkpoints.clean()
        batches = self._batches()
        if self.start_step == 0 and self._plan.evaluates_after(0):
            self._evaluate(0, observers)
        for done in range(self.start_step + 1, self.num_steps + 1):
            report = self._take_step(done - 1, [next(batches) for _ in range(self._plan.accumulated)])
            for observer in observers:
                observer.on_step(report)
            is_stopped = self._ranks.any(done < self.num_steps and should_stop())
            if not is_stopped and self._plan.evaluates_after(done):
                self._evaluate(done, observers)
            if is_stopped or self._plan.saves_after(done):
                self._save_checkpoint(done)
            if is_stopped:
                self._checkpoints.wait()
                self._ranks.any(False)  # until the first rank has written
                newest = self._checkpoints.newest()
                assert newest is not None
                return newest
        self._checkpoints.wait()
        if self._average is not None:
            self._save(self._average_dir, self._ranks.collect(self._average.arrays()))
        self._save(self._output_dir, self._results())
        return self._output_dir

    def _save(self, directory: Path, values: dict[str, npt.NDArray[np.float32]]) -> None:
        if self._ranks.is_first:
            self._files.save(directory, values, self.num_steps, {})
        self._ranks.any(False)  # no rank ends before the others have what they wait for

    def _batches(self) -> Iterator[Batch]:
        """From the first batch of `start_step` on; batches that do not fill a step at an epoch's end are left out."""
        epoch, done = divmod(self.start_step, self._plan.steps_per_epoch)
        while True:
            start = epoch * self._dataset.batches_per_epoch + done * self._plan.accumulated
            left = self._plan.steps_per_epoch - done
            yield from islice(self._dataset.batches(start), left * self._plan.accumulated)
            epoch, done = epoch + 1, 0

    def _take_step(self, index: int, batches: list[Batch]) -> StepReport:
        peak = measure_flops_per_s(self._weights.compute_dtype)
        started = time.perf_counter()
        scale, rate = self._step.loss_scale.value, self._plan.rate(index)
        result = self._step(batches, rate)
        self._check(index, batches, result)
        if self._average is not None and not result.is_overflow:
            self._average.update()
        elapsed_s = time.perf_counter() - started
        share = self._ranks.replica_size
        num_tokens = sum(batch.tokens.size for batch in batches) // share
        own_labels = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in batches)
        num_pairs = sum(int((batch.positions + 1).sum()) for batch in batches)
        flops = self._flops.count(num_tokens, own_labels / share, num_pairs / share)
        return StepReport(
            epoch=index // self._plan.steps_per_epoch + 1,
            step=index + 1,
            num_steps=self.num_steps,
            loss=result.loss,
            learning_rate=rate,
            grad_norm=result.grad_norm,
            step_time_s=elapsed_s,
            num_tokens=num_tokens,
            num_label_tokens=result.num_label_tokens,
            flops=flops if result.num_label_tokens else 0.0,  # a step without labels computes nothing
            peak_flops_per_s=peak,
            memory_bytes=peak_memory_bytes(),
            eta_s=self._pace.eta_s(elapsed_s, self.num_steps - index - 1),
            loss_scale=scale,
            is_overflow=result.is_overflow,
        )

    def _check(self, index: int, batches: list[Batch], result: StepResult) -> None:
        """See that there is something to go on with.

        Raises:
            Llama31Error: loss or gradients are no numbers; which records they come of is in a file.
        """
        self._labels.see(index + 1, result.num_label_tokens)
        is_scaled = self._run.runner_wrapper.loss_scale_factor > 1
        if math.isfinite(result.loss) and (is_scaled or not result.is_overflow):
            return
        records = [number for batch in batches for number in batch.record_numbers]
        data = self._run.train_dataset.data_loader.dataset_dir
        place = f"_data_rank_{self._ranks.data_rank}" if self._ranks.num_data_ranks > 1 else ""
        path = Path(self._run.output_dir) / f"stopped_at_step_{index + 1:08d}{place}.json"
        dump = {"step": index + 1, "loss": str(result.loss), "grad_norm": str(result.grad_norm), "data": data}
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(path, overwrite=True) as part:
            part.write_text(json.dumps(dump | {"records": records}, indent=2) + "\n", encoding="utf-8")
        raise Llama31Error(
            f"step {index + 1}: loss {result.loss} and gradient norm {result.grad_norm} are no numbers to go on with; "
            f"lower lr_schedule.learning_rate, or look at the records of this step, which {path} names"
        )

    def _evaluate(self, step: int, observers: Sequence[Observer]) -> None:
        assert self._held_out is not None
        sum_number = self._ranks.reduction.sum_number
        held_out = evaluate(self._backprop, self._held_out, self._run.runner_config.batch_size, sum_number)
        keeps_best = step > 0 and self._plan.save_steps > 0 and math.isfinite(held_out.loss)
        results = self._results() if keeps_best else {}
        is_best = bool(results) and self._checkpoints.save_best(results, step, held_out.loss)
        samples = () if self._samples is None else self._samples.generate()
        report = EvalReport(
            step, self.num_steps, held_out.loss, held_out.num_label_tokens, held_out.elapsed_s, is_best, samples
        )
        for observer in observers:
            observer.on_evaluation(report)

    def _results(self) -> dict[str, npt.NDArray[np.float32]]:
        """What is saved, on the rank that saves: all weights, or the changes alone."""
        if self._lora is None:
            return self._ranks.collect(dict(self._weights.arrays()))
        return {name: self._weights.tensors[name].asnumpy() for name in self._optimizer.trained}

    def _save_checkpoint(self, step: int) -> None:
        scale = self._step.loss_scale
        state = TrainerState(step, self._optimizer.num_updates, scale.value, scale.num_good_steps, self._order())
        own_moments = {name: moment.asnumpy() for name, moment in self._optimizer.moments.items()}
        moments, results = self._ranks.collect_moments(own_moments), self._results()
        average = None if self._average is None else self._ranks.collect(self._average.arrays())
        if self._ranks.is_first:
            self._checkpoints.save(results, moments, state, average)
