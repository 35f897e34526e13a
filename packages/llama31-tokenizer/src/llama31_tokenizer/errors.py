"""The errors of this package: each is a `TokenizerError`, its message one sentence that says what to change."""

from __future__ import annotations


class Llama31Error(Exception):
    """Base of the errors of the llama31 packages that build on this one."""


class TokenizerError(Llama31Error):
    """A vocabulary file, a text, an id or a dialog that cannot be used as asked."""
