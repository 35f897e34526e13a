"""SmolLM2 under a JSON schema, as the engine takes it: a real vocabulary, its end tokens, answers that validate."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from llama31_core import Engine, SamplingParams
from llama31_core.inference.structured import GrammarCompiler
from llama31_tokenizer import ChatFormat, Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 16},
        "country": {"enum": ["France", "Spain", "Japan"]},
        "population": {"type": "integer", "minimum": 1000, "maximum": 100_000_000},
        "languages": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 3},
        "is_capital": {"type": "boolean"},
    },
    "required": ["city", "country", "population", "languages", "is_capital"],
    "additionalProperties": False,
}
QUESTIONS = ("Describe the capital of France.", "Describe Kyoto.", "Tell me a joke.")


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(smollm2_dir)


def test_answers_under_a_schema_validate(smollm2_dir: Path, tokenizer: Tokenizer) -> None:
    """Greedy and drawn, beside a free request whose tokens stay what they are alone."""
    chat = ChatFormat(tokenizer)
    prompts = [chat.encode_dialog([{"role": "user", "content": text}], add_generation_prompt=True).ids
               for text in QUESTIONS]  # fmt: skip
    engine = Engine.from_pretrained(smollm2_dir, num_blocks=256)
    special = set(tokenizer.special_tokens.values())
    texts = [b"" if token in special else tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)]
    mask = GrammarCompiler(texts, engine.config.eos_token_ids, sorted(special)).json_schema(SCHEMA)
    free = SamplingParams(max_tokens=8, temperature=0)
    params = [
        SamplingParams(max_tokens=200, temperature=0, logits_mask=mask),
        SamplingParams(max_tokens=200, seed=1, n=2, logits_mask=mask),
        SamplingParams(max_tokens=200, temperature=1.5, seed=2, logits_mask=mask),
        free,
    ]
    *masked, last = engine.generate([*prompts, prompts[0]], params)
    assert len(masked) == 4
    assert {completion.finish_reason for completion in masked} == {"stop"}
    answers = [json.loads(tokenizer.decode(completion.token_ids)) for completion in masked]
    for answer in answers:
        jsonschema.validate(answer, SCHEMA)
    assert answers[0]["country"] == "France"  # the model still speaks: the mask only takes away
    [alone] = engine.generate([prompts[0]], free)
    assert last.token_ids == alone.token_ids
    with pytest.raises(json.JSONDecodeError):
        json.loads(tokenizer.decode(alone.token_ids))
