"""A fine-tuning run: a RunConfig in; a log line a step, and a trained model directory, out."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.nn.utils import no_init_parameters

from llama31_core import __version__
from llama31_core.checkpoint import (
    check_weights,
    describe_file,
    open_weights,
    save_weights,
    staged_directory,
    write_manifest,
)
from llama31_core.checkpoint.staging import check_destination
from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError, Llama31Error
from llama31_core.model import CausalAttention, Llama
from llama31_core.run_config import RunConfig
from llama31_core.training.dataset import IGNORED_LABEL, MindRecordDataset
from llama31_core.training.optim import AdamW
from llama31_core.training.schedule import learning_rate, plan_warmup
from llama31_core.training.step import NextTokenLoss, TrainStep

_LOG = logging.getLogger(__name__)
_KEPT_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class StepReport:
    """What one step did; `loss` is that before the update, `grad_norm` that before clipping."""

    epoch: int
    step: int
    num_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    step_time_s: float
    num_tokens: int
    num_label_tokens: int

    def __str__(self) -> str:
        return (
            f"epoch: {self.epoch}, step: [{self.step}/{self.num_steps}], loss: {self.loss:.4f}, "
            f"lr: {self.learning_rate:.3e}, global_norm: {self.grad_norm:.3f}, "
            f"per_step_time: {self.step_time_s * 1e3:.0f}ms, {self.num_tokens / self.step_time_s:.0f} tokens/s, "
            f"{self.num_label_tokens} label tokens"
        )


class Trainer:
    """One run on one device.

    Everything that can be wrong is checked here, before the first step: configuration, data, weights, output.

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
        self._model_dir = Path(run.load_checkpoint)
        self._output_dir = Path(run.output_dir) / "model"
        self.config = ModelConfig.from_pretrained(self._model_dir)
        run.model_section.check_against(self.config, source)
        self._dataset = MindRecordDataset(
            run.train_dataset.data_loader.dataset_dir,
            self.config,
            seq_length=run.model_section.seq_length,
            batch_size=run.runner_config.batch_size,
            seed=run.seed if run.train_dataset.data_loader.shuffle else None,
            num_workers=run.train_dataset.num_parallel_workers,
        )
        all_steps = run.runner_config.epochs * self._dataset.steps_per_epoch
        self.num_steps = min(all_steps, run.runner_config.max_steps or all_steps)
        if run.runner_config.max_steps is not None and run.runner_config.max_steps > all_steps:
            _LOG.warning("the data ends after %d steps, before runner_config.max_steps", all_steps)
        self._run = run
        self._total_steps = self.num_steps if run.lr_schedule.total_steps == -1 else run.lr_schedule.total_steps
        self._warmup_steps = plan_warmup(run.lr_schedule.warmup_steps, run.lr_schedule.warmup_ratio, self._total_steps)
        check_destination(self._output_dir)
        _check_room(self._output_dir, 4 * self.config.num_parameters)
        self._llama, self._optimizer, self._step = self._build()

    def _build(self) -> tuple[Llama, AdamW, TrainStep]:
        ms.set_context(mode=ms.GRAPH_MODE)
        with open_weights(self._model_dir) as weights:
            check_weights(weights, self.config)
            with no_init_parameters():
                llama = Llama(self.config, CausalAttention)
            for name, parameter in llama.parameters_and_names():
                parameter.set_data(Tensor(weights.read(name).astype(np.float32)))
        beta1, beta2 = self._run.optimizer.moments
        wrapper = self._run.runner_wrapper
        optimizer = AdamW(
            llama.trainable_params(),
            beta1=beta1,
            beta2=beta2,
            eps=self._run.optimizer.eps,
            weight_decay=self._run.optimizer.weight_decay,
            max_norm=wrapper.max_grad_norm if wrapper.use_clip_grad else None,
        )
        step = TrainStep(NextTokenLoss(llama), optimizer)
        step.set_train()
        return llama, optimizer, step

    def train(self, report: Callable[[StepReport], None]) -> Path:
        """Run all steps and save the model; gives the model directory that was written.

        Raises:
            Llama31Error: the loss is no longer a number; nothing is saved then.
        """
        schedule = self._run.lr_schedule
        batches = self._dataset.epochs(self._run.runner_config.epochs)
        for index, (tokens, labels) in zip(range(self.num_steps), batches, strict=False):
            if (labels == IGNORED_LABEL).all():
                _LOG.warning("step %d: no label of the batch is trained on; the step is left out", index + 1)
                continue
            started = time.perf_counter()
            rate = learning_rate(
                index,
                schedule=schedule.type,
                peak=schedule.learning_rate,
                end=schedule.lr_end,
                warmup_steps=self._warmup_steps,
                total_steps=self._total_steps,
            )
            loss, norm = self._step(Tensor(tokens), Tensor(labels), *self._optimizer.scalars(index, rate))
            done = StepReport(
                epoch=index // self._dataset.steps_per_epoch + 1,
                step=index + 1,
                num_steps=self.num_steps,
                loss=float(loss),
                learning_rate=rate,
                grad_norm=float(norm),
                step_time_s=time.perf_counter() - started,
                num_tokens=tokens.size,
                num_label_tokens=int((labels != IGNORED_LABEL).sum()),
            )
            if not (math.isfinite(done.loss) and math.isfinite(done.grad_norm)):
                raise Llama31Error(
                    f"step {done.step}: loss {done.loss} and gradient norm {done.grad_norm} are no numbers to go on "
                    f"with; lower lr_schedule.learning_rate or look at the data of this step"
                )
            report(done)
        return self._save()

    def _save(self) -> Path:
        for name, parameter in self._llama.parameters_and_names():
            if not np.isfinite(parameter.asnumpy()).all():
                raise Llama31Error(f"{name} holds values that are no numbers after the last step; nothing is saved")
        with staged_directory(self._output_dir) as directory:
            weights = ((name, parameter.asnumpy()) for name, parameter in self._llama.parameters_and_names())
            files = save_weights(directory, weights)
            files.append(describe_file(self.config.save_pretrained(directory)))
            for name in _KEPT_FILES:
                if (self._model_dir / name).is_file():
                    files.append(describe_file(Path(shutil.copy(self._model_dir / name, directory))))
            source = {"format": "finetune", "name": self._model_dir.name, "steps": self.num_steps}
            write_manifest(directory, files, dtype="float32", source=source, tool=f"llama31-core {__version__}")
        return self._output_dir


def _check_room(destination: Path, needed_bytes: int) -> None:
    """See that a result of this size can be written, before the work for it is done."""
    place = next(parent for parent in destination.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".llama31-"):
            free_bytes = shutil.disk_usage(place).free
    except OSError as error:
        raise ConfigError(f"output_dir: {destination} cannot be written: {error.strerror}; set another") from error
    if free_bytes < needed_bytes:
        raise ConfigError(
            f"output_dir: {destination} needs {needed_bytes / 1e9:.2f} GB, {free_bytes / 1e9:.2f} GB are free there"
        )
