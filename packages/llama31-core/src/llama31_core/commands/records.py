"""Lines of a JSON Lines file to requests: one of prompt, messages and token_ids, options of its own, and an id."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama31_core.commands.prompts import PromptEncoder
from llama31_core.commands.sampling_options import OPTIONS, params_from_json
from llama31_core.errors import Llama31Error, RequestError
from llama31_core.inference.sampling_params import SamplingParams
from llama31_core.validation import did_you_mean
from llama31_tokenizer.errors import Llama31Error as TokenizerSideError

_SOURCES = ("prompt", "messages", "token_ids")
_KEYS = ("id", "adapter", "stop", *_SOURCES)


@dataclass(frozen=True)
class Record:
    """One request of a file; `key` is its own id, or the number of its line."""

    line: int
    key: Any
    prompt_ids: list[int]
    params: SamplingParams
    adapter: str | None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reject:
    """A line that is no request, and why."""

    line: int
    key: Any
    error: str


class RecordReader:
    """Reads requests.

    Args:
        encoder: for prompts and messages.
        defaults: sampling parameters of records that do not say otherwise.
        adapter: the adapter of such records.
        stop: texts that end their answers.
        check: raises Llama31Error for a request that the engine would refuse.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        defaults: Mapping[str, Any],
        adapter: str | None,
        stop: tuple[str, ...],
        check: Callable[[Record], None],
    ) -> None:
        self._encoder = encoder
        self._defaults = defaults
        self._adapter = adapter
        self._stop = stop
        self._check = check

    def read(self, path: Path) -> Iterator[Record | Reject]:
        """What each line of a file is; lines of white space are none."""
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield self._read_line(number, line)

    def _read_line(self, number: int, line: bytes) -> Record | Reject:
        key: Any = number
        try:
            values = _parse(line)
            key = values.get("id", number)
            record = self._build(number, key, values)
            self._check(record)
        except (Llama31Error, TokenizerSideError) as error:
            return Reject(number, key, str(error))
        return record

    def _build(self, number: int, key: Any, values: dict[str, Any]) -> Record:
        if not isinstance(key, str | int | float) or isinstance(key, bool):
            raise RequestError(f"id is {key!r}, expected a string or a number")
        sources = [name for name in _SOURCES if name in values]
        if len(sources) != 1:
            got = " and ".join(sources) or "none"
            raise RequestError(f"a record has one of {', '.join(_SOURCES)}, got {got}")
        for name in values:
            if name not in _KEYS and name not in OPTIONS:
                raise RequestError(f"unknown key {name!r}; {did_you_mean(name, (*_KEYS, *OPTIONS))}")
        options = {name: value for name, value in values.items() if name in OPTIONS}
        adapter = values.get("adapter", self._adapter)
        if adapter is not None and not isinstance(adapter, str):
            raise RequestError(f"adapter is {adapter!r}, expected a name")
        prompt_ids = self._encode(sources[0], values[sources[0]])
        params = params_from_json(options, self._defaults)
        return Record(number, key, prompt_ids, params, adapter, stop_strings(values.get("stop", self._stop)))

    def _encode(self, source: str, value: Any) -> list[int]:
        if source == "prompt":
            if not isinstance(value, str):
                raise RequestError(f"prompt is {value!r}, expected a string")
            return self._encoder.encode_prompt(value)
        if not isinstance(value, list):
            raise RequestError(f"{source} is {value!r}, expected a list")
        return self._encoder.encode_messages(value) if source == "messages" else value


def stop_strings(value: Any) -> tuple[str, ...]:
    """The texts that end an answer, from one or a list of them.

    Raises:
        RequestError: something else, or an empty one.
    """
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) and stop for stop in stops):
        raise RequestError(f"stop is {value!r}, expected a text or a list of texts, none of them empty")
    return tuple(stops)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise RequestError(f"a JSON {type(values).__name__}, expected an object")
    return values
