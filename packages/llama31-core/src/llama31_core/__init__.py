"""Llama 3.1 on MindSpore: model, inference engine, fine-tuning.

Importing this package loads none of it, and no MindSpore: each name is loaded where it is first used, so that a
program which only reads checkpoints does not wait for the engine.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama31_core.config import ModelConfig, RopeScaling
    from llama31_core.inference.engine import Engine
    from llama31_core.inference.request import Completion, StepOutput
    from llama31_core.inference.sampling import TokenLogprobs
    from llama31_core.inference.sampling_params import SamplingParams
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
_MODULES = {
    "Completion": "inference.request",
    "Engine": "inference.engine",
    "Llama": "model",
    "ModelConfig": "config",
    "RopeScaling": "config",
    "SamplingParams": "inference.sampling_params",
    "StepOutput": "inference.request",
    "TokenLogprobs": "inference.sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"llama31_core.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
