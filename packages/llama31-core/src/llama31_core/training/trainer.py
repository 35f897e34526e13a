"""A fine-tuning run: a RunConfig in; a log line a step, and a trained model directory, out."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import mindspore as ms
import numpy as np
import numpy.typing as npt

from llama31_core.checkpoint import check_weights, open_weights
from llama31_core.checkpoint.dtypes import Array
from llama31_core.checkpoint.staging import check_destination
from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError, Llama31Error
from llama31_core.lora.adapter import read_adapter
from llama31_core.run_config import RunConfig
from llama31_core.training.attention import BlockwiseAttention
from llama31_core.training.backprop import Backprop
from llama31_core.training.batch import Batch
from llama31_core.training.block import Recompute
from llama31_core.training.checkpoints import AdapterFiles, Checkpoints, ModelFiles, TrainerState, load_checkpoint
from llama31_core.training.dataset import MindRecordDataset
from llama31_core.training.head import Objective
from llama31_core.training.lora import (
    Lora,
    LoraTrainedLayers,
    adapted_modules,
    adapter_values,
    first_values,
    is_change,
)
from llama31_core.training.loss_scale import LossScale
from llama31_core.training.optim import AdamW
from llama31_core.training.report import StepReport
from llama31_core.training.schedule import learning_rate, plan_warmup
from llama31_core.training.start import check_room, finite
from llama31_core.training.step import TrainStep
from llama31_core.training.weights import TrainedWeights

_LOG = logging.getLogger(__name__)


class Trainer:
    """One run on one device.

    Everything that can be wrong is checked here, before the first step: configuration, data, weights, output.

    Attributes:
        config: the model.
        num_steps: of the whole run.
        start_step: steps that were taken before; 0 unless the run is resumed.

    Raises:
        ConfigError, CheckpointError, DatasetError: naming the file and key.
    """

    def __init__(self, run: RunConfig, source: str) -> None:
        if not run.load_checkpoint:
            raise ConfigError(f"{source}: load_checkpoint is empty; set it to a model directory")
        if not run.train_dataset.data_loader.dataset_dir:
            raise ConfigError(f"{source}: train_dataset.data_loader.dataset_dir is empty; set it to MindRecord data")
        if run.parallel.world_size != 1:
            raise ConfigError(
                f"{source}: parallel_config makes {run.parallel.world_size} ranks, this trains on one; "
                f"set use_parallel=False"
            )
        self._run, self._source = run, source
        self._model_dir = Path(run.load_checkpoint)
        self.config = ModelConfig.from_pretrained(self._model_dir)
        run.model_section.check_against(self.config, source)
        self._dataset = self._open_dataset()
        self._accumulated = run.runner_config.gradient_accumulation_steps
        self._steps_per_epoch = self._dataset.batches_per_epoch // self._accumulated
        if not self._steps_per_epoch:
            raise ConfigError(
                f"{source}: runner_config.gradient_accumulation_steps is {self._accumulated}, the data has "
                f"{self._dataset.batches_per_epoch} batches an epoch; lower one of them"
            )
        all_steps = run.runner_config.epochs * self._steps_per_epoch
        self.num_steps = min(all_steps, run.runner_config.max_steps or all_steps)
        if run.runner_config.max_steps is not None and run.runner_config.max_steps > all_steps:
            _LOG.warning("the data ends after %d steps, before runner_config.max_steps", all_steps)
        schedule = run.lr_schedule
        self._total_steps = self.num_steps if schedule.total_steps == -1 else schedule.total_steps
        self._warmup_steps = plan_warmup(schedule.warmup_steps, schedule.warmup_ratio, self._total_steps)
        self._lora = self._plan_lora()
        self._output_dir = Path(run.output_dir) / ("model" if self._lora is None else "adapter")
        if self._lora is None:
            self._files = ModelFiles(self._model_dir, self.config)
        else:
            self._files = AdapterFiles(self._model_dir, self.config, self._lora)
        self._plan_output()
        self._build()

    def _plan_lora(self) -> Lora | None:
        pet = self._run.model_section.pet_config
        if pet is None:
            return None
        return Lora(adapted_modules(pet.target_modules, self.config.n_layers), pet.lora_rank, pet.lora_alpha)

    def _open_dataset(self) -> MindRecordDataset:
        run = self._run
        return MindRecordDataset(
            run.train_dataset.data_loader.dataset_dir,
            self.config,
            seq_length=run.model_section.seq_length,
            batch_size=run.runner_config.batch_size,
            seed=run.seed if run.train_dataset.data_loader.shuffle else None,
            num_workers=run.train_dataset.num_parallel_workers,
        )

    def _plan_output(self) -> None:
        """See that the results can be written, and find what to resume from."""
        check_destination(self._output_dir)
        monitor = self._run.callbacks[0] if self._run.callbacks else None
        num_copies = 1 if monitor is None else 1 + 3 * (monitor.keep_checkpoint_max + 1)
        if self._lora is None:
            check_room(self._output_dir, 4 * self.config.num_parameters * num_copies)
        self._save_steps = 0 if monitor is None else monitor.save_checkpoint_steps
        self._checkpoints = Checkpoints(
            Path(self._run.output_dir).absolute() / "checkpoints",
            self._files,
            keep=1 if monitor is None else monitor.keep_checkpoint_max,
            is_async=monitor is not None and monitor.async_save,
        )
        newest = self._checkpoints.newest()
        if newest is not None and not self._run.resume_training:
            raise ConfigError(
                f"output_dir: {newest} is there; set resume_training=True to go on from it, or another output_dir"
            )
        if newest is None and self._run.resume_training:
            _LOG.warning("there is no checkpoint in %s: the run begins at its first step", self._run.output_dir)
        self._resumed_from = newest

    def _build(self) -> None:
        ms.set_context(mode=ms.GRAPH_MODE)
        run, wrapper = self._run, self._run.runner_wrapper
        layers = None if self._lora is None else LoraTrainedLayers(self._lora)
        self._weights = TrainedWeights(self.config, BlockwiseAttention, layers)
        self._load_weights()
        beta1, beta2 = run.optimizer.moments
        decay = run.optimizer.weight_decay
        self._optimizer = AdamW(self._weights, beta1=beta1, beta2=beta2, eps=run.optimizer.eps, weight_decay=decay)
        recompute: Recompute = "select" if run.recompute_config.select_recompute else "none"
        recompute = "full" if run.recompute_config.recompute else recompute
        objective = Objective(wrapper.label_smoothing, wrapper.z_loss)
        self._step = TrainStep(
            Backprop(self._weights, objective, recompute),
            self._optimizer,
            max_norm=wrapper.max_grad_norm if wrapper.use_clip_grad else None,
            loss_scale=LossScale(wrapper.loss_scale_value, wrapper.loss_scale_factor, wrapper.scale_window),
        )
        self.start_step = 0 if self._resumed_from is None else self._resume(self._resumed_from)

    def _load_weights(self) -> None:
        resumed, lora = self._resumed_from, self._lora
        with open_weights(self._model_dir if resumed is None or lora is not None else resumed) as weights:
            check_weights(weights, self.config)
            read = finite(weights)
            if lora is None:
                self._weights.load(read)
                return
            adapter = None if resumed is None else read_adapter(resumed)

            def read_changed(name: str) -> Array:
                if not is_change(name):
                    return read(name)
                if adapter is None:
                    return first_values(name, self._weights.shape(name), self._run.seed)
                return adapter_values(adapter, lora, name)

            self._weights.load(read_changed)

    def _resume(self, checkpoint: Path) -> int:
        shapes = {name: tuple(moment.shape) for name, moment in self._optimizer.moments.items()}
        moments, state = load_checkpoint(checkpoint, shapes)
        for key, value in self._order().items():
            if state.order.get(key) != value:
                raise ConfigError(
                    f"{self._source}: {checkpoint} was made with {key} {state.order.get(key)}, the run has {value}; "
                    "the order of the data would differ, so set it back, or begin anew in another output_dir"
                )
        self._optimizer.load(moments, state.num_updates)
        self._step.loss_scale.value = state.loss_scale
        self._step.loss_scale.num_good_steps = state.num_good_steps
        return state.step

    def _order(self) -> dict[str, int | None]:
        """What the order of the data follows from."""
        shuffled = self._run.train_dataset.data_loader.shuffle
        return {
            "seed": self._run.seed if shuffled else None,
            "num_records": self._dataset.num_records,
            "batch_size": self._run.runner_config.batch_size,
            "gradient_accumulation_steps": self._accumulated,
        }

    def train(self, report: Callable[[StepReport], None], should_stop: Callable[[], bool] = lambda: False) -> Path:
        """Run all steps and save the model.

        Args:
            report: called after every step.
            should_stop: asked after every step; if it says so, a checkpoint is written and the run ends there.

        Returns:
            The model directory that was written, or the checkpoint of a run that was stopped.

        Raises:
            Llama31Error: the loss is no longer a number (the weights of the step before are not saved), or a
                checkpoint cannot be written.
        """
        self._checkpoints.clean()
        batches = self._batches()
        for index in range(self.start_step, self.num_steps):
            report(self._take_step(index, [next(batches) for _ in range(self._accumulated)]))
            done = index + 1
            is_stopped = should_stop() and done < self.num_steps
            if is_stopped or (self._save_steps and done % self._save_steps == 0):
                self._save_checkpoint(done)
            if is_stopped:
                self._checkpoints.wait()
                newest = self._checkpoints.newest()
                assert newest is not None
                return newest
        self._checkpoints.wait()
        self._files.save(self._output_dir, self._results(), self.num_steps, {})
        return self._output_dir

    def _batches(self) -> Iterator[Batch]:
        """From the first batch of `start_step` on; batches that do not fill a step at an epoch's end are left out."""
        epoch, done = divmod(self.start_step, self._steps_per_epoch)
        while True:
            start = epoch * self._dataset.batches_per_epoch + done * self._accumulated
            yield from islice(self._dataset.batches(start), (self._steps_per_epoch - done) * self._accumulated)
            epoch, done = epoch + 1, 0

    def _take_step(self, index: int, batches: list[Batch]) -> StepReport:
        schedule = self._run.lr_schedule
        started = time.perf_counter()
        rate = learning_rate(
            index,
            schedule=schedule.type,
            peak=schedule.learning_rate,
            end=schedule.lr_end,
            warmup_steps=self._warmup_steps,
            total_steps=self._total_steps,
        )
        result = self._step(batches, rate)
        if not result.num_label_tokens:
            _LOG.warning("step %d: no label of the batch is trained on; the step is left out", index + 1)
        is_scaled = self._run.runner_wrapper.loss_scale_factor > 1
        if not math.isfinite(result.loss) or (result.is_overflow and not is_scaled):
            records = [number for batch in batches for number in batch.record_numbers]
            raise Llama31Error(
                f"step {index + 1}: loss {result.loss} and gradient norm {result.grad_norm} are no numbers to go on "
                f"with; lower lr_schedule.learning_rate or look at the records of this step: {records}"
            )
        return StepReport(
            epoch=index // self._steps_per_epoch + 1,
            step=index + 1,
            num_steps=self.num_steps,
            loss=result.loss,
            learning_rate=rate,
            grad_norm=result.grad_norm,
            is_overflow=result.is_overflow,
            step_time_s=time.perf_counter() - started,
            num_tokens=sum(batch.tokens.size for batch in batches),
            num_label_tokens=result.num_label_tokens,
        )

    def _results(self) -> dict[str, npt.NDArray[np.float32]]:
        """What is saved: all weights, or the changes alone."""
        if self._lora is None:
            return dict(self._weights.arrays())
        return {name: self._weights.tensors[name].asnumpy() for name in self._optimizer.trained}

    def _save_checkpoint(self, step: int) -> None:
        scale = self._step.loss_scale
        state = TrainerState(step, self._optimizer.num_updates, scale.value, scale.num_good_steps, self._order())
        moments = {name: moment.asnumpy() for name, moment in self._optimizer.moments.items()}
        self._checkpoints.save(self._results(), moments, state)
