"""A JSON array too large for memory: a text stream in, its elements out one at a time, each with its line number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from llama31_data.errors import DataError

_BLOCK_CHARS = 1 << 20
_WHITE = " \t\r\n"
_NUMBER = "0123456789.eE+-"
_NUMBER_TAIL = 8  # what may be left of a number that stops making sense: "1" of "1.", "1e", "1e+"


class Element(NamedTuple):
    """One element of the array: the line it starts on (from 1), its text, and its value."""

    line: int
    text: str
    value: Any


class _Buffer:
    """A window on the stream: `text[at:]` is unread, `line` is the line of `text[at]`."""

    def __init__(self, stream: IO[str], name: str) -> None:
        self._stream = stream
        self.name = name
        self.text = ""
        self.at = 0
        self.line = 1
        self.ended = False

    def grow(self) -> bool:
        """Reads on, at least doubling what is unread (one huge element stays linear); False at the end."""
        block = self._stream.read(max(_BLOCK_CHARS, len(self.text) - self.at))
        self.text, self.at = self.text[self.at :] + block, 0
        self.ended = not block
        return bool(block)

    def move_to(self, at: int) -> None:
        self.line += self.text.count("\n", self.at, at)
        self.at = at

    def peek(self) -> str:
        """The next character that is not white space, "" at the end."""
        while True:
            at = self.at
            while at < len(self.text) and self.text[at] in _WHITE:
                at += 1
            self.move_to(at)
            if at < len(self.text):
                return self.text[at]
            if not self.grow():
                return ""

    def error(self, message: str) -> DataError:
        return DataError(f"{self.name}:{self.line}: not JSON: {message}")


def iter_array(stream: IO[str], name: str) -> Iterator[Element]:
    """Elements of the one JSON array in `stream`, in order.

    Raises:
        DataError: the text is not one JSON array; the message has the line. Elements before it were already given.
    """
    buffer = _Buffer(stream, name)
    decoder = json.JSONDecoder()
    if buffer.peek() != "[":
        raise buffer.error("expected an array of records that begins with '['")
    buffer.move_to(buffer.at + 1)
    if buffer.peek() == "]":
        buffer.move_to(buffer.at + 1)
    else:
        while True:
            yield _next_element(buffer, decoder)
            delimiter = buffer.peek()
            if delimiter not in (",", "]"):
                raise buffer.error(
                    f"expected ',' or ']' after a record, got {delimiter!r}" if delimiter else "ends early"
                )
            buffer.move_to(buffer.at + 1)
            if delimiter == "]":
                break
            buffer.peek()
    if buffer.peek():
        raise buffer.error("text after the end of the array")


def _may_go_on(error: json.JSONDecodeError, buffer: _Buffer) -> bool:
    """Whether the error may only be the end of the block: it is in an open string, or within a literal of the end."""
    if buffer.ended:
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(buffer.text) - len('"\\uD83D\\uDE00')


def _next_element(buffer: _Buffer, decoder: json.JSONDecoder) -> Element:
    while True:
        try:
            value, end = decoder.raw_decode(buffer.text, buffer.at)
        except json.JSONDecodeError as error:
            if _may_go_on(error, buffer) and buffer.grow():
                continue
            buffer.move_to(min(max(error.pos, buffer.at), len(buffer.text)))
            raise buffer.error(error.msg) from None
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits, thousands of brackets
            raise buffer.error(str(error)) from None
        if not buffer.ended and len(buffer.text) - end < _NUMBER_TAIL and not buffer.text[end:].strip(_NUMBER):
            buffer.grow()  # a number may go on in the next block
            continue
        element = Element(buffer.line, buffer.text[buffer.at : end], value)
        buffer.move_to(end)
        return element
