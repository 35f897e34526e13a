"""Prompts through the engine, answers onto the terminal in the order of the prompts, as they are generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama31_core.commands.answers import AnswerCollector
from llama31_core.inference.engine import Engine
from llama31_core.inference.sampling_params import SamplingParams
from llama31_tokenizer import Tokenizer


@dataclass
class _Line:
    """What is to be printed of one prompt: text that waits for its turn, and whether more will come."""

    collector: AnswerCollector
    waiting: str = ""
    done: bool = False


class AnswerPrinter:
    """Prints answers; those of later prompts wait for the earlier ones.

    Args:
        tokenizer: the model's.
        n: answers to each prompt. A single one is printed as it is generated, several when all are complete.
        stop: texts that end an answer.
        heads: what is printed before each prompt's answers.
    """

    def __init__(self, tokenizer: Tokenizer, n: int, stop: Sequence[str], heads: Sequence[str]) -> None:
        self._n = n
        self._lines = [_Line(AnswerCollector(tokenizer, n, stop), head) for head in heads]
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
                piece = line.collector.push(output)
                line.waiting += piece if self._n == 1 else ""
                if line.collector.is_complete and not line.done:
                    engine.abort(output.request_id)  # it does not know of stop strings
                    line.waiting += self._end(line)
                    line.done = True
            self._print()

    def _end(self, line: _Line) -> str:
        if self._n == 1:
            return "\n"
        return "".join(f"[{index}] {answer.text}\n" for index, answer in enumerate(line.collector.answers))

    def _print(self) -> None:
        while self._current < len(self._lines):
            line = self._lines[self._current]
            print(line.waiting, end="", flush=True)
            line.waiting = ""
            if not line.done:
                return
            self._current += 1
