"""The model as every front sees it, once it is loaded."""

from __future__ import annotations

import grpc

from llama31_serve.server.generation_request import MAX_ADAPTER_CHARACTERS
from llama31_serve.server.generator import Generator
from llama31_serve.server.lifecycle import Lifecycle
from llama31_serve.server.refusal import Refusal
from llama31_serve.server.text import TextWorker
from llama31_serve.stubs import inference_pb2 as pb


class ServingModel:
    """What a loaded model gives its services."""

    def __init__(self, generator: Generator, text: TextWorker, info: pb.GetModelInfoResponse) -> None:
        self.generator = generator
        self.text = text
        self.info = info

    def adapter_of(self, model_name: str | None) -> str | None:
        """HTTP's callers ask for an adapter by its name in `model`; None is the model itself.

        Raises Refusal (NOT_FOUND) with the names that there are.
        """
        if model_name is None or model_name == self.info.model_name:
            return None
        self.require_served(model_name)
        return model_name

    def served(self) -> list[str]:
        """What HTTP's callers may name in `model`: the model first, then the adapters that are loaded."""
        return [self.info.model_name, *self.generator.adapters]

    def require_served(self, model_name: str) -> None:
        """Raises Refusal (NOT_FOUND)."""
        served = self.served()
        if model_name not in served:
            shown = repr(model_name[:MAX_ADAPTER_CHARACTERS])
            problem = f"no model {shown} is served here; served are: {', '.join(served)}"
            raise Refusal(grpc.StatusCode.NOT_FOUND, problem)


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
