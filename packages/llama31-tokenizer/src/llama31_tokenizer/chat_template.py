"""Chat templates written in Jinja, as Hugging Face models carry them: messages in, ids and spans out.

A control token in the rendered text becomes its id only where the template wrote it: in what the messages say such
text is masked while rendering, with one rare character for each, and is encoded as plain text.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama31_tokenizer.bpe import compile_names
from llama31_tokenizer.dialog import EncodedDialog, Span
from llama31_tokenizer.errors import TokenizerError
from llama31_tokenizer.jinja_sandbox import ChatTemplate, Marks
from llama31_tokenizer.messages import ROLES, read_content
from llama31_tokenizer.tokenizer import Tokenizer
from llama31_tokenizer.tool_calls import read_tool_calls

TEMPLATE_ROLES = (*ROLES, "developer", "function")
RESULT_ROLES = ("tool", "ipython", "function")  # what a tool answered may be JSON
# Ideographs of CJK extension G: printable (so that a `repr` in a template leaves them), and hardly ever written. Those
# that a dialog does write are not taken as masks.
_MASKS = range(0x30000, 0x3134B)
_Data = dict[str, Any]


@dataclass(frozen=True)
class _Rendered:
    """A rendered dialog.

    Attributes:
        text: with masks, without marks.
        generated: character ranges of the template's `generation` blocks.
        masks: mask character -> control token's name, for `str.translate`.
    """

    text: str
    generated: list[Span]
    masks: dict[int, str]


class TemplateFormat:
    """Renders dialogs with one template."""

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(template, tokenizer.vocabulary.source)
        self._takes_parts = "'type'" in template or '"type"' in template or ".type" in template
        self._names = compile_names(tokenizer.special_tokens) if tokenizer.special_tokens else None
        controls = tokenizer.vocabulary.controls
        roles = {"bos": controls.bos_id, "eos": controls.eos_id, "pad": controls.pad_id, "unk": controls.unk_id}
        name_of = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
        self._variables = {f"{role}_token": name_of[i] for role, i in roles.items() if i in name_of}

    def encode_dialog(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> EncodedDialog:
        """Ids of the rendered dialog; `variables` are handed to the template as they are."""
        read = [self._read_message(message, index) for index, message in enumerate(messages)]
        rendered = self._render(read, add_generation_prompt, variables)
        ids, starts, ends = self._encode(rendered)

        def find_spans() -> list[Span]:
            if self._template.marks_generation:
                ranges = rendered.generated
            else:
                ranges = self._compare_prefixes(read, rendered, variables)
            return [self._span_of(chars, ids, starts, ends) for chars in ranges]

        return EncodedDialog(ids, find_spans)

    def _read_message(self, raw: Any, index: int) -> _Data:
        where = f"messages[{index}]"
        if not isinstance(raw, Mapping):
            raise TokenizerError(f"{where} is a {type(raw).__name__}, expected a mapping with role and content")
        if raw.get("role") not in TEMPLATE_ROLES:
            raise TokenizerError(f"{where}.role is {raw.get('role')!r}, allowed are {', '.join(TEMPLATE_ROLES)}")
        calls = read_tool_calls(raw.get("tool_calls"), where)
        message = {**raw}
        content = raw.get("content")
        is_result = isinstance(content, Mapping) and raw["role"] in RESULT_ROLES
        if not is_result:
            parts = read_content(content, where, optional=bool(calls))
            if isinstance(content, str) or not self._takes_parts:
                message["content"] = "\n".join(parts)
        if calls:
            message["tool_calls"] = [
                {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        return message

    def _render(self, messages: list[_Data], prompt: bool, variables: Mapping[str, Any]) -> _Rendered:
        inputs = {"messages": messages, **variables}
        used: set[str] = set()
        _collect_masks(inputs, used)
        names = self._tokenizer.special_tokens
        free = list(itertools.islice((char for char in map(chr, _MASKS) if char not in used), 2 + len(names)))
        if len(free) < 2 + len(names):
            raise TokenizerError("the dialog uses nearly every ideograph of CJK extension G, which rendering needs")
        begin, end, *masks = free
        mask_of = dict(zip(names, masks, strict=True))
        masked = _mask(inputs, self._names, mask_of)
        marks = Marks(begin, end, frozenset(masks))
        text = self._template.render({**self._variables, **masked, "add_generation_prompt": prompt}, marks)
        pieces, generated = _take_marks(text, begin, end)
        return _Rendered(pieces, generated, {ord(char): name for name, char in mask_of.items()})

    def _encode(self, rendered: _Rendered) -> tuple[list[int], list[int], list[int]]:
        """Ids, and where each token starts and ends in the rendered text."""
        ids: list[int] = []
        starts: list[int] = []
        ends: list[int] = []

        def add_text(start: int, end: int) -> None:
            if start == end:
                return
            masked = rendered.text[start:end]
            encoding = self._tokenizer.encode_with_offsets(masked.translate(rendered.masks))
            widths = [len(rendered.masks.get(ord(char), char)) for char in masked]
            place = list(itertools.chain.from_iterable([start + at] * width for at, width in enumerate(widths)))
            ids.extend(encoding.ids)
            starts.extend(place[first] for first in encoding.char_spans[:, 0].tolist())
            ends.extend(place[last - 1] + 1 for last in encoding.char_spans[:, 1].tolist())

        at = 0
        for match in self._names.finditer(rendered.text) if self._names else ():
            add_text(at, match.start())
            ids.append(self._tokenizer.special_tokens[match.group()])
            starts.append(match.start())
            ends.append(match.end())
            at = match.end()
        add_text(at, len(rendered.text))
        return ids, starts, ends

    def _compare_prefixes(self, messages: list[_Data], whole: _Rendered, variables: Mapping[str, Any]) -> list[Span]:
        """Ranges of assistants' turns: what the dialog up to one adds to the prompt before it."""
        ranges = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._plain(self._render(messages[:index], True, variables)) if index else ""
            after = self._plain(self._render(messages[: index + 1], False, variables))
            if not (after.startswith(before) and self._plain(whole).startswith(after)):
                raise TokenizerError(
                    f"{self._tokenizer.vocabulary.source}: the chat template writes messages[{index}] differently with "
                    "and without what follows, so the assistant's tokens cannot be told; mark them in the template "
                    "with {% generation %} … {% endgeneration %}"
                )
            ranges.append((self._masked_length(whole, len(before)), self._masked_length(whole, len(after))))
        return ranges

    @staticmethod
    def _plain(rendered: _Rendered) -> str:
        return rendered.text.translate(rendered.masks)

    @staticmethod
    def _masked_length(rendered: _Rendered, plain_length: int) -> int:
        """Characters of the masked text that stand for that many of the plain one."""
        plain = 0
        for at, char in enumerate(rendered.text):
            if plain >= plain_length:
                return at
            plain += len(rendered.masks.get(ord(char), char))
        return len(rendered.text)

    def _span_of(self, chars: Span, ids: list[int], starts: list[int], ends: list[int]) -> Span:
        inside = [n for n in range(len(ids)) if ends[n] > chars[0] and starts[n] < chars[1]]
        if not inside:
            return (len(ids), len(ids))
        first, last = inside[0], inside[-1]
        stops = [n for n in inside if ids[n] in self._tokenizer.stop_ids]
        return (first, (stops[-1] if stops else last) + 1)


def _collect_masks(value: Any, found: set[str]) -> None:
    if isinstance(value, str):
        if not value.isascii():
            found.update(char for char in value if ord(char) in _MASKS)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _collect_masks(key, found)
            _collect_masks(item, found)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect_masks(item, found)


def _mask(value: Any, names: Any, mask_of: Mapping[str, str]) -> Any:
    """The value rebuilt of plain JSON types, control tokens' names in its strings masked."""
    if isinstance(value, str):
        return names.sub(lambda match: mask_of[match.group()], str(value)) if names else str(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {_mask(key, names, mask_of): _mask(item, names, mask_of) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mask(item, names, mask_of) for item in value]
    raise TokenizerError(f"a {type(value).__name__} in the dialog, expected text, numbers, lists and mappings")


def _take_marks(text: str, begin: str, end: str) -> tuple[str, list[Span]]:
    """The text without marks, and the ranges they enclosed."""
    kept: list[str] = []
    ranges: list[Span] = []
    length = start = 0
    for piece in text.replace(end, begin + end).split(begin):
        # A piece after a `begin` opens a range; one that starts with `end` follows a closed one.
        if piece.startswith(end):
            ranges.append((start, length))
            piece = piece[1:]
        start = length
        kept.append(piece)
        length += len(piece)
    if len(ranges) * 2 != text.count(begin) + text.count(end):
        raise TokenizerError("the chat template nests generation blocks, expected one after the other")
    return "".join(kept), ranges
