"""A chunk of raw records in, its tokens out: parse, check the schema, apply the template, tokenise, cut to length.

This is the work that runs in parallel. It is a pure function of the chunk and the recipe.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from llama31_data.chunks import Chunk
from llama31_data.errors import DataError, RecordError, kind_of
from llama31_data.samples import Encoded, Samples, fit_samples, join_samples
from llama31_data.schemas import checked_schema, to_dialog
from llama31_data.templates import HeaderTemplate, load_template
from llama31_data.wikitext import clean_wikitext, is_heading
from llama31_tokenizer import Tokenizer
from llama31_tokenizer.errors import TokenizerError


@dataclass(frozen=True)
class Recipe:
    """Everything that decides which tokens a record becomes.

    Attributes:
        kind: "qa" trains on answers of conversations, "wiki" on all of plain text.
        model_file: tokenizer file or model directory.
        schema: the one schema records must have, or "auto".
        seq_length: a sample has at most `seq_length + 1` tokens, inputs and shifted targets; None leaves samples whole.
        split_long: cut a longer sample into several, rather than leave out its end.
    """

    kind: Literal["qa", "wiki"]
    model_file: str
    template: str
    schema: str
    seq_length: int | None
    split_long: bool


_JSON = json.JSONDecoder()
_T = TypeVar("_T")
_R = TypeVar("_R")


class Reject(NamedTuple):
    """A record that was not used."""

    line: int
    reason: str


@dataclass
class EncodedChunk(Samples):
    """Samples of one chunk, what was not used, and what happened to records, turns and tokens (see manifest)."""

    rejects: list[Reject] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


class Encoder:
    """Turns chunks into samples as its recipe says.

    Raises:
        DataError: the tokenizer or the template cannot be loaded.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tokenizer = load_tokenizer(recipe.model_file)
        self._template = load_template(recipe.template, self.tokenizer) if recipe.kind == "qa" else None
        self._limit = None if recipe.seq_length is None else recipe.seq_length + 1
        self._counts: Counter[str] = Counter()

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """All samples of a chunk; records that cannot be used become rejects."""
        self._counts = Counter(read=len(chunk.lines))
        rejects: list[Reject] = []
        if self._template is None:
            lines, texts = _each(chunk.lines, chunk.payloads, self._text, rejects)
            samples = join_samples([self._encode_text(text) for text in texts])
        else:
            lines, dialogs = _each(chunk.lines, chunk.payloads, self._dialog, rejects)
            if dialogs and isinstance(self._template, HeaderTemplate):
                samples = self._template.encode_many(dialogs)
            else:
                lines, encoded = _each(lines, dialogs, self._template.encode, rejects)
                samples = join_samples(encoded)
        fitted = fit_samples(samples, self._limit, split=self.recipe.split_long)
        rejects += [Reject(lines[number], reason) for number, reason in fitted.lost]
        samples = fitted.samples
        self._counts.update(fitted.counts)
        self._counts.update(
            rejected=len(rejects),
            samples=len(samples.lengths),
            tokens=len(samples.tokens),
            label_tokens=int(samples.trained.sum()),
        )
        return EncodedChunk(samples.tokens, samples.trained, samples.lengths, sorted(rejects), {**self._counts})

    def _dialog(self, payload: Any) -> list[dict[str, str]]:
        record = parse_payload(payload)
        messages, dropped = to_dialog(record, checked_schema(record, self.recipe.schema))
        if dropped:
            self._counts["dropped_turns"] += dropped
        return messages

    def _text(self, payload: Any) -> str | None:
        """A paragraph of a plain file, cleaned as MindFormers does, or the text of a record, as it is. No headings."""
        if isinstance(payload, str):
            text = clean_wikitext("\n" + payload).strip("\n")
            if is_heading(text):
                self._counts["headings"] += 1
                return None
        else:
            record = parse_payload(payload)
            schema = checked_schema(record, self.recipe.schema)
            if schema != "text":
                raise RecordError(f"looks like schema {schema!r}, expected 'text'; use --dataset_type qa")
            text = record["text"]
            if not isinstance(text, str):
                raise RecordError(f"field 'text' is {kind_of(text)}, expected text")
        if not text:
            raise RecordError("text is empty")
        return text

    def _encode_text(self, text: str) -> Encoded:
        """A text between begin- and end-of-text, where the vocabulary has them, all of it trained on."""
        tokenizer = self.tokenizer
        ids = tokenizer.encode(text, bos=tokenizer.bos_id is not None, eos=tokenizer.eos_id is not None)
        return Encoded(ids, [(0, len(ids))])


def _each(
    lines: Sequence[int], items: Sequence[_T], work: Callable[[_T], _R | None], rejects: list[Reject]
) -> tuple[list[int], list[_R]]:
    """`work` of each item, and its line. What it raises becomes a reject; None is passed over."""
    done_lines, done = [], []
    for line, item in zip(lines, items, strict=True):
        try:
            result = work(item)
        except RecordError as error:
            rejects.append(Reject(line, str(error)))
            continue
        if result is not None:
            done_lines.append(line)
            done.append(result)
    return done_lines, done


def parse_payload(payload: Any) -> Any:
    """The record of a chunk's payload.

    Raises:
        RecordError: it is not JSON.
    """
    if not isinstance(payload, bytes):
        return payload
    try:
        text = payload.decode()
        value, end = _JSON.raw_decode(text)
        return value if end == len(text) else _JSON.decode(text)  # which says what is wrong with the rest
    except json.JSONDecodeError as error:
        raise RecordError(f"not JSON: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise RecordError(f"not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not usable JSON: {error}") from error


def load_tokenizer(model_file: str) -> Tokenizer:
    """The tokenizer of a file or of a model directory.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    path = Path(model_file)
    try:
        return Tokenizer.from_pretrained(path) if path.is_dir() else Tokenizer.from_file(path)
    except (TokenizerError, OSError) as error:
        raise DataError(f"--model_file: {error}") from error


@lru_cache(maxsize=1)
def encoder_for(recipe: Recipe) -> Encoder:
    """The process's encoder: a worker loads the vocabulary once."""
    return Encoder(recipe)
