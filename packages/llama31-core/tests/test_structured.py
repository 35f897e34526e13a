"""Completions under a grammar: what comes out obeys it, whatever model, tokenizer, batch and preemption they met."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError, RequestError
from llama31_core.inference.batch import BlockMove, ForwardInput
from llama31_core.inference.engine import Engine
from llama31_core.inference.logits_mask import LogitsMaskFactory
from llama31_core.inference.options import EngineOptions
from llama31_core.inference.request import Completion
from llama31_core.inference.sampling_params import SamplingParams
from llama31_core.inference.structured import GrammarCompiler
from model_assets import fetch

# Single bytes, two end tokens, one that stands for nothing, and a few that cross the borders of JSON's tokens.
BYTES = [*(bytes([byte]) for byte in range(256)), b"", b"", b"", b'{"', b'":', b'", "', b"true", b"a1", b"]}", b'"}']
EOS = (256, 257)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["x", "yy", "é"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(BYTES, EOS, [258])


class NoiseRunner:
    """Logits that are noise, the same for the same token at the same position."""

    def __init__(self, vocab_size: int = len(BYTES), num_blocks: int = 512, num_host_blocks: int = 0) -> None:
        self.vocab_size, self.block_size = vocab_size, 4
        self.num_blocks, self.num_host_blocks = num_blocks, num_host_blocks

    def move_blocks(self, moves: list[BlockMove]) -> None:
        """Nothing is kept that could move."""

    def forward(self, batch: ForwardInput) -> npt.NDArray[np.float32]:
        """See Runner."""
        logits = [np.zeros((0, self.vocab_size), np.float32)]
        for tokens, start, count in zip(batch.token_ids, batch.starts, batch.num_logits, strict=True):
            for offset in range(len(tokens) - count, len(tokens)):
                noise = np.random.default_rng([start + offset, tokens[offset]])
                logits.append(noise.standard_normal((1, self.vocab_size), np.float32) * 2)
        return np.concatenate(logits)


def build(runner: NoiseRunner | None = None, eos: tuple[int, ...] = EOS, **options: Any) -> Engine:
    runner = runner or NoiseRunner()
    size = runner.vocab_size
    config = ModelConfig.build(
        "test",
        vocab_size=size,
        dim=8,
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        ffn_dim=8,
        max_seq_len=2048,
        eos_token_ids=eos,
    )
    return Engine(config, runner, EngineOptions(**options))


def text_of(completion: Completion, token_bytes: list[bytes] = BYTES) -> str:
    assert completion.finish_reason == "stop", completion
    return b"".join(token_bytes[token] for token in completion.token_ids).decode()


def write(mask: LogitsMaskFactory, **params: Any) -> str:
    [completion] = build().generate([[1]], SamplingParams(1000, logits_mask=mask, **params))
    return text_of(completion)


small = st.integers(-5, 5)
scalars = st.one_of(
    st.fixed_dictionaries({"type": st.just("string"), "maxLength": st.integers(0, 5)}),
    st.fixed_dictionaries({"type": st.just("integer"), "minimum": small, "maximum": st.integers(6, 2000)}),
    st.fixed_dictionaries({"type": st.just("number"), "minimum": small, "maximum": st.integers(6, 2000)}),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["null", "boolean"]}]),
    st.builds(lambda values: {"enum": values}, st.lists(st.text(max_size=4) | small, min_size=1, max_size=3)),
    st.builds(
        lambda pattern: {"type": "string", "pattern": pattern}, st.sampled_from(["^[a-c]{1,3}$", "^[0-9]{1,2}$"])
    ),
)


def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    objects = st.builds(
        lambda fields, optional: {
            "type": "object",
            "properties": fields,
            "required": [name for name in fields if name not in optional],
            "additionalProperties": False,
        },
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.sets(st.text(max_size=3)),
    )
    arrays = st.builds(
        lambda items, least, more: {"type": "array", "items": items, "minItems": least, "maxItems": least + more},
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )
    return objects | arrays | st.builds(lambda some: {"anyOf": some}, st.lists(inner, min_size=1, max_size=2))


@settings(max_examples=80, deadline=None)
@given(st.recursive(scalars, larger, max_leaves=5), st.integers(0, 2**16))
def test_every_completion_parses_and_obeys_its_schema(schema: dict[str, Any], seed: int) -> None:
    jsonschema.validate(json.loads(write(compiler().json_schema(schema), seed=seed)), schema)


def test_json_without_a_schema() -> None:
    for seed in range(20):
        assert isinstance(json.loads(write(compiler().json_object(), seed=seed)), dict)


@pytest.mark.parametrize(
    "pattern",
    ["[A-Z][a-z]{2,8} [0-9]{4}-[0-9]{2}", "(yes|no)!*", "é+x?", "[^a]{0,5}", r"[^@.]{3}@[a-z0-9]{1,5}\.(de|com)"],
)
def test_a_completion_is_a_whole_match(pattern: str) -> None:
    for seed in range(10):
        text = write(compiler().regex(pattern), seed=seed)
        assert re.fullmatch(pattern, text), text


def test_a_grammar_that_is_not_regular() -> None:
    for seed in range(10):
        text = write(compiler().lark('start: "(" start ")" | "x"'), seed=seed)
        depth = text.index("x")
        assert text == "(" * depth + "x" + ")" * depth


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_a_choice_is_one_of_them(texts: list[str], seed: int) -> None:
    assert write(compiler().choice(texts), seed=seed) in texts


def test_every_choice_can_be_drawn_and_the_likeliest_is_when_greedy() -> None:
    texts = ["cat", "dog", "doge", "äß"]
    mask = compiler().choice(texts)
    assert {write(mask, seed=seed, temperature=5.0) for seed in range(60)} == set(texts)
    assert write(mask, temperature=0) == write(mask, temperature=0)


GRAMMARS: dict[str, tuple[Callable[[], LogitsMaskFactory], Callable[[str], object]]] = {
    "schema": (
        lambda: compiler().json_schema(PERSON),
        lambda text: jsonschema.validate(json.loads(text), PERSON),
    ),
    "regex": (lambda: compiler().regex("[ab]{6,9}c"), lambda text: _must(re.fullmatch("[ab]{6,9}c", text))),
    "choice": (lambda: compiler().choice(["left", "right"]), lambda text: _must(text in ("left", "right"))),
    "lark": (lambda: compiler().lark('start: "x" start | "y"'), lambda text: _must(re.fullmatch("x*y", text))),
}


def _must(holds: object) -> None:
    assert holds


@pytest.mark.parametrize("num_speculative_tokens", [0, 3])
@pytest.mark.parametrize("num_host_blocks", [0, 40])
def test_grammars_share_a_batch_through_preemption_guesses_and_n(
    num_speculative_tokens: int, num_host_blocks: int
) -> None:
    params = {
        f"{name} {temperature}": SamplingParams(
            110, n=1 + (temperature > 0), temperature=temperature, seed=5, logits_mask=make(), repetition_penalty=1.1
        )
        for name, (make, _) in GRAMMARS.items()
        for temperature in (0, 1.0)
    }
    params["free"] = SamplingParams(30, seed=1)
    runner = NoiseRunner(num_blocks=30, num_host_blocks=num_host_blocks)
    engine = build(runner, num_speculative_tokens=num_speculative_tokens, max_seq_len=120, max_batch_size=16)
    done = engine.generate([[index] * 10 for index in range(len(params))], list(params.values()))
    alone = [
        completion
        for index, own in enumerate(params.values())
        for completion in build(max_seq_len=120).generate([[index] * 10], own)
    ]
    assert [completion.token_ids for completion in done] == [completion.token_ids for completion in alone]
    owners = [name.split()[0] for name, own in params.items() for _ in range(own.n)]
    for name, completion in zip(owners, done, strict=True):
        if name != "free":
            GRAMMARS[name][1](text_of(completion))
    assert engine.num_preemptions > 0
    assert engine.num_free_blocks == 30


def test_the_llama_3_vocabulary() -> None:
    ranks = [base64.b64decode(line.split()[0]) for line in fetch("llama3-tokenizer").read_bytes().splitlines() if line]
    token_bytes = ranks + [b""] * 256
    grammars = GrammarCompiler(token_bytes, [128001, 128008, 128009], range(128000, 128256))
    engine = build(NoiseRunner(128_256), (128001, 128008, 128009))
    masks = [grammars.json_schema(PERSON), grammars.regex("[a-z]{3,9} [0-9]{2}")] * 3
    params = [SamplingParams(300, seed=seed, logits_mask=mask, top_p=0.9) for seed, mask in enumerate(masks)]
    texts = [text_of(completion, token_bytes) for completion in engine.generate([[1]] * len(params), params)]
    for text in texts[::2]:
        jsonschema.validate(json.loads(text), PERSON)
    assert all(re.fullmatch("[a-z]{3,9} [0-9]{2}", text) for text in texts[1::2])


def test_the_mask_is_what_may_follow_and_no_special_token() -> None:
    mask = compiler().regex("ab?")()
    assert np.flatnonzero(mask.allowed()).tolist() == [ord("a")]
    mask.accept(ord("a"))
    assert np.flatnonzero(mask.allowed()).tolist() == [ord("b"), *EOS]
    assert not mask.terminated
    mask.accept(ord("b"))
    assert mask.terminated


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: g.regex("(("), "regex cannot be used: unclosed group"),
        (lambda g: g.regex("a(?=b)"), "regex cannot be used: look-around"),
        (lambda g: g.regex("[a&&b]"), "regex cannot be used: no text obeys it"),
        (lambda g: g.regex(5), "regex cannot be used: 'int'"),
        (lambda g: g.json_schema("{"), "json_schema cannot be used: EOF"),
        (lambda g: g.json_schema({"type": "nope"}), "json_schema cannot be used: Invalid type: nope"),
        (lambda g: g.json_schema({"not": {}}), r'Unimplemented keys: \["not"\]'),
        (lambda g: g.json_schema(False), "json_schema cannot be used"),
        (lambda g: g.lark("xx"), "lark cannot be used"),
        (lambda g: g.lark("start: start"), "lark cannot be used: no text obeys it"),
        (lambda g: g.choice([]), r"choice is \[\]"),
        (lambda g: g.choice("abc"), "choice is 'abc'"),
        (lambda g: g.choice(["a", ""]), "choice is"),
        (lambda g: g.choice(["\ud800"]), "choice cannot be used"),
    ],
)
def test_what_cannot_be_a_grammar_is_refused_before_there_is_a_request(
    make: Callable[[GrammarCompiler], object], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        make(compiler())


def test_contradictions_are_refused() -> None:
    mask = compiler().choice(["a"])
    with pytest.raises(RequestError, match="goes with neither logprobs nor logits_mask"):
        SamplingParams(temperature=0, num_beams=2, logits_mask=mask)
    with pytest.raises(RequestError, match="ignore_eos does not go with logits_mask"):
        SamplingParams(logits_mask=mask, ignore_eos=True)
    with pytest.raises(ConfigError, match="eos_ids is"):
        GrammarCompiler(BYTES, [])
    with pytest.raises(ConfigError, match="eos_ids is"):
        GrammarCompiler(BYTES, [len(BYTES)])
