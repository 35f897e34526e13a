"""The wording of what is wrong with a configuration."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pydantic import ValidationError


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """The nearest known key, or all of them if none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(key, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(names)}"


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's complaints in one line: where, what, and what was got."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    if not where:
        return message
    got = "" if problem["type"] == "missing" or "got" in message else f", got {problem['input']!r}"
    return f"{where}: {message}{got}"
