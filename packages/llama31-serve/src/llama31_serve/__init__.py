"""gRPC inference for Llama 3.1: the clients, importable without MindSpore. The server is llama31_serve.server."""

__version__ = "0.1.0"

from llama31_serve.aio_client import AsyncClient, AsyncTextStream
from llama31_serve.channel import Tls
from llama31_serve.client import Client, TextStream
from llama31_serve.control import Adapter, ControlClient, OpenRequest, ServerInfo
from llama31_serve.errors import (
    AuthenticationError,
    CancelledError,
    DeadlineError,
    FieldViolation,
    InvalidRequestError,
    OverloadedError,
    RpcError,
    ServeError,
    UnavailableError,
)
from llama31_serve.requests import Options
from llama31_serve.results import (
    Chunk,
    Completion,
    FinishReason,
    GenerateResult,
    ModelInfo,
    Timings,
    TokenLogprobs,
    Usage,
)

__all__ = [
    "Adapter",
    "AsyncClient",
    "AsyncTextStream",
    "AuthenticationError",
    "CancelledError",
    "Chunk",
    "Client",
    "Completion",
    "ControlClient",
    "DeadlineError",
    "FieldViolation",
    "FinishReason",
    "GenerateResult",
    "InvalidRequestError",
    "ModelInfo",
    "OpenRequest",
    "Options",
    "OverloadedError",
    "RpcError",
    "ServeError",
    "ServerInfo",
    "TextStream",
    "Timings",
    "Tls",
    "TokenLogprobs",
    "UnavailableError",
    "Usage",
]
