"""The call transformers' tokenizers have: texts in, `input_ids` and `attention_mask` out, so scripts port by an import.

One difference is meant: text that looks like a control token stays text unless `allowed_special` says otherwise.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from llama31_tokenizer.batch import Side, pad_batch
from llama31_tokenizer.errors import TokenizerError

if TYPE_CHECKING:
    from llama31_tokenizer.special_text import SpecialSet
    from llama31_tokenizer.tokenizer import Tokenizer

Padding = bool | Literal["longest", "max_length", "do_not_pad"]
Truncation = bool | Literal["longest_first", "only_first", "do_not_truncate"]
TensorType = Literal["np", "ms"]


class BatchEncoding(dict[str, Any]):
    """`input_ids` and `attention_mask`, as items and as attributes.

    Attributes:
        num_truncated: texts that lost tokens to `max_length`.
    """

    num_truncated = 0

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def encode_call(
    tokenizer: Tokenizer,
    text: str | Sequence[str],
    *,
    add_bos: bool,
    add_eos: bool,
    padding: Padding,
    truncation: Truncation,
    max_length: int | None,
    padding_side: Side,
    truncation_side: Side,
    return_tensors: TensorType | None,
    allowed_special: SpecialSet,
    num_threads: int | None,
) -> BatchEncoding:
    """See `Tokenizer.__call__`."""
    _check("padding", padding, (True, False, "longest", "max_length", "do_not_pad"))
    _check("truncation", truncation, (True, False, "longest_first", "only_first", "do_not_truncate"))
    _check("return_tensors", return_tensors, (None, "np", "ms"))
    cut = truncation not in (False, "do_not_truncate")
    if max_length is None and (cut or padding == "max_length"):
        raise TokenizerError("truncation and padding='max_length' need max_length, got None")
    texts = [text] if isinstance(text, str) else list(text)
    rows = tokenizer.encode_batch(texts, allowed_special=allowed_special, num_threads=num_threads)
    num_truncated = 0
    for index, row in enumerate(rows):
        if cut and max_length is not None:
            room = max_length - add_bos - add_eos
            if room < 0:
                raise TokenizerError(f"max_length is {max_length}, too short for the added control tokens")
            num_truncated += len(row) > room
            row = row[:room] if truncation_side == "right" else row[max(0, len(row) - room) :]
        rows[index] = tokenizer.with_ends(row, bos=add_bos, eos=add_eos)
    pad = padding not in (False, "do_not_pad")
    result = BatchEncoding()
    if not pad and return_tensors is None:
        result["input_ids"] = rows
        result["attention_mask"] = [[1] * len(row) for row in rows]
    else:
        if not pad and len(set(map(len, rows))) > 1:
            raise TokenizerError("texts differ in length, so they make no tensor; use padding=True")
        longest = max(map(len, rows), default=0)
        length = max(longest, max_length or 0) if padding == "max_length" else longest
        padded = pad_batch(rows, pad_id=tokenizer.pad_id, length=length, side=padding_side)
        for name, array in (("input_ids", padded.input_ids), ("attention_mask", padded.attention_mask)):
            result[name] = array if return_tensors else array.tolist()
    if return_tensors is None and isinstance(text, str):
        result.update({name: value[0] for name, value in result.items()})
    if return_tensors == "ms":
        tensor = importlib.import_module("mindspore").Tensor
        result.update({name: tensor(value) for name, value in result.items()})
    result.num_truncated = num_truncated
    return result


def _check(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise TokenizerError(f"{name} is {value!r}, allowed are {', '.join(map(repr, allowed))}")
