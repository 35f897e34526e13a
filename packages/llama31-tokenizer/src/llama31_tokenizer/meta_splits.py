"""Where Meta's own Tokenizer cuts long texts: every 400,000 characters, and runs of 25,000 with or without white space.

The cuts were a guard against tiktoken's limits and change the ids beside them, so they are off unless asked for
(`compat="meta"`; llama-models 0.3.0, `llama3/tokenizer.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_CHARS = 400_000
MAX_RUN = 25_000
_LONG_RUN = re.compile(rf"\s{{{MAX_RUN + 1},}}|\S{{{MAX_RUN + 1},}}")


def split_as_meta(text: str) -> Iterator[str]:
    """The parts of a text that Meta's Tokenizer encodes one by one."""
    for begin in range(0, len(text), MAX_CHARS):
        chunk = text[begin : begin + MAX_CHARS]
        start = 0
        for run in _LONG_RUN.finditer(chunk):
            for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield chunk[start:cut]
                start = cut
        yield chunk[start:]
