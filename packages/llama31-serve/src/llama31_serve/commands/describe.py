"""`llama31-serve describe`: what a server offers, by gRPC's reflection: services, their methods, fields of messages."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import grpc
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

from llama31_serve.channel import call_metadata, open_channel, plain_options
from llama31_serve.commands import connection
from llama31_serve.errors import ServeError

DEFAULT_TIMEOUT_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("symbol", nargs="?", help="full name of a service or message (default: list the services)")
    connection.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print what was asked for, one line each. Raises ServeError without an answer, or for a name nobody has."""
    try:
        from grpc_reflection.v1alpha import reflection_pb2 as pb
        from grpc_reflection.v1alpha import reflection_pb2_grpc
    except ImportError as error:
        raise ServeError(f"{error}; describe needs: pip install grpcio-reflection") from error
    asked = {"file_containing_symbol": arguments.symbol} if arguments.symbol else {"list_services": ""}
    metadata = call_metadata(connection.read_token(arguments))
    timeout_s = arguments.timeout_s or DEFAULT_TIMEOUT_S
    tls = connection.read_tls(arguments)
    with open_channel(arguments.address, tls, plain_options(tls)) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = iter([pb.ServerReflectionRequest(**asked)])
        try:
            [answer] = stub.ServerReflectionInfo(requests, metadata=metadata, timeout=timeout_s)
        except grpc.RpcError as error:
            raise ServeError(f"{arguments.address}: {error.code().name}: {error.details()}") from None
    if answer.HasField("error_response"):
        raise ServeError(f"{arguments.address} knows no {arguments.symbol}; `describe` alone lists the services")
    if not arguments.symbol:
        lines: Iterator[str] = (service.name for service in answer.list_services_response.service)
    else:
        files = [FileDescriptorProto.FromString(data) for data in answer.file_descriptor_response.file_descriptor_proto]
        lines = _lines(files, arguments.symbol)
    for line in lines:
        print(line)
    return 0


def _lines(files: list[FileDescriptorProto], symbol: str) -> Iterator[str]:
    for file in files:
        for service in file.service:
            if f"{file.package}.{service.name}" == symbol:
                for method in service.method:
                    stream = "stream " if method.server_streaming else ""
                    returned = f"{stream}{method.output_type.lstrip('.')}"
                    yield f"rpc {method.name}({method.input_type.lstrip('.')}) returns ({returned})"
        for message in file.message_type:
            if f"{file.package}.{message.name}" == symbol:
                yield from (_field(message, field) for field in message.field)


def _field(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    kind = field.type_name.lstrip(".") or FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    repeated = "repeated " if field.label == FieldDescriptorProto.LABEL_REPEATED else ""
    in_oneof = field.HasField("oneof_index") and not field.proto3_optional
    note = f"  // one of {message.oneof_decl[field.oneof_index].name}" if in_oneof else ""
    return f"{field.number:3} {'optional ' if field.proto3_optional else repeated}{kind} {field.name}{note}"
