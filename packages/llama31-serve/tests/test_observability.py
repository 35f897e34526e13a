"""What operators see: metrics, access log, status line and traces of requests whose course is known."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from prometheus_client.parser import text_string_to_metric_families

from llama31_serve import InvalidRequestError, OverloadedError
from llama31_serve.errors import StartError
from llama31_serve.server.echo_engine import EchoEngine
from llama31_serve.server.tallies import Histogram
from llama31_serve.server.tracing import PROTOCOL_VARIABLES, Tracing, make_exporter
from llama31_serve.stubs import inference_pb2 as pb
from llama31_serve.stubs.inference_pb2_grpc import InferenceServiceStub

Serve = Any
TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"


def test_histogram() -> None:
    histogram = Histogram((1, 2))
    for value, times in ((0.5, 1), (1, 1), (1.5, 3), (9, 1)):
        histogram.add(value, times)
    assert histogram.cumulative() == [("1.0", 2), ("2.0", 5), ("+Inf", 6)]
    assert (histogram.sum, histogram.count) == (15.0, 6)


async def scrape(url: str) -> dict[tuple[str, str], float]:
    """(name, finished_reason, reason or le) -> value; every sample has the model's name."""
    async with httpx.AsyncClient() as client:
        response = await client.get(f"{url}/metrics")
    assert response.status_code == 200
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = dict(sample.labels)
            if not family.name.startswith("process"):
                assert labels.pop("model_name") == "echo"
            found[sample.name, next(iter(labels.values()), "")] = sample.value
    return found


async def test_metrics(serve: Serve) -> None:
    engine = EchoEngine(vocab_size=259, step_s=0.002)
    options = {"model_name": "echo", "max_running": 2, "max_per_tenant": 1, "management_port": 0, "metrics_port": 0}
    async with serve(engine=engine, **options) as running:
        client, http = running.client, running.server.http
        await client.generate("abc", max_tokens=5)
        await client.generate("abc", max_tokens=9, stop=["bc"])
        with pytest.raises(InvalidRequestError):
            await client.generate("abc", temperature=-1)
        with pytest.raises(OverloadedError):
            await client.generate("abc", n=2)
        found = await scrape(http.metrics.url)
        assert found["request_received_total", ""] == 3  # the overload too: it passed validation
        assert (found["request_success_total", ""], found["request_failed_total", ""]) == (2, 1)
        assert found["failed_request_perc", ""] == pytest.approx(1 / 3)
        for prefix in ("", "vllm:"):
            assert found[f"{prefix}prompt_tokens_total", ""] == 6
            assert found[f"{prefix}generation_tokens_total", ""] == 8
            assert found[f"{prefix}time_to_first_token_seconds_count", ""] == 2
            assert found[f"{prefix}time_per_output_token_seconds_count", ""] == 6
            assert found[f"{prefix}e2e_request_latency_seconds_count", ""] == 2
            assert found[f"{prefix}request_prompt_tokens_bucket", "5.0"] == 2
            assert found[f"{prefix}request_generation_tokens_sum", ""] == 8
            assert found[f"{prefix}num_requests_running", ""] == 0
            assert found[f"{prefix}num_requests_waiting", ""] == 0
        assert found["time_per_output_token_seconds_sum", ""] >= 6 * 0.002
        assert found["vllm:request_success_total", "stop_string"] == 1
        assert found["vllm:request_success_total", "length"] == 1
        assert found["llama31:refused_calls_total", "resource_exhausted"] == 1
        assert found["llama31:refused_calls_total", "invalid_argument"] == 1
        assert found["npu_cache_usage_perc", ""] == 0
        assert found.keys() == (await scrape(http.management.url)).keys()


async def test_status_while_busy(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llama31_serve.server.status")
    engine = EchoEngine(vocab_size=259, step_s=0.005)
    options = {"model_name": "echo", "max_running": 1, "metrics_port": 0, "status_period_s": 0.1}
    async with serve(engine=engine, **options) as running:
        asked = [asyncio.create_task(running.client.generate("ab", max_tokens=80)) for _ in range(2)]
        await running.until(lambda: engine.num_requests == 1 and running.server.status.rates.generated > 0)
        found = await scrape(running.server.http.metrics.url)
        assert (found["num_requests_running", ""], found["num_requests_waiting", ""]) == (1, 1)
        assert 20 < found["avg_generation_throughput_toks_per_s", ""] < 220
        await asyncio.gather(*asked)
        await running.until(lambda: running.server.status.rates.generated == 0)
        quiet = len(caplog.messages)
        await asyncio.sleep(0.25)
        assert len(caplog.messages) <= quiet + 1  # an idle server says nothing
    assert any(line.startswith("running 1, waiting 1, generating ") for line in caplog.messages)


async def test_access_log(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llama31_serve.server.access_log")
    async with serve(http_port=0) as running:
        await running.client.generate("secret", max_tokens=4, request_id="mine-1")
        with pytest.raises(InvalidRequestError):
            await running.client.generate("secret", temperature=-1)
        headers = {"x-request-id": "mine-2", "traceparent": TRACEPARENT}
        async with httpx.AsyncClient(base_url=running.server.http.business.url) as client:
            await client.post("/generate", json={"inputs": "secret"}, headers=headers)
    first, refused, second = (json.loads(line) for line in caplog.messages)
    assert (first["request_id"], first["code"], first["tenant"]) == ("mine-1", "OK", "anonymous")
    assert first["method"] == "/llama31.inference.v1.InferenceService/Generate"
    assert (first["prompt_tokens"], first["completion_tokens"], first["finish_reasons"]) == (6, 4, ["length"])
    assert first["total_ms"] >= first["first_token_ms"] >= 0
    assert (refused["code"], refused["refused"]) == ("INVALID_ARGUMENT", True)
    assert first["arrived_at"] <= refused["arrived_at"] <= time.time()
    assert (second["request_id"], second["method"], second["traceparent"]) == ("mine-2", "/generate", TRACEPARENT)
    assert not any("secret" in line for line in caplog.messages)


class Kept(SpanExporter):
    """Keeps spans."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.spans += spans
        return SpanExportResult.SUCCESS


async def test_traces_continue_the_callers(serve: Serve) -> None:
    kept = Kept()
    tracing = Tracing("echo", kept)
    async with serve(observers=(tracing,), http_port=0) as running:
        async with httpx.AsyncClient(base_url=running.server.http.business.url) as client:
            await client.post("/generate", json={"inputs": "ab"}, headers={"traceparent": TRACEPARENT})
        async with grpc.aio.insecure_channel(running.server.address) as channel:
            request = pb.GenerateRequest(text=pb.TextPrompt(text="ab"), stopping=pb.StoppingParams(max_tokens=3))
            stub: Any = InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
            await stub.Generate(request, metadata=(("traceparent", TRACEPARENT),))
    tracing.close()
    roots = [span for span in kept.spans if span.name == "llm_request"]
    assert len(roots) == 2
    for root in roots:
        assert root.context is not None
        assert f"{root.context.trace_id:032x}" == TRACE
        assert root.parent is not None
        assert f"{root.parent.span_id:016x}" == "b7ad6b7169203331"
        children = [span for span in kept.spans if span.parent and span.parent.span_id == root.context.span_id]
        assert [child.name for child in children] == ["queue", "prefill", "decode"]
        assert root.start_time is not None
        assert all(child.start_time is not None and child.start_time >= root.start_time for child in children)
    assert [root.attributes["gen_ai.usage.output_tokens"] for root in roots if root.attributes] == [20, 3]


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "OTEL_EXPORTER_OTLP_PROTOCOL is 'http/json', allowed are http"),
        ({"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "x", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "TRACES_PROTOCOL is 'x'"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "--traces otlp over grpc needs: pip install opent"),
    ],
)
def test_otlp_speaks_the_protocol_that_opentelemetrys_variables_say(
    variables: dict[str, str], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in PROTOCOL_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert type(make_exporter("otlp")).__module__ == "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)  # not installed
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StartError, match=problem):
        make_exporter("otlp")
