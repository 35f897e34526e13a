"""Loading, serving, draining: one state that health, admission and shutdown all read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import Enum

import grpc

from llama31_serve.server.refusal import Refusal


class State(Enum):
    """What the server does with a new request."""

    LOADING = "the model is still loading"
    SERVING = "serving"
    DRAINING = "the server is draining and takes no new requests"
    FAILED = "the engine has failed"


class Lifecycle:
    """The server's state, and who has to be told when it changes."""

    def __init__(self, on_serving: Callable[[bool], Awaitable[None]]) -> None:
        self.state = State.LOADING
        self._on_serving = on_serving

    async def enter(self, state: State) -> None:
        """Change the state; health follows before anything else does."""
        self.state = state
        await self._on_serving(state is State.SERVING)

    def require_serving(self) -> None:
        """Raises Refusal (UNAVAILABLE) unless new requests are taken."""
        if self.state is not State.SERVING:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, f"{self.state.value}; try another replica")
