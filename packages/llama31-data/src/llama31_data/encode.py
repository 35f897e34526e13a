"""A chunk of raw records in, its tokens out: parse, check the schema, apply the template, tokenise, cut to length.

This is the work that runs in parallel. It is a pure function of the chunk and the recipe.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama31_data.chunks import Chunk
from llama31_data.errors import DataError, RecordError
from llama31_data.schemas import checked_schema, to_dialog
from llama31_data.templates import Encoded, load_template
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


class Reject(NamedTuple):
    """A record that was not used."""

    line: int
    reason: str


@dataclass
class EncodedChunk:
    """Samples of one chunk, end to end.

    Attributes:
        tokens: int32, (total,).
        trained: bool, (total,); whether a token is a target. The first of a sample never is: nothing predicts it.
        lengths: int32, (samples,); they add up to total.
        counts: what happened to records, turns and tokens (see manifest).
    """

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    lengths: NDArray[np.int32]
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
        self._encode: Callable[[Any], Encoded]
        if recipe.kind == "qa":
            self._template = load_template(recipe.template, self.tokenizer)
            self._encode = self._conversation
        else:
            self._encode = self._text
        self._counts: Counter[str] = Counter()

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """All samples of a chunk; records that cannot be used become rejects."""
        self._counts = Counter(read=len(chunk.lines))
        ids: list[int] = []
        lengths: list[int] = []
        spans: list[tuple[int, int]] = []
        rejects: list[Reject] = []
        for line, payload in zip(chunk.lines, chunk.payloads, strict=True):
            try:
                sample = self._encode(payload)
                if not sample.ids:
                    continue
                if all(stop <= start for start, stop in sample.spans):
                    raise RecordError("its answers are empty and the template has no end of turn: nothing to train on")
                pieces = self._fit(sample)
            except RecordError as error:
                rejects.append(Reject(line, str(error)))
                continue
            for piece in pieces:
                base = len(ids)
                spans += [(base + max(start, 1), base + stop) for start, stop in piece.spans]
                ids += piece.ids
                lengths.append(len(piece.ids))
        trained = np.zeros(len(ids), np.bool_)
        for start, stop in spans:
            trained[start:stop] = True
        self._counts.update(
            rejected=len(rejects), samples=len(lengths), tokens=len(ids), label_tokens=int(trained.sum())
        )
        return EncodedChunk(np.array(ids, np.int32), trained, np.array(lengths, np.int32), rejects, dict(self._counts))

    def _conversation(self, payload: Any) -> Encoded:
        record = parse_payload(payload)
        messages, dropped = to_dialog(record, checked_schema(record, self.recipe.schema))
        if dropped:
            self._counts["dropped_turns"] += dropped
        return self._template.encode(messages)

    def _text(self, payload: Any) -> Encoded:
        """A paragraph of a plain file, cleaned as MindFormers does, or the text of a record, as it is."""
        if isinstance(payload, str):
            text = clean_wikitext("\n" + payload).strip("\n")
            if is_heading(text):
                self._counts["headings"] += 1
                return Encoded([], [])
        else:
            record = parse_payload(payload)
            schema = checked_schema(record, self.recipe.schema)
            if schema != "text":
                raise RecordError(f"looks like schema {schema!r}, expected 'text'; use --dataset_type qa")
            text = record["text"]
            if not isinstance(text, str):
                raise RecordError(f"field 'text' is a {type(text).__name__}, expected text")
        if not text:
            raise RecordError("text is empty")
        ids = self.tokenizer.encode(text, bos=self.tokenizer.bos_id is not None, eos=self.tokenizer.eos_id is not None)
        return Encoded(ids, [(0, len(ids))])

    def _fit(self, sample: Encoded) -> list[Encoded]:
        """The sample within `seq_length + 1` tokens: as it is, without its end, or in pieces."""
        if self.recipe.seq_length is None or len(sample.ids) <= self.recipe.seq_length + 1:
            return [sample]
        limit = self.recipe.seq_length + 1
        starts = range(0, len(sample.ids), limit) if self.recipe.split_long else (0,)
        pieces = [_cut(sample, start, start + limit) for start in starts]
        kept = [piece for piece in pieces if any(stop > max(start, 1) for start, stop in piece.spans)]
        if not kept:
            raise RecordError(
                f"its first {limit} tokens (seq_length + 1) have no answer in them, of {len(sample.ids)} in all"
            )
        if self.recipe.split_long:
            self._counts["split"] += 1
            self._counts["dropped_tokens"] += sum(len(piece.ids) for piece in pieces) - sum(len(p.ids) for p in kept)
        else:
            self._counts["truncated"] += 1
            self._counts["dropped_tokens"] += len(sample.ids) - limit
        return kept


def _cut(sample: Encoded, low: int, high: int) -> Encoded:
    spans = [
        (max(start, low) - low, min(stop, high) - low) for start, stop in sample.spans if start < high and stop > low
    ]
    return Encoded(sample.ids[low:high], spans)


def parse_payload(payload: Any) -> Any:
    """The record of a chunk's payload.

    Raises:
        RecordError: it is not JSON.
    """
    if not isinstance(payload, bytes):
        return payload
    try:
        return json.loads(payload)
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
        raise DataError(f"--model_file {model_file}: {error}") from error


@lru_cache(maxsize=1)
def encoder_for(recipe: Recipe) -> Encoder:
    """The process's encoder: a worker loads the vocabulary once."""
    return Encoder(recipe)
