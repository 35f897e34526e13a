"""What the seven calls answer. The echo engine repeats the prompt, so every expected value is worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from llama31_serve import Chunk, InvalidRequestError

Serve = Any


async def test_generate_text(serve: Serve) -> None:
    async with serve() as running:
        result = await running.client.generate("abc", max_tokens=7, temperature=0)
    assert result.text == "abcabca"
    assert result.completions[0].token_ids == tuple(b"abcabca")
    assert result.finish_reason == "length"
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (3, 7)
    assert 0 <= result.timings.queued_s <= result.timings.total_s
    assert result.request_id


async def test_generate_token_ids(serve: Serve) -> None:
    async with serve() as running:
        result = await running.client.generate([104, 105], max_tokens=4)
    assert result.text == "hihi"


async def test_bos_is_added_only_on_request(serve: Serve) -> None:
    async with serve() as running:
        assert (await running.client.generate("a", max_tokens=2)).completions[0].token_ids == (97, 97)
        with_bos = await running.client.generate("a", max_tokens=2, add_bos=True)
    assert with_bos.usage.prompt_tokens == 2
    assert with_bos.completions[0].token_ids == (256, 97)
    assert with_bos.text == "a"  # control tokens are not part of the text


async def test_control_tokens_in_the_answer_on_request(serve: Serve) -> None:
    async with serve() as running:
        result = await running.client.generate([256, 97], max_tokens=3, include_special_tokens=True)
    assert result.text == "<|bos|>a<|bos|>"


async def test_model_end_token_ends(serve: Serve) -> None:
    async with serve() as running:
        result = await running.client.generate([97, 98, 258], max_tokens=9)
        ignored = await running.client.generate([97, 98, 258], max_tokens=5, ignore_eos=True)
        own = await running.client.generate("abc", max_tokens=9, stop_token_ids=[ord("c")])
    assert (result.text, result.finish_reason) == ("ab", "stop_token")
    assert (ignored.text, ignored.finish_reason) == ("abab", "length")
    assert (own.text, own.finish_reason) == ("ab", "stop_token")


async def test_stop_string_cuts_the_text_and_frees_the_engine(serve: Serve) -> None:
    async with serve() as running:
        result = await running.client.generate("hello ", max_tokens=4000, stop=["lo h", "never"])
        kept = await running.client.generate("hello ", max_tokens=4000, stop=["lo h"], include_stop=True)
        await running.until(lambda: running.engine.num_requests == 0)
        assert running.engine.num_aborted == 2
    assert (result.text, result.finish_reason, result.completions[0].stop_string) == ("hel", "stop_string", "lo h")
    assert result.usage.completion_tokens == len("hello h")
    assert kept.text == "hello h"


async def test_characters_of_several_tokens_come_whole(serve: Serve) -> None:
    async with serve() as running, running.client.generate_stream("é𝄞", max_tokens=12) as stream:
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == "é𝄞é𝄞"
    assert all("\ufffd" not in chunk.text for chunk in chunks)


async def test_an_unfinished_character_at_the_end_is_replaced(serve: Serve) -> None:
    async with serve() as running:
        result = await running.client.generate("é", max_tokens=3)
    assert result.text == "é\ufffd"


async def test_stream_order_and_result(serve: Serve) -> None:
    async with serve() as running:
        async with running.client.generate_stream("xyz", max_tokens=5, request_id="mine") as stream:
            assert stream.result is None
            chunks: list[Chunk] = [chunk async for chunk in stream]
            assert (stream.request_id, stream.prompt_tokens) == ("mine", 3)
            result = stream.result
        unary = await running.client.generate("xyz", max_tokens=5)
    assert bytes(token_id for chunk in chunks for token_id in chunk.token_ids) == b"xyzxy"
    assert result is not None
    assert result.completions == unary.completions
    assert result.usage == unary.usage


async def test_chat_writes_the_template_and_opens_the_assistants_turn(serve: Serve) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    prompt = "<|im_start|>user\nHi<|im_end|><|im_start|>assistant\n"
    async with serve() as running:
        ids = await running.client.tokenize(messages)
        result = await running.client.chat(messages, max_tokens=20)
        same = await running.client.generate(messages, max_tokens=20)
        async with running.client.chat_stream(messages, max_tokens=20) as stream:
            streamed = "".join([chunk.text async for chunk in stream])
    assert ids == [257, *b"user\nHi", 258, 257, *b"assistant\n"]
    assert len(prompt) > len(ids)
    # The echo begins with the prompt: <|im_start|>user\nHi, and there ends at <|im_end|>.
    assert (result.text, result.finish_reason) == ("user\nHi", "stop_token")
    assert same.text == streamed == result.text


async def test_control_tokens_in_messages_are_plain_characters(serve: Serve) -> None:
    async with serve() as running:
        ids = await running.client.tokenize([{"role": "user", "content": "<|im_end|>"}])
    assert ids.count(258) == 1  # the template's own


async def test_several_completions(serve: Serve) -> None:
    async with serve() as running:
        result = await running.client.generate("abc", max_tokens=4, n=3, seed=2**64 - 1)
        async with running.client.generate_stream("abc", max_tokens=4, n=2) as stream:
            chunks = [chunk async for chunk in stream]
            assert stream.result is not None
            assert [c.text for c in stream.result.completions] == ["abca", "abca"]
    assert [c.text for c in result.completions] == ["abca"] * 3
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (3, 12)
    assert {chunk.completion_index for chunk in chunks} == {0, 1}


async def test_max_tokens_unset_is_the_default_or_the_rest_of_the_context(serve: Serve) -> None:
    async with serve(default_max_tokens=5) as running:
        assert (await running.client.generate("ab")).usage.completion_tokens == 5
        info = await running.client.model_info()
        rest = await running.client.generate("a" * (info.max_seq_len - 3))
    assert (rest.usage.completion_tokens, rest.finish_reason) == (3, "length")


@pytest.mark.parametrize("text", ["", "plain", "<|im_end|>", "naïve 𝄞"])
async def test_tokenize_and_detokenize(serve: Serve, text: str) -> None:
    async with serve() as running:
        ids = await running.client.tokenize(text)
        assert ids == list(text.encode())
        assert await running.client.detokenize(ids) == text


async def test_detokenize_control_tokens(serve: Serve) -> None:
    async with serve() as running:
        assert await running.client.detokenize([257, 97]) == "a"
        assert await running.client.detokenize([257, 97], include_special_tokens=True) == "<|im_start|>a"


async def test_parse_special_tokens_only_where_allowed(serve: Serve) -> None:
    async with serve(allow_special_tokens=True) as running:
        assert await running.client.tokenize("a<|im_end|>", parse_special_tokens=True) == [97, 258]


async def test_model_info(serve: Serve, text_model: Any) -> None:
    async with serve(model_name="tiny") as running:
        info = await running.client.model_info()
    assert (info.model_name, info.vocab_size, info.max_seq_len) == ("tiny", 259, 4096)
    assert (info.bos_token_id, info.eos_token_ids) == (256, (258,))
    assert info.tokenizer_sha256 == text_model.tokenizer.sha256


async def test_request_id_in_use(serve: Serve) -> None:
    async with serve() as running, running.client.generate_stream("a", max_tokens=4000, request_id="one") as stream:
        await anext(stream)
        with pytest.raises(InvalidRequestError, match=r"ALREADY_EXISTS.*'one'"):
            await running.client.generate("a", max_tokens=1, request_id="one")
