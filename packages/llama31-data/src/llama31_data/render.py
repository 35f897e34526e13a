"""A record in, text for a person out, with the trained part told apart by colour or by brackets."""

from __future__ import annotations

import re
from itertools import groupby

from llama31_data.reader import Columns, Sample, samples_of
from llama31_tokenizer import Tokenizer

_TRAINED = "\x1b[30;42m"  # black on green
_SPECIAL = "\x1b[2m"  # faint
_HEADING = "\x1b[1m"
_RESET = "\x1b[0m"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def render_record(number: int, record: Columns, tokenizer: Tokenizer, pad_id: int, *, colour: bool) -> str:
    """A heading with the record's figures, then each of its samples."""
    samples = samples_of(record, pad_id)
    used = sum(len(sample.ids) for sample in samples)
    trained = sum(int(sample.trained.sum()) for sample in samples)
    parts = [
        f"record {number}",
        *([f"{len(samples)} samples"] if "segment_ids" in record else []),
        f"{used} tokens",
        f"{trained} trained on",
        f"{len(record['input_ids']) - used} padding",
    ]
    lines = [_styled(" · ".join(parts), _HEADING, colour)]
    for position, sample in enumerate(samples, start=1):
        if len(samples) > 1:
            lines.append(_styled(f"--- sample {position} of {len(samples)}", _HEADING, colour))
        lines.append(render_sample(sample, tokenizer, colour=colour))
    return "\n".join(lines)


def render_sample(sample: Sample, tokenizer: Tokenizer, *, colour: bool) -> str:
    """The text of a sample, `[[…]]` or green where it is trained on. Control characters are written as escapes."""
    special = frozenset(tokenizer.special_tokens.values())
    text = ""
    tokens = zip(sample.ids.tolist(), sample.trained.tolist(), strict=True)
    for trained, run in groupby(tokens, key=lambda token: token[1]):
        pieces = []
        for is_special, ids in groupby((id for id, _ in run), key=lambda id: id in special):
            piece = _CONTROL.sub(lambda match: repr(match.group())[1:-1], tokenizer.decode(list(ids)))
            pieces.append(_styled(piece, _SPECIAL, colour and not trained) if is_special else piece)
        whole = "".join(pieces)
        if not trained:
            text += whole
        elif colour:
            text += "\n".join(_styled(line, _TRAINED, line != "") for line in whole.split("\n"))
        else:
            text += f"[[{whole}]]"
    return text


def _styled(text: str, style: str, on: bool) -> str:
    return f"{style}{text}{_RESET}" if on else text
