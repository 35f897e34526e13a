"""The package's errors: `DataError` ends a run, `RecordError` only takes one record to the rejects file."""

from __future__ import annotations

from llama31_tokenizer.errors import Llama31Error


class DataError(Llama31Error):
    """A run over data cannot start or go on; the message says what, where, and what to change."""


class RecordError(DataError):
    """One record cannot be used; the message is the reason in the rejects file. With `--strict` it ends the run."""


class ResumableError(DataError):
    """A run had to stop, but not for its input: its directory is kept, and the same command goes on from there."""
