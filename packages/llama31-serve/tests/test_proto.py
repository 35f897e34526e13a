"""The .proto: lint, stubs that are current, and clients that import with little installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from llama31_serve.stubs import (
    control_pb2,
    control_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)

PROTO_ROOT = Path(__file__).resolve().parents[1] / "proto"
MODULES = ((control_pb2, control_pb2_grpc), (inference_pb2, inference_pb2_grpc), (generation_pb2, generation_pb2_grpc))


def test_committed_stubs_describe_the_proto(tmp_path: Path) -> None:
    out = tmp_path / "descriptors"
    files = sorted(str(path.relative_to(PROTO_ROOT)) for path in PROTO_ROOT.rglob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO_ROOT}", f"--descriptor_set_out={out}", *files]
    subprocess.run(command, check=True)
    current = {file.name: file for file in FileDescriptorSet.FromString(out.read_bytes()).file}
    committed = {}
    for module, _ in MODULES:
        file = FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        committed[file.name] = file
    assert committed.keys() == current.keys()
    for name, file in committed.items():
        for described in (file, current[name]):  # what protoc adds only for JSON is not in the stubs
            messages = list(described.message_type)
            for message in messages:
                messages += message.nested_type
                for field in message.field:
                    field.ClearField("json_name")
        assert file == current[name], f"{name} has changed: run tools/generate_stubs"


def test_committed_grpc_stubs_have_every_method() -> None:
    for module, grpc_module in MODULES:
        for service in module.DESCRIPTOR.services_by_name.values():
            servicer = getattr(grpc_module, f"{service.name}Servicer")
            assert {name for name in vars(servicer) if name[0] != "_"} == {method.name for method in service.methods}


def test_buf_lint() -> None:
    buf = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")
    if buf is None:
        pytest.skip("buf-bin is not installed")
    result = subprocess.run([buf, "lint", str(PROTO_ROOT)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")


def test_buf_breaking() -> None:
    """Nothing that clients were built against has gone or changed its meaning."""
    buf = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")
    if buf is None:
        pytest.skip("buf-bin is not installed")
    command = [buf, "breaking", str(PROTO_ROOT), "--against", str(PROTO_ROOT / "baseline.binpb")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")


def test_clients_import_with_grpcio_and_protobuf_alone() -> None:
    program = """
        import sys
        for name in ("mindspore", "numpy", "llama31_core", "llama31_tokenizer", "grpc_health", "grpc_reflection",
                     "grpc_status", "google.rpc", "pydantic", "jinja2"):
            sys.modules[name] = None
        from llama31_serve import AsyncClient, Client
        with Client("127.0.0.1:1") as client:
            assert client
        import llama31_serve.cli
        print("imported")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    assert (result.stdout, result.stderr) == ("imported\n", "")
