"""The mesh of devices: sizes of its axes in, ranks, coordinates and groups out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError

Axis = Literal["pp", "dp", "cp", "tp"]
AXES: tuple[Axis, ...] = ("pp", "dp", "cp", "tp")  # from the outermost, whose neighbours are furthest apart


@dataclass(frozen=True)
class Coordinates:
    """A rank's place on every axis."""

    pp: int
    dp: int
    cp: int
    tp: int


class ParallelConfig(BaseModel):
    """Sizes of the mesh's axes, and what else decides who holds what.

    Attributes:
        dp: data parallel replicas (MindFormers' data_parallel).
        cp: context parallel parts of a sequence.
        tp: tensor parallel parts of a layer (model_parallel).
        pp: pipeline stages (pipeline_stage).
        vocab_parallel: the embedding is split over tp (vocab_emb_dp: False); else every tp rank holds all of it.
        sequence_parallel: between the split layers each tp rank has a part of the tokens (use_seq_parallel).
        shard_optimizer: optimiser state is split over dp where a parameter's first axis divides (ZeRO-1).
        shard_gradients: the sums of gradients are split like the optimiser state (ZeRO-2).
        interleave: parts of the layers that each stage has, dealt out in turns (pp_interleave_num).
        offset: layers that each part of each stage has more or less than `n_layers // (pp * interleave)`, in the
            order in which the model runs through them, summing up to the remainder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dp: int = Field(default=1, ge=1)
    cp: int = Field(default=1, ge=1)
    tp: int = Field(default=1, ge=1)
    pp: int = Field(default=1, ge=1)
    vocab_parallel: bool = True
    sequence_parallel: bool = False
    shard_optimizer: bool = False
    shard_gradients: bool = False
    interleave: int = Field(default=1, ge=1)
    offset: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.offset is not None and len(self.offset) != self.num_parts:
            raise ValueError(
                f"offset has {len(self.offset)} entries for pp={self.pp} stages of interleave={self.interleave} parts"
            )
        if self.interleave > 1 and self.pp == 1:
            raise ValueError(f"interleave={self.interleave} needs pipeline stages to deal parts out to, pp is 1")
        if self.shard_gradients and not self.shard_optimizer:
            raise ValueError("shard_gradients needs shard_optimizer: gradients are split as the optimiser state is")
        return self

    @property
    def num_parts(self) -> int:
        """Parts of the model that follow one another; part k is on stage k % pp."""
        return self.pp * self.interleave

    @property
    def world_size(self) -> int:
        """Ranks of the mesh."""
        return self.pp * self.dp * self.cp * self.tp

    def coordinates(self, rank: int) -> Coordinates:
        """Where a rank is; tp varies fastest, pp slowest, as in MindSpore's device matrices."""
        if not 0 <= rank < self.world_size:
            raise ConfigError(f"rank is {rank}, allowed is 0 to {self.world_size - 1}")
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return Coordinates(pp, dp, cp, tp)

    def rank(self, at: Coordinates) -> int:
        """The rank at coordinates."""
        return ((at.pp * self.dp + at.dp) * self.cp + at.cp) * self.tp + at.tp

    def group(self, axis: Axis, rank: int) -> list[int]:
        """The ranks that differ from `rank` on one axis alone, in their order on it."""
        here = self.coordinates(rank)
        own = [getattr(here, name) for name in AXES]
        place = AXES.index(axis)
        groups = ([*own[:place], index, *own[place + 1 :]] for index in range(getattr(self, axis)))
        return [self.rank(Coordinates(*at)) for at in groups]

    def part_layers(self, config: ModelConfig) -> list[range]:
        """The layers of every part of the pipeline, in the order in which the model runs through them.

        Raises:
            ConfigError: a part would have none, or `offset` does not add up to all layers.
        """
        each, remainder = divmod(config.n_layers, self.num_parts)
        # Without an offset the first parts, which hold no head, take the layers that are over.
        offset = self.offset or tuple(int(part < remainder) for part in range(self.num_parts))
        sizes = [each + extra for extra in offset]
        if sum(sizes) != config.n_layers or min(sizes) < 1:
            fitting = range(1, config.n_layers // self.interleave + 1)
            near = sorted(sorted(fitting, key=lambda pp: abs(pp - self.pp))[:3])
            parts = f"makes {self.num_parts} parts"
            if self.offset:
                parts = f"with offset {list(offset)} makes parts of {sizes} layers"
            rest = f", and offset must sum up to {remainder}" if self.offset else ""
            raise ConfigError(
                f"pp={self.pp} x interleave={self.interleave} {parts}, the model has {config.n_layers} layers; every "
                f"stage needs one{rest}; the nearest pp that fit without an offset are {near}"
            )
        return [range(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]

    def stage_layers(self, config: ModelConfig) -> list[tuple[int, ...]]:
        """The layers of every pipeline stage; raises as `part_layers` does."""
        parts = self.part_layers(config)
        return [tuple(layer for part in parts[stage :: self.pp] for layer in part) for stage in range(self.pp)]

    def check(self, config: ModelConfig, world_size: int | None = None) -> None:
        """See that the model divides, before anything is loaded.

        Raises:
            ConfigError: naming the axis, what it must divide, and the nearest sizes that would do; or the model is
                quantised, which one rank alone computes with.
        """
        if config.quantization is not None and self.world_size > 1:
            raise ConfigError(
                f"pp={self.pp} x dp={self.dp} x cp={self.cp} x tp={self.tp} is {self.world_size} ranks, a model of "
                f"{config.quantization.bits} bits runs in 1; take the checkpoint it was made of"
            )
        if world_size is not None and world_size != self.world_size:
            rest = self.pp * self.cp * self.tp
            remedy = f"; with these pp, cp and tp, dp={world_size // rest} would fit" if world_size % rest == 0 else ""
            raise ConfigError(
                f"pp={self.pp} x dp={self.dp} x cp={self.cp} x tp={self.tp} is {self.world_size} ranks, "
                f"{world_size} are there{remedy}"
            )
        divided = {"n_heads": config.n_heads, "ffn_dim": config.ffn_dim}
        if self.vocab_parallel or not config.tie_word_embeddings:  # the head is always split
            divided["vocab_size"] = config.vocab_size
        fitting = [
            tp
            for tp in range(1, config.n_heads + 1)
            if not any(size % tp for size in divided.values())
            and (config.n_kv_heads % tp == 0 or tp % config.n_kv_heads == 0)
        ]
        if self.tp not in fitting:
            sizes = ", ".join(f"{name}={size}" for name, size in divided.items())
            near = sorted(sorted(fitting, key=lambda tp: abs(tp - self.tp))[:3])
            raise ConfigError(
                f"tp={self.tp} does not fit {sizes}, n_kv_heads={config.n_kv_heads}; the nearest that do are {near}"
            )
        self.stage_layers(config)
