"""Prompts through the engine, answers onto the terminal in the order of the prompts, as they are generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama31_core.commands.prompts import AnswerCollector, decode_answer
from llama31_core.inference.engine import Engine
from llama31_core.inference.sampling_params import SamplingParams
from llama31_tokenizer import StreamDecoder, Tokenizer


@dataclass
class _Line:
    """What is to be printed of one prompt: text that waits for its turn, and whether more will come."""

    collector: AnswerCollector
    decoder: StreamDecoder
    waiting: str = ""
    done: bool = False


class AnswerPrinter:
    """Prints answers; those of later prompts wait for the earlier ones.

    Args:
        tokenizer: the model's.
        n: answers to each prompt. A single one is printed as it is generated, several when all are complete.
        heads: what is printed before each prompt's answers.
    """

    def __init__(self, tokenizer: Tokenizer, n: int, heads: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._n = n
        self._lines = [_Line(AnswerCollector(n), StreamDecoder(tokenizer), head) for head in heads]
        self._current = 0

    @property
    def collectors(self) -> list[AnswerCollector]:
        """What each prompt got."""
        return [line.collector for line in self._lines]

    def run(
        self, engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams, adapter: str | None
    ) -> None:
        """Complete the prompts together and print the answers."""
        for index, prompt_ids in enumerate(prompts):
            engine.add(str(index), prompt_ids, params, adapter=adapter)
        while engine.has_unfinished():
            for output in engine.step():
                line = self._lines[int(output.request_id)]
                line.collector.push(output)
                if self._n == 1:
                    line.waiting += line.decoder.push(output.token_ids)
                if line.collector.is_complete:
                    line.waiting += self._rest(line)
                    line.done = True
            self._print()

    def _rest(self, line: _Line) -> str:
        if self._n == 1:
            return line.decoder.flush() + "\n"
        answers = enumerate(line.collector.answers)
        return "".join(f"[{index}] {decode_answer(self._tokenizer, answer.token_ids)}\n" for index, answer in answers)

    def _print(self) -> None:
        while self._current < len(self._lines):
            line = self._lines[self._current]
            print(line.waiting, end="", flush=True)
            line.waiting = ""
            if not line.done:
                return
            self._current += 1
