"""`llama31-serve generate` and `chat`: ask a running server, and print the text as it comes."""

from __future__ import annotations

import argparse
import sys

from llama31_serve.client import TextStream
from llama31_serve.commands import connection
from llama31_serve.requests import Options


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `generate`."""
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--add_bos", action="store_true", help="put the beginning-of-sequence token first")
    _add_option_arguments(parser)


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `chat`."""
    parser.add_argument(
        "message", nargs="?", help="what to ask; without it, lines of standard input make a conversation"
    )
    parser.add_argument("--system", help="system message")
    _add_option_arguments(parser)


def run_generate(arguments: argparse.Namespace) -> int:
    """Continue one text."""
    with connection.connect(arguments) as client:
        _print_stream(client.generate_stream(arguments.prompt, add_bos=arguments.add_bos, **_options(arguments)))
    return 0


def run_chat(arguments: argparse.Namespace) -> int:
    """Answer one message, or every line of standard input in turn."""
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    lines = sys.stdin if arguments.message is None else [arguments.message]
    with connection.connect(arguments) as client:
        for line in lines:
            messages.append({"role": "user", "content": line.rstrip("\n")})
            answer = _print_stream(client.chat_stream(messages, **_options(arguments)))
            messages.append({"role": "assistant", "content": answer})
    return 0


def _add_option_arguments(parser: argparse.ArgumentParser) -> None:
    connection.add_arguments(parser)
    parser.add_argument("--max_tokens", type=int)
    parser.add_argument("--temperature", type=float, help="0 is greedy")
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", metavar="TEXT", help="string that ends the text; may be repeated")


def _options(arguments: argparse.Namespace) -> Options:
    given: Options = {}
    if arguments.max_tokens is not None:
        given["max_tokens"] = arguments.max_tokens
    if arguments.temperature is not None:
        given["temperature"] = arguments.temperature
    if arguments.top_k is not None:
        given["top_k"] = arguments.top_k
    if arguments.top_p is not None:
        given["top_p"] = arguments.top_p
    if arguments.seed is not None:
        given["seed"] = arguments.seed
    if arguments.stop is not None:
        given["stop"] = arguments.stop
    return given


def _print_stream(stream: TextStream) -> str:
    pieces: list[str] = []
    with stream:
        for chunk in stream:
            print(chunk.text, end="", flush=True)
            pieces.append(chunk.text)
    print()
    return "".join(pieces)
