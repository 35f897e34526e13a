"""The `model` section of a run file: architecture, number types, context; cache and sampling where it predicts."""

from __future__ import annotations

import logging
from typing import Any, Literal

from pydantic import Field, field_validator

from llama31_core.config import ModelConfig, RopeScaling
from llama31_core.errors import ConfigError
from llama31_core.mindformers_config import (
    ARCHITECTURE_KEYS,
    feed_forward_width,
    fields_from_mindformers,
    scaling_fields,
)
from llama31_core.precision import DtypeName, Precision
from llama31_core.run_config.section import Section

_LOG = logging.getLogger(__name__)

# The checkpoint's own special ids and context decide, so a file that names others is not an error.
_NOT_COMPARED = frozenset({"bos_token_id", "pad_token_id", "max_position_embedding"})


class ScalingFactor(Section):
    """Llama 3.1's rotary scaling (`extend_method: LLAMA3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class ModelSection(Section):
    """What every run says of its model; architecture keys may stand here and must then fit the checkpoint."""

    seq_length: int = Field(default=2048, ge=1)
    hidden_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    n_kv_heads: int | None = None
    vocab_size: int | None = None
    intermediate_size: int | None = None
    multiple_of: int | None = Field(default=None, ge=1)
    ffn_dim_multiplier: float | None = Field(default=None, gt=0)
    rms_norm_eps: float | None = None
    theta: float | None = None
    max_position_embedding: int | None = Field(default=None, ge=1)
    tie_word_embeddings: bool | None = None
    extend_method: Literal["None", "LLAMA3"] | None = None
    scaling_factor: ScalingFactor | float | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    ignore_token_id: Literal[-100] = -100
    compute_dtype: DtypeName = "bfloat16"
    param_init_type: DtypeName = "bfloat16"
    offset: int | tuple[int, ...] = 0
    pp_interleave_num: int = Field(default=1, ge=1)

    def precision(self, device_target: str) -> Precision:
        """Number types on a device."""
        return Precision.on(device_target, param=self.param_init_type, compute=self.compute_dtype)

    def architecture(self, source: str) -> ModelConfig:
        """The architecture that the section describes by itself.

        Raises:
            ConfigError: it leaves a size out, or sizes do not fit.
        """
        given = self.model_dump(mode="json", exclude={"pet_config"}, exclude_none=True, exclude_unset=True)
        return ModelConfig.build(source, **fields_from_mindformers({"seq_length": self.seq_length} | given, source))

    def check_against(self, config: ModelConfig, source: str) -> None:
        """Compare the architecture keys that are given with the checkpoint's config.

        Raises:
            ConfigError: they differ, or `seq_length` is beyond the model's context.
        """
        where = f"{source}: model.model_config"
        for key, given, has in self._claims(config):
            if given is not None and given != has:
                raise ConfigError(f"{where}.{key} is {given}, the checkpoint's is {has}; remove the key")
        self._check_scaling(config, where)
        if self.seq_length > config.max_seq_len:
            raise ConfigError(
                f"{where}.seq_length is {self.seq_length}, beyond the model's context of {config.max_seq_len}"
            )

    def _claims(self, config: ModelConfig) -> list[tuple[str, Any, Any]]:
        compared = {key: ours for key, ours in ARCHITECTURE_KEYS.items() if key not in _NOT_COMPARED}
        claims = [(key, getattr(self, key), getattr(config, ours)) for key, ours in compared.items()]
        if self.ffn_dim_multiplier is not None and self.intermediate_size is None:
            width = feed_forward_width(config.dim, self.multiple_of or 256, self.ffn_dim_multiplier)
            claims.append(("ffn_dim_multiplier (a width)", width, config.ffn_dim))
        return claims

    def _check_scaling(self, config: ModelConfig, where: str) -> None:
        """The checkpoint's rotary scaling is used in every run; a file may say the same, or nothing."""
        if self.extend_method is None:
            return
        factors = self.scaling_factor
        given = scaling_fields(
            self.extend_method, factors.model_dump() if isinstance(factors, ScalingFactor) else factors, where
        )
        has = config.rope_scaling
        if given is None and has is not None:
            _LOG.warning(
                "%s.extend_method is 'None', but the checkpoint's rotary embedding is scaled; it is used as it is, in "
                "training as in prediction",
                where,
            )
        elif given is not None and (has is None or RopeScaling(**given) != has):
            raise ConfigError(f"{where}.scaling_factor is {given}, the checkpoint's is {has}; remove the key")


class PredictModelSection(ModelSection):
    """With the cache, and how tokens are chosen."""

    block_size: int = Field(default=16, ge=1)
    num_blocks: int = Field(default=512, ge=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    max_decode_length: int = Field(default=1024, ge=1)
    top_k: int = Field(default=5, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    do_sample: bool = True

    def engine_values(self) -> dict[str, Any]:
        """Arguments of `EngineOptions`."""
        return {"block_size": self.block_size, "num_blocks": self.num_blocks, "max_seq_len": self.seq_length}

    def sampling_values(self) -> dict[str, Any]:
        """Arguments of `SamplingParams`, but for `max_tokens`: `max_decode_length` counts the prompt too."""
        values: dict[str, Any] = {"repetition_penalty": self.repetition_penalty}
        if not self.do_sample:
            return values | {"temperature": 0.0}
        return values | {"temperature": 1.0, "top_k": self.top_k, "top_p": self.top_p}


class PetConfig(Section):
    """`pet_config`: train low-rank changes (LoRA) of the projections whose names match, and nothing else."""

    pet_type: Literal["lora"] = "lora"
    lora_rank: int = Field(default=8, ge=1)
    lora_alpha: float = Field(default=16, gt=0)
    lora_dropout: float = Field(default=0.0, ge=0)
    target_modules: str | tuple[str, ...] = ".*wq|.*wk|.*wv|.*wo"

    @field_validator("lora_dropout")
    @classmethod
    def _no_dropout(cls, value: float) -> float:
        if value:
            raise ValueError(f"nothing is dropped at random here, got {value}; set it to 0")
        return value


class TrainModelSection(ModelSection):
    """With what is trained of the model; everything without `pet_config`."""

    pet_config: PetConfig | None = None


class ModelBlock(Section):
    """The `model` section of a run that trains."""

    model_config_: TrainModelSection = Field(default=TrainModelSection(), alias="model_config")


class PredictModelBlock(Section):
    """The `model` section of a run that predicts."""

    model_config_: PredictModelSection = Field(default=PredictModelSection(), alias="model_config")
