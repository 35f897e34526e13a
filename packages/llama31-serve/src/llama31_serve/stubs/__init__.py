"""Protobuf and gRPC stubs, written by tools/generate_stubs. Nothing here is edited by hand."""
