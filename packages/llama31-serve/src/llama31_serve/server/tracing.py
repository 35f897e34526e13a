"""OpenTelemetry: a span for each request, below the caller's (traceparent), with its queueing, prefill and decoding.

Attribute names are those of the semantic conventions for generative AI, and vLLM's where these have none.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Literal

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from llama31_serve import __version__
from llama31_serve.errors import StartError
from llama31_serve.server.observer import Observer, RequestRecord

Exporter = Literal["console", "otlp"]
NS = 1_000_000_000
PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_OTLP = "opentelemetry.exporter.otlp.proto"
OTLP_EXPORTERS = {  # by protocol, the default first: the module, and what has it
    "http/protobuf": (f"{_OTLP}.http.trace_exporter", "'llama31-serve[tracing]'"),
    "grpc": (f"{_OTLP}.grpc.trace_exporter", "opentelemetry-exporter-otlp-proto-grpc"),
}


class Tracing(Observer):
    """Spans of requests that have ended; `close` sends what waits."""

    def __init__(self, model_name: str, exporter: SpanExporter) -> None:
        resource = Resource.create({"service.name": "llama31-serve", "service.version": __version__})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("llama31_serve")
        self._model_name = model_name

    def close(self) -> None:
        """Send the rest, and end."""
        self._provider.shutdown()

    def ended(self, record: RequestRecord) -> None:
        """See Observer."""
        carrier: Mapping[str, str] = {"traceparent": record.caller.traceparent}
        parent = TraceContextTextMapPropagator().extract(carrier)
        begin_ns = int(record.arrived_at * NS)
        took = record.durations
        span = self._tracer.start_span(
            "llm_request", parent, trace.SpanKind.SERVER, self._attributes(record), start_time=begin_ns
        )
        if record.code.name != "OK":
            span.set_status(trace.StatusCode.ERROR, record.code.name)
        at_ns = begin_ns
        if took is not None:
            inside = trace.set_span_in_context(span)
            for name, spent_s in (("queue", took.queued_s), ("prefill", took.first_token_s), ("decode", took.decode_s)):
                child = self._tracer.start_span(name, inside, start_time=at_ns)
                at_ns += int(spent_s * NS)
                child.end(at_ns)
        span.end(at_ns)

    def _attributes(self, record: RequestRecord) -> dict[str, str | int | float | list[str]]:
        attributes: dict[str, str | int | float | list[str]] = {
            "gen_ai.request.id": record.request_id,
            "gen_ai.request.model": self._model_name,
            "gen_ai.request.choice.count": record.n,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.output_tokens": record.completion_tokens,
            "gen_ai.response.finish_reasons": record.finish_reasons,
            "rpc.method": record.caller.method,
            "enduser.id": record.caller.tenant,
        }
        took = record.durations
        if took is not None:
            attributes["gen_ai.latency.time_in_queue"] = took.queued_s
            attributes["gen_ai.latency.time_to_first_token"] = took.queued_s + took.first_token_s
            attributes["gen_ai.latency.e2e"] = took.total_s
        return attributes


def make_exporter(kind: Exporter) -> SpanExporter:
    """`otlp` reads OpenTelemetry's own environment variables. Raises StartError if what they ask for is not there."""
    if kind == "console":
        return ConsoleSpanExporter()
    said = ((name, os.environ.get(name)) for name in PROTOCOL_VARIABLES)
    name, protocol = next(((name, value) for name, value in said if value), ("", next(iter(OTLP_EXPORTERS))))
    if protocol not in OTLP_EXPORTERS:
        raise StartError(f"{name} is {protocol!r}, allowed are {' and '.join(OTLP_EXPORTERS)}")
    module, install = OTLP_EXPORTERS[protocol]
    try:
        exporter: SpanExporter = importlib.import_module(module).OTLPSpanExporter()
    except ImportError as error:
        raise StartError(f"{error}; --traces otlp over {protocol} needs: pip install {install}") from error
    return exporter
