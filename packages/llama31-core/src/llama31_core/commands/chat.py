"""`llama31-core chat`: a conversation on the terminal, or on pipes: what a user writes in, answers out."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from llama31_core.checkpoint.staging import staged_file
from llama31_core.commands.chat_session import ONE_ANSWER, ChatSession
from llama31_core.commands.engine_options import add_engine_options, plan_engine
from llama31_core.commands.interrupts import handled_by
from llama31_core.commands.model_source import add_source_arguments, load_source
from llama31_core.commands.prompts import PromptEncoder
from llama31_core.commands.records import stop_strings
from llama31_core.commands.sampling_options import add_sampling_options, given_options
from llama31_core.errors import ConfigError, Llama31Error, RequestError
from llama31_core.inference.sampling_params import SamplingParams
from llama31_tokenizer.errors import Llama31Error as TokenizerSideError

DEFAULTS: Mapping[str, Any] = {"max_tokens": 1024, "temperature": 0.6, "top_p": 0.9}
HELP = """\
/reset            forget the dialog
/system [TEXT]    what the system says first; without a text, what it says now
/set NAME=VALUE   a sampling parameter; without one, all that are set
/adapter [NAME]   answer with a LoRA adapter; without a name, with the base model
/stats            tokens, and how many of them were in the cache
/save FILE        the dialog as JSON
/exit             leave, as Ctrl-D does
A line that ends with \\ goes on in the next one; so does everything between two lines of three quotes, \"\"\".
Ctrl-C stops an answer."""
_PROMPT, _MORE, _QUOTES = ">>> ", "... ", '"""'


def add_parser(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Declares the command."""
    parser = commands.add_parser("chat", parents=[shared], help="talk with a model", description=__doc__)
    add_source_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the system says first")
    add_sampling_options(parser, DEFAULTS)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Talk until /exit or the end of the input."""
    source = load_source(arguments)
    from_run = None if source.sampling is None else {"max_tokens": DEFAULTS["max_tokens"], **source.sampling}
    options = given_options(arguments, from_run or DEFAULTS)
    for name in ONE_ANSWER:
        if options.pop(name, 1) != 1:
            raise RequestError(f"--{name} is 1 in a chat: there is one answer to each message")
    SamplingParams(**options)
    stop = stop_strings(arguments.stop)
    encoder = PromptEncoder(source.tokenizer, system=arguments.system)
    if source.parallel.world_size > 1:
        raise ConfigError(f"{source.run_file}: use_parallel is True, a chat runs on one device; set it to False")
    setup = plan_engine(arguments, source, **{**source.engine, "max_batch_size": 1})
    engine = setup.build()
    engine.warm_up()
    Repl(ChatSession(engine, encoder, options, stop, arguments.adapter)).run()
    return 0


class Repl:
    """Reads lines, runs commands, prints answers.

    Args:
        session: the conversation.
        read: gives a line for a prompt; raises EOFError at the end.
    """

    def __init__(self, session: ChatSession, read: Callable[[str], str] | None = None) -> None:
        self._session = session
        self._is_terminal = sys.stdin.isatty()
        self._read = read or _reader(self._is_terminal)
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: print(HELP),
            "/reset": lambda _: session.reset(),
            "/system": self._system,
            "/set": self._set,
            "/adapter": lambda name: session.set_adapter(name or None),
            "/stats": lambda _: print(session.stats()),
            "/save": self._save,
        }

    def run(self) -> None:
        """Until /exit or the end of the input."""
        if self._is_terminal:
            print("/help says what there is, /exit leaves")
        while True:
            try:
                text = self._message()
            except EOFError:
                return
            except KeyboardInterrupt:
                print("\n/exit or Ctrl-D leaves")
                continue
            if text.strip() == "/exit":
                return
            try:
                self._handle(text)
            except (Llama31Error, TokenizerSideError, OSError) as error:
                print(f"error: {error}", file=sys.stderr, flush=True)

    def _handle(self, text: str) -> None:
        word, _, rest = text.strip().partition(" ")
        if word in self._commands:
            self._commands[word](rest.strip())
        elif word.startswith("/") and "\n" not in text:
            raise RequestError(f"there is no command {word}; /help says what there is")
        elif text.strip():
            with _stop_flag() as is_stopped:
                for piece in self._session.answer(text, is_stopped):
                    print(piece, end="", flush=True)
                print(" [stopped]" if is_stopped() else "", flush=True)

    def _message(self) -> str:
        """The next message, which may be of several lines."""
        line = self._read(_PROMPT)
        if line.strip() == _QUOTES:
            lines = []
            with suppress(EOFError):
                while (line := self._read(_MORE)).strip() != _QUOTES:
                    lines.append(line)
            return "\n".join(lines)
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._read(_MORE))
        return "\n".join(lines)

    def _system(self, text: str) -> None:
        if text:
            self._session.encoder.system = text
        else:
            print(self._session.encoder.system or "(nothing)")

    def _set(self, assignment: str) -> None:
        if assignment:
            self._session.set_option(assignment)
        else:
            print(" ".join(f"{name}={value}" for name, value in self._session.options.items()))

    def _save(self, name: str) -> None:
        if not name:
            raise RequestError("/save needs the name of a file")
        session = self._session
        content = {"system": session.encoder.system, "messages": session.messages, "options": session.options}
        with staged_file(Path(name)) as part:
            part.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        print(f"saved {name}")


@contextmanager
def _stop_flag() -> Iterator[Callable[[], bool]]:
    """Within the block Ctrl-C sets a flag: a step of the engine is never cut in two."""
    stopped: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        stopped.append(number)

    with handled_by(note, (signal.SIGINT,)):
        yield lambda: bool(stopped)


def _reader(is_terminal: bool) -> Callable[[str], str]:
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  gives input() its history and editing
        return input

    def read(prompt: str) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    return read
