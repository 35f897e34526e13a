"""The server from port to drain: bind, load, warm up, serve, drain. Everything it starts has ended when it returns."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from llama31_serve import __version__
from llama31_serve.errors import StartError
from llama31_serve.server.access_log import AccessLog
from llama31_serve.server.admission import Admission
from llama31_serve.server.control_service import Controlled, ControlService
from llama31_serve.server.detokenizer import Detokenizer
from llama31_serve.server.engine import Engine
from llama31_serve.server.engine_thread import EngineThread, JobOutput
from llama31_serve.server.fmaas_service import FmaasService
from llama31_serve.server.generation_request import Limits
from llama31_serve.server.generator import Generator
from llama31_serve.server.inference_service import InferenceService
from llama31_serve.server.lifecycle import Lifecycle, State
from llama31_serve.server.listener import Listener, Security
from llama31_serve.server.observer import Observer, Observers
from llama31_serve.server.open_requests import OpenRequests
from llama31_serve.server.options import ServerOptions
from llama31_serve.server.refusal import Refusal
from llama31_serve.server.registration import add_servicer
from llama31_serve.server.serving_model import ModelHolder, ServingModel
from llama31_serve.server.status import Status
from llama31_serve.server.tallies import Tallies
from llama31_serve.server.text import TextModel, TextWorker
from llama31_serve.stubs import control_pb2, generation_pb2
from llama31_serve.stubs import inference_pb2 as pb

if TYPE_CHECKING:
    from llama31_serve.server.http.doors import HttpDoors
    from llama31_serve.server.http.listener import HttpListener

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"]
FMAAS_SERVICE = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]
CONTROL_SERVICE = control_pb2.DESCRIPTOR.services_by_name["ControlService"]
LOADING_END_S, STEP_END_S = 2.0, 30.0
LOST_END_S = 1.0  # a step that waits for a lost rank does not end


class Server:
    """One model over gRPC, its control on another address and HTTP if wanted. Made and used on one event loop.

    Raises:
        StartError: certificates that can't be used.
    """

    def __init__(
        self,
        options: ServerOptions,
        load_text: Callable[[], TextModel],
        load_engine: Callable[[], Engine],
        security: Security | None = None,
        management_security: Security | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        security = security or Security()
        management = management_security or security
        self.options = options
        self.lifecycle = Lifecycle(self._set_health)
        self.tallies = Tallies()
        self.observer = Observers((self.tallies, AccessLog(), *observers))
        self.admission = Admission(options.max_running, options.max_per_tenant)
        self.requests = OpenRequests()
        self.engine = EngineThread(load_engine, self._emit, self._engine_broke)
        self.status = Status(self.tallies, self.admission, self.engine, options.status_period_s)
        self.drain_requested = asyncio.Event()
        self.listener = Listener(options.host, options.port, security, self.observer)
        self.control: Listener | None = None
        if options.control_port is not None:
            self.control = Listener(options.control_host, options.control_port, management, self.observer)
        self.holder = ModelHolder(self.lifecycle)
        self.http = self._http(security, management)
        self._broken = asyncio.Event()
        self._lost: str | None = None
        self._loop = asyncio.get_running_loop()
        self._load_text = load_text
        self._text: TextWorker | None = None
        self._detokenizer: Detokenizer | None = None
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]

    @property
    def address(self) -> str:
        """host:port that clients connect to, known after `start`."""
        return self.listener.address

    def http_listeners(self) -> list[tuple[str, HttpListener]]:
        """Those of HTTP and what each is for."""
        return [] if self.http is None else self.http.named()

    async def start(self) -> None:
        """Listen and say NOT_SERVING; nothing of the model is read yet. Raises StartError if a port can't be had."""
        await self._set_health(False)
        services = {
            SERVICE: InferenceService(self.holder, self.observer),
            FMAAS_SERVICE: FmaasService(self.holder, self.observer),
        }
        self._add_services(self.listener, services)
        await self.listener.start()
        if self.control is not None:
            self._add_services(self.control, {CONTROL_SERVICE: self._control_service()})
            await self._health.set(CONTROL_SERVICE.full_name, health_pb2.HealthCheckResponse.SERVING)  # draining or not
            await self.control.start()
        if self.http is not None:
            await self.http.start()

    async def load(self) -> None:
        """Read the tokenizer, then the engine on its own thread, warm it up, and begin to serve."""
        model = await self._loop.run_in_executor(None, self._load_text)
        self._detokenizer = Detokenizer(self._loop, self.engine.abort)
        self._detokenizer.start()
        self.engine.start()
        engine = await asyncio.wrap_future(self.engine.ready)
        text = self._text = TextWorker(
            model,
            engine.compile_grammar,
            allow_special_tokens=self.options.allow_special_tokens,
            num_threads=self.options.tokenizer_threads,
        )
        limits = Limits(
            vocab_size=engine.vocab_size,
            max_seq_len=engine.max_seq_len,
            default_max_tokens=self.options.default_max_tokens,
            max_running=self.options.max_running,
            max_prompt_tokens=self.options.max_prompt_tokens,
            max_new_tokens=self.options.max_new_tokens,
            truncate_prompts=self.options.truncate_prompts,
        )
        parts = (self.lifecycle, self.admission, self.requests, text, self.engine, limits, self.observer)
        generator = Generator(*parts)
        self.holder.model = ServingModel(generator, text, self._model_info(engine, text.model))
        await self.lifecycle.enter(State.SERVING)
        self.status.start()

    async def wait_broken(self) -> None:
        """Wait until the engine is given up or gone; requests that run have failed then and new ones are refused."""
        await self._broken.wait()
        await self.lifecycle.enter(State.FAILED)
        if self._lost is not None:
            for request in self.requests.all():
                request.fail(Refusal(grpc.StatusCode.UNAVAILABLE, f"{self._lost}; try another replica"))

    @property
    def failure(self) -> str:
        """Why `wait_broken` returned."""
        return self._lost or "the engine failed in several steps in a row and is given up; the log says why"

    def lose_engine(self, problem: str) -> None:
        """Serve no longer, as the engine is gone in whatever it does; called from any thread."""

        def note() -> None:
            self._lost = self._lost or problem
            self._broken.set()

        self._loop.call_soon_threadsafe(note)

    async def drain(self) -> bool:
        """Take no new requests and let those that were accepted finish; False if the time was not enough for all."""
        await self.lifecycle.enter(State.DRAINING)
        try:
            await asyncio.wait_for(self.admission.wait_empty(), self.options.drain_timeout_s)
        except TimeoutError:
            stopped = Refusal(grpc.StatusCode.UNAVAILABLE, "the server stopped before this request had finished")
            late = self.requests.all()
            for request in late:
                request.fail(stopped)
            logger.warning("%d requests did not finish within %g s", len(late), self.options.drain_timeout_s)
            return False
        return True

    async def close(self) -> bool:
        """End everything; False if the engine does not come out of its loading or its step.

        A drain before it is what spares the requests that run.
        """
        loading = self.lifecycle.state is State.LOADING
        await self.listener.close()
        if self.control is not None:
            await self.control.close()
        if self.http is not None:
            await self.http.close()
        await self.status.close()
        self.engine.stop()
        in_thread = self._loop.run_in_executor
        patience_s = LOST_END_S if self._lost is not None else LOADING_END_S if loading else STEP_END_S
        ended = await in_thread(None, self.engine.join, patience_s)
        if self._detokenizer is not None:
            await in_thread(None, self._detokenizer.stop, STEP_END_S)
        if self._text is not None:
            await in_thread(None, self._text.close)
        return ended

    def _add_services(self, listener: Listener, services: Mapping[ServiceDescriptor, object]) -> None:
        for service, servicer in services.items():
            add_servicer(listener.grpc, service, servicer)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, listener.grpc)
        names = (*(service.full_name for service in services), health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, listener.grpc)

    def _http(self, security: Security, management: Security) -> HttpDoors | None:
        ports = (self.options.http_port, self.options.management_port, self.options.metrics_port)
        if all(port is None for port in ports):
            return None
        try:
            from llama31_serve.server.http.doors import HttpDoors, HttpParts
        except ImportError as error:
            raise StartError(f"{error}; HTTP needs: pip install 'llama31-serve[server,http]'") from error
        drain = self.drain_requested.set
        parts = HttpParts(self.holder, self.lifecycle, self.observer, self.status, drain)
        return HttpDoors(self.options, security, management, parts)

    def _control_service(self) -> ControlService:
        def generator() -> Generator | None:
            return None if self.holder.model is None else self.holder.model.generator

        parts = Controlled(
            model_name=self.options.model_name,
            lifecycle=self.lifecycle,
            admission=self.admission,
            requests=self.requests,
            generator=generator,
            engine=self.engine,
            request_drain=self.drain_requested.set,
        )
        return ControlService(parts, self.observer)

    def _engine_broke(self) -> None:
        self._loop.call_soon_threadsafe(self._broken.set)

    def _emit(self, outputs: list[JobOutput], time_s: float) -> None:
        assert self._detokenizer is not None
        self._detokenizer.push(outputs, time_s)

    async def _set_health(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", SERVICE.full_name, FMAAS_SERVICE.full_name):
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
