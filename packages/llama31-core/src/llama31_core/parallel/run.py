"""A fine-tuning run on one rank of a mesh: its slices of weights, its share of data (`training.ranks.Ranks`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llama31_core.checkpoint.names import split_moment
from llama31_core.checkpoint.sharded import open_for_rank, rank_directories
from llama31_core.config import ModelConfig
from llama31_core.errors import CheckpointError, ConfigError, Llama31Error
from llama31_core.parallel.agreement import agree, digest_of, digest_of_checkpoint, digest_of_files
from llama31_core.parallel.collecting import Collector, held, plan_ranks, updated
from llama31_core.parallel.gradients import sum_numbers
from llama31_core.parallel.groups import world_group
from llama31_core.parallel.launch import find_rank, join_mesh
from llama31_core.parallel.layout import ParameterShard
from llama31_core.parallel.replica import build_replica, check_trainable
from llama31_core.parallel.sequence import check_sequence
from llama31_core.run_config import RunConfig
from llama31_core.training.backprop import Backprop
from llama31_core.training.block import Recompute
from llama31_core.training.dataset import find_records
from llama31_core.training.device import training_precision
from llama31_core.training.head import Objective
from llama31_core.training.lora import Lora
from llama31_core.training.optim import AdamW
from llama31_core.training.reduction import Reduction
from llama31_core.training.start import require_finite
from llama31_core.training.weights import TrainedWeights

Arrays = Mapping[str, npt.NDArray[np.float32]]


def join_run(run: RunConfig, source: str) -> MeshRanks:
    """Become a rank of a run that a launcher started on as many processes as its mesh has.

    Raises:
        ConfigError: on all ranks alike, if they cannot begin together; of a launcher's missing, and of ranks that do
            not meet, each rank for itself.
    """
    rank = find_rank(run.parallel, source)
    join_mesh()
    world = world_group(run.parallel, rank)
    problem, facts, config = "", {}, None
    try:
        config = ModelConfig.from_pretrained(run.load_checkpoint)
        check_trainable(config, run.parallel)
        facts = find_facts(run, rank)
    except (Llama31Error, OSError) as error:
        problem = str(error)
    agree(world, facts, problem)
    assert config is not None
    return MeshRanks(run, config, rank)


def find_facts(run: RunConfig, rank: int) -> dict[str, str]:
    """Digests of what all ranks must have alike; paths may differ from machine to machine.

    Raises:
        CheckpointError, DatasetError: there is nothing to compare.
    """
    values = run.model_dump(mode="json", exclude={"load_checkpoint", "output_dir"})
    for section in ("train_dataset", "eval_dataset"):
        values[section]["data_loader"].pop("dataset_dir")
    data = find_records(Path(run.train_dataset.data_loader.dataset_dir))
    return {
        "the configuration": digest_of(json.dumps(values, sort_keys=True)),
        "the checkpoint of load_checkpoint": digest_of_checkpoint(Path(run.load_checkpoint), rank),
        "the data of train_dataset": digest_of_files(data),
    }


class MeshRanks:
    """The ranks of a run over a mesh, seen from one of them, which has joined the others (launch.py).

    Raises:
        ConfigError: the model or the sequence does not divide over the mesh, or the run has what a mesh cannot do.
    """

    def __init__(self, run: RunConfig, config: ModelConfig, rank: int) -> None:
        parallel = run.parallel
        check_sequence(parallel, run.model_section.seq_length)
        self._config, self._rank = config, rank
        self._replica = build_replica(config, parallel, rank, training_precision(run.model_section.compute_dtype))
        self._world = self._replica.groups.world()
        self.data_rank, self.num_data_ranks = self._replica.groups.at.dp, parallel.dp
        self.replica_size = parallel.world_size // parallel.dp
        self.is_first = rank == 0
        self.reduction: Reduction = self._replica.reduction
        ranks = plan_ranks(config, parallel)
        self._weights, self._moments = Collector(ranks, self._world, held), Collector(ranks, self._world, updated)

    def load_weights(
        self, run: RunConfig, config: ModelConfig, lora: Lora | None, resumed: Path | None
    ) -> TrainedWeights:
        """As `Ranks`.

        Raises:
            CheckpointError: damaged, of another shape, or whole although `auto_trans_ckpt` is False.
        """
        assert lora is None
        source = Path(run.load_checkpoint) if resumed is None else resumed
        if resumed is None and not run.auto_trans_ckpt:
            check_split(source, self._rank)
        load_slices(self._replica.weights, source, self._replica.shards, self._rank)
        return self._replica.weights

    def build_backprop(self, weights: TrainedWeights, objective: Objective, recompute: Recompute) -> Backprop:
        """As `Ranks`."""
        return self._replica.backprop(objective, recompute)

    def build_optimizer(self, weights: TrainedWeights, run: RunConfig) -> AdamW:
        """As `Ranks`."""
        (beta1, beta2), optimizer = run.optimizer.moments, run.optimizer
        decay = optimizer.weight_decay
        return self._replica.optimizer(beta1=beta1, beta2=beta2, eps=optimizer.eps, weight_decay=decay)

    def collect(self, weights: Arrays) -> dict[str, npt.NDArray[np.float32]]:
        """As `Ranks`."""
        return self._weights.collect(weights)

    def collect_moments(self, moments: Arrays) -> dict[str, npt.NDArray[np.float32]]:
        """As `Ranks`; every weight has the same kinds of moments."""
        kinds = sorted({split_moment(name)[0] for name in moments})
        whole = {}
        for kind in kinds:
            own = {split_moment(name)[1]: value for name, value in moments.items() if split_moment(name)[0] == kind}
            whole.update({kind + name: value for name, value in self._moments.collect(own).items()})
        return whole

    def slices(self, name: str) -> tuple[slice, ...]:
        """As `Ranks`."""
        kind, weight = split_moment(name)
        shard = self._replica.shards[weight]
        return shard.optimizer_slices if kind else shard.slices

    def agree(self, facts: Mapping[str, str], problem: str = "") -> None:
        """As `Ranks`."""
        agree(self._world, facts, problem)

    def any(self, flag: bool) -> bool:
        """As `Ranks`."""
        return sum_numbers(float(flag), self._world) > 0


def check_split(source: Path, rank: int) -> None:
    """See that a checkpoint is split for ranks already, which is what `auto_trans_ckpt: False` says.

    Raises:
        ConfigError: it is whole, or the rank's directory is missing.
    """
    if rank not in rank_directories(source):
        found = "is whole" if not rank_directories(source) else f"has no rank_{rank}"
        raise ConfigError(
            f"load_checkpoint: {source} {found}, and auto_trans_ckpt is False, which takes a directory rank_N for each "
            "rank; set auto_trans_ckpt=True, or split it with llama31-ckpt shard"
        )


def load_slices(weights: TrainedWeights, source: Path, shards: Mapping[str, ParameterShard], rank: int) -> int:
    """Fill a rank's weights, reading no more than its slices; gives the bytes read.

    Raises:
        CheckpointError: damaged, of another shape, or with values that are no numbers.
    """
    with open_for_rank(source, {name: shard.slices for name, shard in shards.items()}, rank=rank) as reader:

        def read(name: str) -> npt.NDArray[np.generic]:
            shard = shards[name]
            if reader.shape(name) != shard.full_shape:
                raise CheckpointError(f"{source}: {name} is {reader.shape(name)}, its config says {shard.full_shape}")
            return require_finite(reader.read_slice(name, shard.slices), name, source)

        weights.load(read)
        return reader.bytes_read
