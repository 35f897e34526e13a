"""From what a user writes to the ids that the engine takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama31_core.errors import RequestError
from llama31_tokenizer import ChatFormat, Tokenizer


@dataclass
class PromptEncoder:
    """How prompts are put to the model.

    Attributes:
        tokenizer: the model's.
        raw: complete a prompt as it is; otherwise it is what a user says in a dialog.
        add_bos_token: begin a raw prompt with the model's bos token.
        system: what the system says before a dialog that has no system message of its own.
    """

    tokenizer: Tokenizer
    raw: bool = False
    add_bos_token: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        if self.raw and self.system is not None:
            raise RequestError("a raw prompt has no system message; leave out --system or --raw")
        if self.add_bos_token and not self.raw:
            raise RequestError("add_bos_token is for raw prompts, the chat format begins on its own; give --raw too")
        self._format = None if self.raw else ChatFormat(self.tokenizer)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt."""
        if self.raw:
            return self.tokenizer.encode(text, bos=self.add_bos_token)
        return self.encode_messages([{"role": "user", "content": text}])

    def encode_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a dialog, up to the answer that is asked for."""
        if self._format is None:
            self._format = ChatFormat(self.tokenizer)
        has_system = bool(messages) and isinstance(messages[0], Mapping) and messages[0].get("role") == "system"
        if self.system is not None and not has_system:
            messages = [{"role": "system", "content": self.system}, *messages]
        return self._format.encode_dialog(messages, add_generation_prompt=True).ids
