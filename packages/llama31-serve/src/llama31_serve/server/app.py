"""The server from port to drain: bind, load, warm up, serve, drain. Everything it starts has ended when it returns."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from llama31_serve import __version__
from llama31_serve.errors import StartError
from llama31_serve.server.admission import Admission
from llama31_serve.server.detokenizer import Detokenizer
from llama31_serve.server.engine import Engine
from llama31_serve.server.engine_thread import EngineThread, JobOutput
from llama31_serve.server.generation import Generator
from llama31_serve.server.inference_service import InferenceService, ServingModel
from llama31_serve.server.lifecycle import Lifecycle, State
from llama31_serve.server.options import ServerOptions, check_address
from llama31_serve.server.refusal import Refusal
from llama31_serve.server.text import TextModel, TextWorker
from llama31_serve.server.validation import Limits
from llama31_serve.stubs import inference_pb2 as pb
from llama31_serve.stubs.inference_pb2_grpc import add_InferenceServiceServicer_to_server

logger = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
CLOSE_GRACE_S = 1.0
LOADING_END_S, STEP_END_S = 2.0, 30.0
GRPC_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second server on the same port must fail, not share it
    ("grpc.keepalive_time_ms", 30_000),  # a client that vanished without a word is noticed
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
)


class Server:
    """One model on one gRPC address. Made and used on one event loop."""

    def __init__(
        self, options: ServerOptions, load_text: Callable[[], TextModel], load_engine: Callable[[], Engine]
    ) -> None:
        self.options = options
        self.port = 0
        self.lifecycle = Lifecycle(self._set_health)
        self.admission = Admission(options.max_running)
        self.engine = EngineThread(load_engine, self._emit, self._engine_broke)
        self._broken = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._load_text = load_text
        self._text: TextWorker | None = None
        self._detokenizer: Detokenizer | None = None
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._service = InferenceService(self.lifecycle)
        self._grpc = grpc.aio.server(options=GRPC_OPTIONS)

    @property
    def address(self) -> str:
        """host:port that clients connect to, known after `start`."""
        host = f"[{self.options.host}]" if ":" in self.options.host else self.options.host
        return f"{host}:{self.port}"

    async def start(self) -> None:
        """Listen and say NOT_SERVING; nothing of the model is read yet. Raises StartError if the port can't be had."""
        add_InferenceServiceServicer_to_server(self._service, self._grpc)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        await self._set_health(False)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc)
        check_address(self.options.host, self.options.port)  # gRPC does not say why it can't
        try:
            self.port = self._grpc.add_insecure_port(self.options.address)
        except RuntimeError as error:
            raise StartError(f"cannot listen on {self.options.address}; choose another --host or --port") from error
        await self._grpc.start()

    async def load(self) -> None:
        """Read the tokenizer, then the engine on its own thread, warm it up, and begin to serve."""
        model = await self._loop.run_in_executor(None, self._load_text)
        text = self._text = TextWorker(model, allow_special_tokens=self.options.allow_special_tokens)
        self._detokenizer = Detokenizer(self._loop, self.engine.abort)
        self._detokenizer.start()
        self.engine.start()
        engine = await asyncio.wrap_future(self.engine.ready)
        limits = Limits(
            vocab_size=engine.vocab_size,
            max_seq_len=engine.max_seq_len,
            default_max_tokens=self.options.default_max_tokens,
            max_running=self.options.max_running,
        )
        generator = Generator(self.lifecycle, self.admission, text, self.engine, limits)
        self._service.model = ServingModel(generator, text, self._model_info(engine, text.model))
        await self.lifecycle.enter(State.SERVING)

    async def wait_broken(self) -> None:
        """Wait until the engine is given up; requests that run have failed by then and new ones are refused."""
        await self._broken.wait()
        await self.lifecycle.enter(State.FAILED)

    async def drain(self) -> bool:
        """Take no new requests and let those that were accepted finish; False if the time was not enough for all."""
        await self.lifecycle.enter(State.DRAINING)
        try:
            await asyncio.wait_for(self.admission.wait_empty(), self.options.drain_timeout_s)
        except TimeoutError:
            stopped = Refusal(grpc.StatusCode.UNAVAILABLE, "the server stopped before this request had finished")
            count = self._service.model.generator.fail_all(stopped) if self._service.model is not None else 0
            logger.warning("%d requests did not finish within %g s", count, self.options.drain_timeout_s)
            return False
        return True

    async def close(self) -> bool:
        """End everything; False if the engine does not come out of its loading or its step.

        A drain before it is what spares the requests that run.
        """
        loading = self.lifecycle.state is State.LOADING
        await self._grpc.stop(CLOSE_GRACE_S)
        self.engine.stop()
        in_thread = self._loop.run_in_executor
        ended = await in_thread(None, self.engine.join, LOADING_END_S if loading else STEP_END_S)
        if self._detokenizer is not None:
            await in_thread(None, self._detokenizer.stop, STEP_END_S)
        if self._text is not None:
            await in_thread(None, self._text.close)
        return ended

    def _engine_broke(self) -> None:
        self._loop.call_soon_threadsafe(self._broken.set)

    def _emit(self, outputs: list[JobOutput], time_s: float) -> None:
        assert self._detokenizer is not None
        self._detokenizer.push(outputs, time_s)

    async def _set_health(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", SERVICE_NAME):
            await self._health.set(service, status)

    def _model_info(self, engine: Engine, text: TextModel) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(
            model_name=self.options.model_name,
            vocab_size=engine.vocab_size,
            max_seq_len=engine.max_seq_len,
            default_max_tokens=self.options.default_max_tokens,
            bos_token_id=text.tokenizer.bos_id,
            eos_token_ids=engine.eos_token_ids,
            tokenizer_sha256=text.tokenizer.sha256,
            server_version=__version__,
        )
