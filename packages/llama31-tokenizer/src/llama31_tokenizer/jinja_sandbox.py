"""A chat template compiled in jinja2's sandbox, with limits: variables in, text out.

The environment offers what transformers' does (`utils/chat_template_utils.py`): trimmed blocks, loop controls, `tojson`
without HTML escapes, `raise_exception`, `strftime_now`, the `generation` block. A template is a stranger's code: its
loops and the strings it puts together are bounded, so one that loops ends in an error, not in a stuck process.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from llama31_tokenizer.errors import TokenizerError

MAX_STEPS = 1_000_000  # loop passes and macro calls of one rendering
MAX_PRODUCT = 10_000_000  # characters or items of one repeated string or list, and size of one power
MAX_CHARS = 100_000_000  # characters or items of what is put together of parts, the whole text among them


@dataclass(frozen=True)
class Marks:
    """Characters with a meaning in one rendering.

    Attributes:
        begin, end: enclose what generation blocks hold.
        masks: stand for control tokens' names, and are left as they are wherever a template would escape them.
    """

    begin: str = ""
    end: str = ""
    masks: frozenset[str] = frozenset()


class _State(threading.local):
    """What one rendering counts and marks; each thread has its own."""

    steps = 0
    marks = Marks()


class _Guard(Extension):
    """The `generation` block, and a step counter in every loop and macro."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it a set

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.state = _State()

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("enclose"), [], [], body).set_lineno(line)

    def enclose(self, caller: Macro) -> str:
        return f"{self.state.marks.begin}{caller()}{self.state.marks.end}"

    def step(self) -> None:
        self.state.steps += 1
        if self.state.steps > MAX_STEPS:
            raise jinja2.TemplateRuntimeError(f"it went through more than {MAX_STEPS:,} loop passes")

    def concatenate(self, *parts: Any) -> str:
        return _join(map(str, parts))


class _GuardConcatenation(NodeTransformer):
    """`a ~ b` as a call of the guard's."""

    def __init__(self, guard: _Guard) -> None:
        self._guard = guard

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 - jinja2's name
        self.generic_visit(node)
        return self._guard.call_method("concatenate", node.nodes).set_lineno(node.lineno)


def _join(parts: Iterable[str]) -> str:
    """What is put together, never more than `MAX_CHARS` and a part."""
    kept = []
    size = 0
    for part in parts:
        kept.append(part)
        size += len(part)
        _check_size(size)
    return "".join(kept)


def _check_size(size: int) -> None:
    if size > MAX_CHARS:
        raise SecurityError(f"it puts together more than {MAX_CHARS:,} characters or items")


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "+"})
    concat = staticmethod(_join)  # of the text, of macros and of `set` blocks

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        guard = next(ext for ext in self.iter_extensions() if isinstance(ext, _Guard))
        repeated: list[nodes.For | nodes.Macro] = [*tree.find_all(nodes.For), *tree.find_all(nodes.Macro)]
        for node in repeated:
            node.body.insert(0, nodes.ExprStmt(guard.call_method("step")).set_lineno(node.lineno))
        _GuardConcatenation(guard).visit(tree)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for repeated, count in ((left, right), (right, left)):
            is_repeat = operator == "*" and hasattr(repeated, "__len__") and isinstance(count, int)
            if is_repeat and len(repeated) * count > MAX_PRODUCT:
                raise SecurityError(f"it repeats a value to more than {MAX_PRODUCT:,}")
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _check_size(len(left) + len(right))
        if operator == "**" and (abs(left) > MAX_PRODUCT or abs(right) > 64):
            raise SecurityError(f"it raises {left} to the power of {right}")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """One compiled template.

    Args:
        source: Jinja text.
        origin: the file it came from, for messages.

    Raises:
        TokenizerError: it is not valid Jinja.
    """

    def __init__(self, source: str, origin: Path) -> None:
        self._origin = origin
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Guard, loopcontrols])
        self._guard = next(ext for ext in environment.iter_extensions() if isinstance(ext, _Guard))
        environment.filters["tojson"] = self._to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.marks_generation = "endgeneration" in source
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(
                f"{origin}: chat template line {error.lineno}: {error.message}; correct the template"
            ) from error

    def render(self, variables: Mapping[str, Any], marks: Marks) -> str:
        """The rendered text, with marks in it.

        Raises:
            TokenizerError: the template raised, or went over a limit; its own message is shown.
        """
        state = self._guard.state
        state.steps, state.marks = 0, marks
        try:
            return self._template.render(variables)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            what = "refused the dialog" if type(error) is jinja2.TemplateError else "failed"  # its raise_exception
            raise TokenizerError(f"{self._origin}: the chat template {what}: {error}") from error
        except (AttributeError, MemoryError) as error:
            reason = str(error) or "no memory for what it makes"
            raise TokenizerError(f"{self._origin}: the chat template failed: {reason}") from error

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        if ensure_ascii:
            for mask in self._guard.state.marks.masks:
                text = text.replace(json.dumps(mask)[1:-1], mask)
        return text


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
