"""The model as every front sees it, once it is loaded."""

from __future__ import annotations

from llama31_serve.server.generator import Generator
from llama31_serve.server.lifecycle import Lifecycle
from llama31_serve.server.text import TextWorker
from llama31_serve.stubs import inference_pb2 as pb


class ServingModel:
    """What a loaded model gives its services."""

    def __init__(self, generator: Generator, text: TextWorker, info: pb.GetModelInfoResponse) -> None:
        self.generator = generator
        self.text = text
        self.info = info

    def adapter_of(self, model_name: str | None) -> str | None:
        """HTTP's callers ask for an adapter by its name in `model`; None is the model itself."""
        return None if model_name in (None, self.info.model_name) else model_name


class ModelHolder:
    """The model, once there is one. It is set before the lifecycle says that the server is serving."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self.model: ServingModel | None = None
        self._lifecycle = lifecycle

    def loaded(self) -> ServingModel:
        """Raises Refusal (UNAVAILABLE) before the model is there."""
        if self.model is None:
            self._lifecycle.require_serving()
        assert self.model is not None
        return self.model
