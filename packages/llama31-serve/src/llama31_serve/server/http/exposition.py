"""/metrics: the tallies in Prometheus' text format, under MindIE's names and under vLLM's.

MindIE's names: its page on monitoring metrics (Prometheus format). vLLM's: its docs on production metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from llama31_serve.server.http.call import Call
from llama31_serve.server.status import Status
from llama31_serve.server.tallies import Histogram


class Exposition(Collector):
    """The handler of GET /metrics, and what it collects."""

    def __init__(self, status: Status, model_name: str) -> None:
        self._status = status
        self._model_name = model_name
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    async def metrics(self, call: Call) -> None:
        """Everything, as text."""
        await call.answer_bytes(generate_latest(self._registry), CONTENT_TYPE_LATEST)

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        yield from self._requests()
        yield from self._gauges()
        yield from self._histograms()

    def _requests(self) -> Iterator[Metric]:
        tallies, engine = self._status.tallies, self._status.engine_counters
        failed = sum(tallies.failed_requests.values())
        ended = tallies.succeeded_requests + failed
        counters: list[tuple[tuple[str, ...], str, float]] = [
            (("request_received",), "Requests that passed validation.", tallies.received_requests),
            (("request_success",), "Requests that gave all that was asked for.", tallies.succeeded_requests),
            (("request_failed",), "Requests that ended with an error or were cancelled.", failed),
            (("prompt_tokens", "vllm:prompt_tokens"), "Tokens of prompts.", tallies.prompt_tokens),
            (("generation_tokens", "vllm:generation_tokens"), "Tokens generated.", tallies.generated_tokens),
            (("num_preemptions", "vllm:num_preemptions"), "Times a sequence made room.", engine["preemptions"]),
            (("vllm:prefix_cache_queries",), "Prompt tokens looked up in the cache.", engine["prefill_tokens"]),
            (("vllm:prefix_cache_hits",), "Of them, found there.", engine["prefix_hit_tokens"]),
            (("vllm:spec_decode_num_draft_tokens",), "Tokens guessed ahead.", engine["drafted_tokens"]),
            (("vllm:spec_decode_num_accepted_tokens",), "Of them, right.", engine["accepted_tokens"]),
            (("llama31:dropped_prompt_tokens",), "Prompt tokens cut off.", tallies.dropped_prompt_tokens),
            (("llama31:clamped_requests",), "Requests given fewer tokens than asked.", tallies.clamped_requests),
        ]
        for names, text, value in counters:
            for name in names:
                yield self._counter(name, text, value)
        reasons = tallies.finish_reasons
        yield self._labelled("vllm:request_success", "Completions by how they ended.", "finished_reason", reasons)
        refused = {code.name.lower(): count for code, count in tallies.refused_calls.items()}
        yield self._labelled("llama31:refused_calls", "Calls answered with an error.", "reason", refused)
        yield self._gauge("failed_request_perc", "Share of requests that failed.", failed / ended if ended else 0.0)

    def _gauges(self) -> Iterator[Metric]:
        status = self._status
        gauges: list[tuple[tuple[str, ...], str, float]] = [
            (("num_requests_running", "vllm:num_requests_running"), "Completions computed now.", status.num_running),
            (("num_requests_waiting", "vllm:num_requests_waiting"), "Completions that wait.", status.num_waiting),
            (("num_requests_swapped", "vllm:num_requests_swapped"), "Completions on the host.", status.num_swapped),
            (("npu_cache_usage_perc", "vllm:kv_cache_usage_perc"), "Share of cache blocks owned.", status.cache_usage),
            (("cpu_cache_usage_perc", "vllm:cpu_cache_usage_perc"), "The same on the host.", status.host_cache_usage),
            (("npu_prefix_cache_hit_rate",), "Share of prompt tokens found in the cache.", status.prefix_hit_rate),
            (("avg_prompt_throughput_toks_per_s",), "Prompt tokens a second, lately.", status.rates.prompt),
            (("avg_generation_throughput_toks_per_s",), "Tokens generated a second, lately.", status.rates.generated),
            (("llama31:max_running_completions",), "Completions that may run.", status.admission.max_running),
        ]
        for names, text, value in gauges:
            for name in names:
                yield self._gauge(name, text, value)

    def _histograms(self) -> Iterator[Metric]:
        tallies = self._status.tallies
        for base, text, histogram in (
            ("time_to_first_token_seconds", "From arrival to the first token.", tallies.first_token_s),
            ("time_per_output_token_seconds", "From token to token.", tallies.inter_token_s),
            ("e2e_request_latency_seconds", "From arrival to the last token.", tallies.total_s),
            ("request_prompt_tokens", "Tokens of a prompt.", tallies.prompt_sizes),
            ("request_generation_tokens", "Tokens of a request's completions.", tallies.completion_sizes),
        ):
            yield self._histogram(base, text, histogram)
            yield self._histogram(f"vllm:{base}", text, histogram)
        for name, text, histogram in (
            ("vllm:inter_token_latency_seconds", "From token to token.", tallies.inter_token_s),
            ("vllm:request_queue_time_seconds", "From arrival to the engine.", tallies.queued_s),
            ("vllm:request_prefill_time_seconds", "From the engine to the first token.", tallies.prefill_s),
            ("vllm:request_decode_time_seconds", "From the first token to the last.", tallies.decode_s),
        ):
            yield self._histogram(name, text, histogram)

    def _counter(self, name: str, text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family

    def _labelled(self, name: str, text: str, label: str, values: Mapping[str, float]) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=("model_name", label))
        for key, value in values.items():
            family.add_metric((self._model_name, key), value)
        return family

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
        family = HistogramMetricFamily(name, text, labels=("model_name",))
        family.add_metric((self._model_name,), histogram.cumulative(), histogram.sum)
        return family
