"""The package's errors: `DataError` ends a run, `RecordError` only takes one record to the rejects file."""

from __future__ import annotations

from llama31_tokenizer.errors import Llama31Error

_JSON_NAMES: dict[type, str] = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


class DataError(Llama31Error):
    """A run over data cannot start or go on; the message says what, where, and what to change."""


class RecordError(DataError):
    """One record cannot be used; the message is the reason in the rejects file. With `--strict` it ends the run."""


class ResumableError(DataError):
    """A run had to stop, but not for its input: its directory is kept, and the same command goes on from there."""


def kind_of(value: object) -> str:
    """What a value is in JSON's words, which are those of whoever wrote the record; Parquet has other types, too."""
    return _JSON_NAMES.get(type(value), f"of type {type(value).__name__}")
