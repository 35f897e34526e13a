"""The management port: liveness, readiness, facts about the server, and its orderly end."""

from __future__ import annotations

from collections.abc import Callable

from llama31_serve import __version__
from llama31_serve.server.http.call import Call
from llama31_serve.server.lifecycle import Lifecycle, State
from llama31_serve.server.options import ServerOptions
from llama31_serve.server.serving_model import ModelHolder


class ManagementRoutes:
    """The handlers."""

    def __init__(
        self, lifecycle: Lifecycle, holder: ModelHolder, options: ServerOptions, request_drain: Callable[[], None]
    ) -> None:
        self._lifecycle = lifecycle
        self._holder = holder
        self._options = options
        self._request_drain = request_drain

    async def live(self, call: Call) -> None:
        """The process does its work: 200 in every state but that of a failed engine."""
        if self._lifecycle.state is State.FAILED:
            self._lifecycle.require_serving()
        await call.answer_bytes(b"", "text/plain")

    async def ready(self, call: Call) -> None:
        """New requests are taken: 200 after the warm-up and until the drain, else 503."""
        self._lifecycle.require_serving()
        await call.answer_bytes(b"", "text/plain")

    async def info(self, call: Call) -> None:
        """TGI's /info in MindIE's form; what has no meaning here is null."""
        options = self._options
        model = {
            "model_device_type": options.device_type,
            "model_dtype": options.model_dtype,
            "model_id": options.model_name,
            "model_pipeline_tag": "text-generation",
            "model_sha": None,
            "max_total_tokens": self._holder.loaded().info.max_seq_len,
        }
        await call.answer(
            {
                "docker_label": None,
                "max_batch_total_tokens": options.engine.max_prefill_tokens,
                "max_best_of": 1,
                "max_concurrent_requests": options.max_running,
                "max_stop_sequences": None,
                "max_waiting_tokens": None,
                "sha": None,
                "validation_workers": None,
                "version": __version__,
                "waiting_served_ratio": None,
                "models": [model],
                "max_input_length": options.max_prompt_tokens,
            }
        )

    async def stop(self, call: Call) -> None:
        """What SIGTERM does: requests that run finish, new ones are refused, the process ends."""
        self._request_drain()
        await call.answer({"result": "the server drains and stops"})
