"""Stanford Alpaca records (instruction, input, output) to conversations, with the two prompts of Alpaca's training."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llama31_data.errors import RecordError, kind_of

# https://github.com/tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
PROMPT_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
# What stands around the fields, in a record's hot path.
_BEFORE_BOTH, _BETWEEN, _AFTER = re.split(r"\{\w+\}", PROMPT_WITH_INPUT)
_BEFORE_ALONE, _AFTER_ALONE = re.split(r"\{\w+\}", PROMPT_NO_INPUT)


def prompt_and_answer(record: Mapping[str, Any]) -> tuple[str, str]:
    """The prompt and the answer of an Alpaca record.

    A missing, null or empty `input` takes the prompt without input; any other text, white space too, the one with it.

    Raises:
        RecordError: a field is missing or is not text.
    """
    instruction, context, answer = record.get("instruction"), record.get("input"), record.get("output")
    if not isinstance(instruction, str) or not isinstance(answer, str):
        name = "output" if isinstance(instruction, str) else "instruction"
        state = kind_of(record[name]) if name in record else "missing"
        raise RecordError(f"field {name!r} is {state}, expected text")
    if context is not None and not isinstance(context, str):
        raise RecordError(f"field 'input' is {kind_of(context)}, expected text")
    if context:
        return f"{_BEFORE_BOTH}{instruction}{_BETWEEN}{context}{_AFTER}", answer
    return f"{_BEFORE_ALONE}{instruction}{_AFTER_ALONE}", answer


def conversation(record: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The record in the form MindFormers' alpaca_converter writes; `number` counts from 1."""
    prompt, answer = prompt_and_answer(record)
    return {
        "id": str(number),
        "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}],
    }
