"""Llama 3.1 on MindSpore: model, inference engine, fine-tuning.

Importing this package does not import MindSpore; `Engine.from_pretrained` and `Llama` do.
"""

from typing import TYPE_CHECKING, Any

from llama31_core.config import ModelConfig, RopeScaling
from llama31_core.inference.engine import Engine
from llama31_core.inference.request import Completion, StepOutput
from llama31_core.inference.sampling import TokenLogprobs
from llama31_core.inference.sampling_params import SamplingParams

if TYPE_CHECKING:
    from llama31_core.model import Llama

__version__ = "0.1.0"
__all__ = [
    "Completion",
    "Engine",
    "Llama",
    "ModelConfig",
    "RopeScaling",
    "SamplingParams",
    "StepOutput",
    "TokenLogprobs",
]


def __getattr__(name: str) -> Any:
    if name == "Llama":
        from llama31_core.model import Llama

        return Llama
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
