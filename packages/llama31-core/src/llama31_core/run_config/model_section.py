"""The `model` section of a run file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.run_config.section import Section

# The architecture keys of MindFormers' LlamaConfig -> ModelConfig's.
_ARCHITECTURE_KEYS = {
    "hidden_size": "dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "n_kv_heads": "n_kv_heads",
    "vocab_size": "vocab_size",
    "intermediate_size": "ffn_dim",
    "rms_norm_eps": "norm_eps",
    "theta": "rope_theta",
}


class ModelSection(Section):
    """What of the model is a matter of the run; architecture keys may stand here and must then fit the checkpoint."""

    seq_length: int = Field(default=2048, ge=1)
    hidden_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    n_kv_heads: int | None = None
    vocab_size: int | None = None
    intermediate_size: int | None = None
    rms_norm_eps: float | None = None
    theta: float | None = None
    ignore_token_id: Literal[-100] = -100

    def check_against(self, config: ModelConfig, source: str) -> None:
        """Compare the architecture keys that are given with the checkpoint's config.

        Raises:
            ConfigError: they differ, or `seq_length` is beyond the model's context.
        """
        for key, ours in _ARCHITECTURE_KEYS.items():
            given, has = getattr(self, key), getattr(config, ours)
            if given is not None and given != has:
                raise ConfigError(
                    f"{source}: model.model_config.{key} is {given}, the checkpoint's is {has}; remove the key"
                )
        if self.seq_length > config.max_seq_len:
            raise ConfigError(
                f"{source}: model.model_config.seq_length is {self.seq_length}, beyond the model's context of "
                f"{config.max_seq_len}"
            )


class ModelBlock(Section):
    """The `model` section."""

    model_config_: ModelSection = Field(default=ModelSection(), alias="model_config")
