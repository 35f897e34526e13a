"""fschat's templates by name: a conversation in, ids and the assistant's exact token ranges out.

fschat gives only the finished text. So a conversation of placeholders is rendered once for each number of turns: what
lies between the placeholders is the template's own text, and where the assistant's part begins is where the same
rendering without the answer ends. Real messages are then put in place of the placeholders, piece by piece.

As in MindFormers' script, a `</s>` of the template is the vocabulary's end-of-text token, and a conversation begins
with the begin-of-text token. Names of special tokens in messages stay plain text.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from llama31_data.errors import DataError, RecordError
from llama31_data.samples import Encoded
from llama31_tokenizer import Tokenizer

_SYSTEM_SLOT = "system"
_SLOT = re.compile("\ue000(\\w+)\ue001")


def _mark(slot: object) -> str:
    return f"\ue000{slot}\ue001"


class _Piece(NamedTuple):
    """Part of a rendering: template text (`slot` None) or the place of a message."""

    text: str
    slot: str | None
    trained: bool


@dataclass(frozen=True)
class _Skeleton:
    pieces: tuple[_Piece, ...]

    def fill(self, contents: dict[str, str]) -> str:
        return "".join(contents[piece.slot] if piece.slot is not None else piece.text for piece in self.pieces)


class FschatTemplate:
    """A template of the fschat package.

    Raises:
        DataError: fschat is not installed, has no template of that name or cannot render it, or the vocabulary has no
            end-of-text token.
    """

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        try:
            from fastchat.conversation import conv_templates, get_conv_template
        except ImportError as error:
            raise DataError(f"--template {name}: needs fschat: pip install 'llama31-data[fschat]'") from error
        if name not in conv_templates:
            near = difflib.get_close_matches(name, ["chat", "llama3.1", *conv_templates], n=3, cutoff=0.4)
            raise DataError(
                f"--template {name}: unknown; nearest are {', '.join(near or ['chat', 'llama3.1', 'vicuna_v1.1'])}"
            )
        if tokenizer.eos_id is None:
            raise DataError(f"--template {name}: the vocabulary has no end-of-text token to close an answer with")
        self.name = name
        self._new = get_conv_template
        self._tokenizer = tokenizer
        self._special = {"</s>": tokenizer.eos_id, **tokenizer.special_tokens}
        if tokenizer.bos_id is not None:
            self._special.setdefault("<s>", tokenizer.bos_id)
        self._split = re.compile("(" + "|".join(re.escape(text) for text in self._special) + ")")
        self._skeletons: dict[tuple[int, bool], _Skeleton] = {}
        try:
            self._skeletons[2, False] = self._build(2, False)
        except (ValueError, RecordError) as error:  # some of fschat's names are of services, and have no text form
            raise DataError(f"--template {name}: cannot be written as text: {error}") from error

    def encode(self, messages: Sequence[dict[str, str]]) -> Encoded:
        """See `Template.encode`."""
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        turns = [message["content"] for message in messages[system is not None :]]
        key = (len(turns), system is not None)
        skeleton = self._skeletons.get(key) or self._skeletons.setdefault(key, self._build(*key))
        contents = {str(number): text for number, text in enumerate(turns)}
        if system is not None:
            contents[_SYSTEM_SLOT] = system
        if all(contents.values()) and skeleton.fill(contents) != self._render(turns, system):
            raise RecordError(f"template {self.name!r} rewrites the text of this record, so its parts have no place")
        return self._tokenize(skeleton, contents)

    def _render(self, turns: Sequence[str | None], system: str | None) -> str:
        conversation: Any = self._new(self.name)
        if system is not None:
            conversation.set_system_message(system)
        for number, text in enumerate(turns):
            conversation.append_message(conversation.roles[number % 2], text)
        return str(conversation.get_prompt())

    def _build(self, num_turns: int, has_system: bool) -> _Skeleton:
        marks = [_mark(number) for number in range(num_turns)]
        system = _mark(_SYSTEM_SLOT) if has_system else None
        text = self._render(marks, system)
        if any(text.count(mark) != 1 for mark in marks) or (system is not None and text.count(system) != 1):
            raise RecordError(f"template {self.name!r} does not show every message of this conversation")
        cuts = []
        for number in range(1, num_turns, 2):
            slot = text.index(marks[number])
            prompt = self._render([*marks[:number], None], system)
            start = len(prompt) if text.startswith(prompt) else slot
            stop = self._end_of_turn(text, slot + len(marks[number]), self._render(marks[: number + 1], system))
            cuts.append((start, stop))
        return _Skeleton(tuple(_pieces(text, cuts)))

    def _end_of_turn(self, text: str, slot_end: int, until_here: str) -> int:
        """Where the turn that fills a slot ends: after its end token, or after its separator without trailing space."""
        if not text.startswith(until_here):
            return slot_end
        separator = until_here[slot_end:]
        token = self._split.search(separator)
        if token:
            return slot_end + token.end()
        return slot_end + len(separator.rstrip() or separator)

    def _tokenize(self, skeleton: _Skeleton, contents: dict[str, str]) -> Encoded:
        """Runs of plain text are tokenised as a whole, across pieces; a run ends at a special token, and where the
        trained part begins or ends: there the model's prompt ends at inference, too."""
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        run, trained, start = "", False, 0
        pieces = skeleton.pieces
        if self._tokenizer.bos_id is not None and not self._begins_with_bos(pieces[0]):
            ids.append(self._tokenizer.bos_id)
        for number, piece in enumerate(pieces):
            if piece.trained != trained:
                ids += self._tokenizer.encode(run) if run else []
                run = ""
                if trained:
                    spans.append((start, len(ids)))
                trained, start = piece.trained, len(ids)
            if piece.slot is not None:
                run += contents[piece.slot]
            elif not (trained and piece.text.isspace() and _is_empty_answer(pieces, number, contents)):
                for part in self._split.split(piece.text):
                    if part in self._special:
                        ids += self._tokenizer.encode(run) if run else []
                        ids.append(self._special[part])
                        run = ""
                    else:
                        run += part
        ids += self._tokenizer.encode(run) if run else []
        if trained:
            spans.append((start, len(ids)))
        return Encoded(ids, spans)

    def _begins_with_bos(self, piece: _Piece) -> bool:
        token = self._split.match(piece.text) if piece.slot is None else None
        return token is not None and self._special[token.group()] == self._tokenizer.bos_id


def _is_empty_answer(pieces: tuple[_Piece, ...], number: int, contents: dict[str, str]) -> bool:
    """Whether the white space of a piece would only set off an answer that is empty ("ASSISTANT: " + nothing)."""
    following = pieces[number + 1 : number + 2]
    return bool(following) and following[0].slot is not None and not contents[following[0].slot]


def _pieces(text: str, trained: Sequence[tuple[int, int]]) -> list[_Piece]:
    """`text` cut at its slots and at the bounds of the trained ranges."""
    bounds = {0, len(text), *(bound for cut in trained for bound in cut)}
    slots = {match.start(): match for match in _SLOT.finditer(text)}
    for match in slots.values():
        bounds.update(match.span())
    ordered = sorted(bounds)
    pieces = []
    for start, stop in pairwise(ordered):
        inside = any(low <= start < high for low, high in trained)
        slot = slots[start].group(1) if start in slots else None
        pieces.append(_Piece(text[start:stop], slot, inside))
    return pieces
