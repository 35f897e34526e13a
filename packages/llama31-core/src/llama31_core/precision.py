"""Which number types weights, products and cache have: what a run file asks for and a device in, `Precision` out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llama31_core.errors import ConfigError

DtypeName = Literal["float32", "float16", "bfloat16"]
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Precision:
    """Names of MindSpore types.

    Attributes:
        param: of the weights that are matrices (MindFormers' param_init_type).
        compute: of products and of what flows between layers (compute_dtype). Norms, rotary angles, softmax and
            logits are computed in float32.
        cache: of keys and values; that of products if None.
    """

    param: DtypeName = "float32"
    compute: DtypeName = "float32"
    cache: DtypeName | None = None

    @property
    def param_bytes(self) -> int:
        """Of a weight."""
        return _BYTES[self.param]

    @property
    def compute_bytes(self) -> int:
        """Of a number that flows between layers."""
        return _BYTES[self.compute]

    @property
    def cache_dtype(self) -> DtypeName:
        """Of keys and values."""
        return self.cache or self.compute

    @property
    def cache_bytes(self) -> int:
        """Of a number in the cache."""
        return _BYTES[self.cache_dtype]

    @classmethod
    def on(cls, device_target: str, *, param: DtypeName = "bfloat16", compute: DtypeName = "bfloat16") -> Precision:
        """What a device computes when this is asked for. A CPU has float32 alone: its matrix products know no bfloat16
        and are slow in float16.

        Raises:
            ConfigError: float32 products on Ascend, whose fused attention takes 16 bits alone.
        """
        if device_target != "Ascend":
            return cls()
        if compute == "float32":
            raise ConfigError(
                "model.model_config.compute_dtype is 'float32', allowed on Ascend are 'bfloat16' and 'float16': its "
                "attention operators take 16 bits alone"
            )
        return cls(param, compute)
