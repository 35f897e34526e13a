"""Client: the service for ordinary (blocking) Python. Needs neither MindSpore nor a tokenizer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Unpack

import grpc

from llama31_serve.channel import Tls, call_metadata, open_channel, stream_options, unary_options
from llama31_serve.errors import RpcError, UnavailableError
from llama31_serve.requests import Message, Options, Prompt, build_chat, build_generate, build_tokenize
from llama31_serve.results import Chunk, GenerateResult, ModelInfo, model_info_of, result_of_chat, result_of_generate
from llama31_serve.retries import StreamAttempts, stream_cancelled
from llama31_serve.status_details import our_errors
from llama31_serve.streaming import StreamState
from llama31_serve.stubs import inference_pb2 as pb
from llama31_serve.stubs.inference_pb2_grpc import InferenceServiceStub


class TextStream:
    """Iterator of a running generation's chunks. Leaving its `with` block, or `cancel`, ends it on the server too.

    `request_id` and `prompt_tokens` are known from the first chunk on, `result` after the last.
    """

    def __init__(self, start: Callable[[float | None], Any], attempts: StreamAttempts) -> None:
        self._start = start
        self._attempts = attempts
        self._state = StreamState()
        self._cancelled = threading.Event()
        self._call = start(attempts.begin())

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> Chunk:
        while (response := self._read()) is not None:
            chunk = self._state.take(response)
            if chunk is not None:
                return chunk
        raise StopIteration

    def _read(self) -> Any:
        """The next response, None at the end. A call that was refused before its first one is made again."""
        while True:
            try:
                with our_errors():
                    response = next(self._call, None)
            except RpcError as error:
                if self._cancelled.wait(self._attempts.pause_s(error)):
                    raise stream_cancelled() from None
                self._call = self._start(self._attempts.begin())
                if self._cancelled.is_set():  # between the wait and the new call, by another thread
                    self._call.cancel()
            else:
                self._attempts.answered()
                return response

    def __enter__(self) -> TextStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """End the generation; harmless when it has ended."""
        self._cancelled.set()
        self._call.cancel()

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self._state.request_id

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt in tokens."""
        return self._state.prompt_tokens

    @property
    def result(self) -> GenerateResult | None:
        """The complete answer, once the stream has ended."""
        return self._state.result


class Client:
    """Channels to a server, or to several replicas behind one name. Safe to use from several threads.

    Args:
        target: "host:port", or a gRPC name such as "dns:///llama.example:50051".
        tls: use TLS; None is plaintext.
        token: bearer token sent with every call.
        timeout_s: deadline of every call that does not give its own; None waits for ever.
        max_attempts: how often a call that no server has begun to answer is tried.

    All calls raise RpcError subclasses (llama31_serve.errors).
    """

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        tls: Tls | None = None,
        token: str | None = None,
        timeout_s: float | None = None,
        max_attempts: int = 4,
    ) -> None:
        self._channel = open_channel(target, tls, unary_options(target, tls, max_attempts))
        self._stream_channel = open_channel(target, tls, stream_options(target, tls))
        self._stub: Any = InferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._streams: Any = InferenceServiceStub(self._stream_channel)  # type: ignore[no-untyped-call]
        self._metadata = call_metadata(token)
        self._timeout_s = timeout_s
        self._max_attempts = max_attempts

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channels; calls that run are cancelled."""
        self._channel.close()
        self._stream_channel.close()

    def generate(
        self,
        prompt: Prompt,
        *,
        add_bos: bool = False,
        parse_special_tokens: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> GenerateResult:
        """Continue a text, token ids or a conversation.

        Args:
            prompt: what to continue.
            add_bos: put the beginning-of-sequence token before a text.
            parse_special_tokens: read control tokens in a text, if the server allows it.
            timeout_s: deadline of this call.
            options: see Options.
        """
        request = build_generate(prompt, options, add_bos=add_bos, parse_special_tokens=parse_special_tokens)
        return result_of_generate(self._call(self._stub.Generate, request, timeout_s))

    def generate_stream(
        self,
        prompt: Prompt,
        *,
        add_bos: bool = False,
        parse_special_tokens: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> TextStream:
        """`generate`, with the text as it is made."""
        request = build_generate(prompt, options, add_bos=add_bos, parse_special_tokens=parse_special_tokens)
        return self._stream(self._streams.GenerateStream, pb.GenerateStreamRequest(request=request), timeout_s)

    def chat(
        self, messages: Sequence[Message], *, timeout_s: float | None = None, **options: Unpack[Options]
    ) -> GenerateResult:
        """The assistant's answer to a conversation."""
        return result_of_chat(self._call(self._stub.Chat, build_chat(messages, options), timeout_s))

    def chat_stream(
        self, messages: Sequence[Message], *, timeout_s: float | None = None, **options: Unpack[Options]
    ) -> TextStream:
        """`chat`, with the text as it is made."""
        request = pb.ChatStreamRequest(request=build_chat(messages, options))
        return self._stream(self._streams.ChatStream, request, timeout_s)

    def tokenize(
        self,
        prompt: str | Sequence[Message],
        *,
        add_bos: bool = False,
        parse_special_tokens: bool = False,
        timeout_s: float | None = None,
    ) -> list[int]:
        """Token ids, exactly as `generate` would read the prompt."""
        request = build_tokenize(prompt, add_bos=add_bos, parse_special_tokens=parse_special_tokens)
        return list(self._call(self._stub.Tokenize, request, timeout_s).token_ids)

    def detokenize(
        self, token_ids: Sequence[int], *, include_special_tokens: bool = False, timeout_s: float | None = None
    ) -> str:
        """Text of token ids."""
        request = pb.DetokenizeRequest(token_ids=token_ids, include_special_tokens=include_special_tokens)
        text: str = self._call(self._stub.Detokenize, request, timeout_s).text
        return text

    def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """What model the server has."""
        return model_info_of(self._call(self._stub.GetModelInfo, pb.GetModelInfoRequest(), timeout_s))

    def is_serving(self, *, timeout_s: float | None = 5.0) -> bool:
        """Whether the server takes requests: it has loaded and warmed up, and is not draining.

        Raises UnavailableError if nobody answers, or if none of several servers takes requests.
        """
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        check = health_pb2_grpc.HealthStub(self._channel).Check
        response = self._call(check, health_pb2.HealthCheckRequest(), timeout_s)
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def wait_until_serving(self, timeout_s: float, *, poll_s: float = 0.1) -> None:
        """Wait for a server that starts. Raises UnavailableError if it does not serve within `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                if self.is_serving(timeout_s=max(0.1, deadline_s - time.monotonic())):
                    return
            except UnavailableError:
                pass  # nobody listens yet
            if time.monotonic() >= deadline_s:
                raise UnavailableError(grpc.StatusCode.UNAVAILABLE, f"the server does not serve after {timeout_s:g} s")
            time.sleep(poll_s)

    def _call(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        with our_errors():
            return method(request, timeout=self._deadline_s(timeout_s), metadata=self._metadata)

    def _stream(self, method: Any, request: Any, timeout_s: float | None) -> TextStream:
        def start(left_s: float | None) -> Any:
            return method(request, timeout=left_s, metadata=self._metadata)

        return TextStream(start, StreamAttempts(self._max_attempts, self._deadline_s(timeout_s)))

    def _deadline_s(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout_s
