"""Puts a servicer on a gRPC server. Bytes that are no request become INVALID_ARGUMENT, not a log entry each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from llama31_serve.server.refusal import Malformed


def add_servicer(server: grpc.aio.Server, service: ServiceDescriptor, servicer: object) -> None:
    """Every method of the service, answered by the servicer's coroutine of the same name."""
    handlers = {}
    for method in service.methods:
        assert not method.client_streaming
        wrap = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        parse = _parser(GetMessageClass(method.input_type))
        serialize = GetMessageClass(method.output_type).SerializeToString
        handlers[method.name] = wrap(getattr(servicer, method.name), parse, serialize)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def _parser(message_type: type[Message]) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Message | Malformed:
        try:
            return message_type.FromString(data)
        except DecodeError:
            return Malformed(message_type.DESCRIPTOR.name)

    return parse
