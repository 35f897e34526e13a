"""Chinese text cut and looked up: the ids of tiktoken over the whole, and None where it must not be cut."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama31_tokenizer import Tokenizer, han_text
from llama31_tokenizer.han_cuts import HanCuts
from llama31_tokenizer.han_encoder import HanEncoder
from llama31_tokenizer.joined_ids import JoinedIds
from llama31_tokenizer.patterns import LLAMA3

HAN = [chr(code) for first, last in ((0x3400, 0x4DBF), (0x4E00, 0x9FFF)) for code in range(first, last + 1)]
SENTENCE = (
    "昇腾处理器上的大语言模型，支持8卡并行训练，分词器应当与参考实现逐一相同而且更快。《测试》：“好”！\n"
    "\u3000\u3000他说：AI技术，it's很好…… 2026年\n"
)


@pytest.fixture(scope="module")
def raw(llama3: Tokenizer) -> tiktoken.Encoding:
    """tiktoken with the published pattern."""
    assert LLAMA3.split
    return tiktoken.Encoding(
        "raw", pat_str=LLAMA3.split, mergeable_ranks=dict(llama3.vocabulary.ranks), special_tokens={}
    )


@pytest.fixture(scope="module")
def cuts(llama3: Tokenizer) -> HanCuts:
    return HanCuts(llama3.vocabulary.ranks)


@pytest.fixture(scope="module")
def encoder(raw: tiktoken.Encoding, cuts: HanCuts) -> HanEncoder:
    return HanEncoder(cuts, each_by(raw))


def each_by(raw: tiktoken.Encoding) -> Callable[[Sequence[str]], JoinedIds]:
    def encode_each(texts: Sequence[str]) -> JoinedIds:
        rows = [raw.encode_ordinary(text) for text in texts]
        return JoinedIds.end_to_end(
            np.array([token for row in rows for token in row], np.int32), np.array(list(map(len, rows)))
        )

    return encode_each


def check(encoder: HanEncoder, raw: tiktoken.Encoding, texts: list[str]) -> None:
    found = encoder.encode(texts)
    assert found is not None
    rows = [raw.encode_ordinary(text) for text in texts]
    assert found.without_separators().tolist() == [token for row in rows for token in row]
    assert found.lengths.tolist() == [len(row) for row in rows]


def joined_han(llama3: Tokenizer) -> list[str]:
    """Tokens of whole characters that have a Han one."""
    han = set(HAN)
    texts = (token.decode("utf-8", "ignore") for token in llama3.vocabulary.ranks if not token.isascii())
    return [text for text in texts if not han.isdisjoint(text) and "中文字幕" not in text]


PARTS = st.one_of(
    st.sampled_from(
        ["'s", "'LL", " ", "  ", "\n", "\r\n", "\t", "123", "4", "\u3000", "é", "，", "。", "”", "“", "(", "—"]
    ),
    st.sampled_from(
        ["'", "ー", "の", "カ", "한", "技术", "AI", "\u0301", "\u200b", "😀", "𠮷", "ſ", "½", "〇", "々", "䷀"]
    ),
    st.text(st.sampled_from(HAN), max_size=6),
    st.text(
        st.sampled_from("的一是了我不人在他有这个上们来到时大地为子中你说生国年着就那和要数据加作除取始"), max_size=12
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="\0\uffff"), max_size=4),
)


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(PARTS, max_size=25).map("".join), min_size=1, max_size=4))
def test_made_up_text(encoder: HanEncoder, raw: tiktoken.Encoding, texts: list[str]) -> None:
    check(encoder, raw, texts)


def test_all_tokens_with_han_characters_beside_each_other(
    encoder: HanEncoder, raw: tiktoken.Encoding, llama3: Tokenizer
) -> None:
    tokens = joined_han(llama3)
    assert len(tokens) > 3000
    rng = random.Random(0)
    for between in ("", "", "，", "。\n", " ", "1"):
        rng.shuffle(tokens)
        check(encoder, raw, [between.join(tokens)])


def test_every_han_character(encoder: HanEncoder, raw: tiktoken.Encoding) -> None:
    chars = list(HAN)
    random.Random(1).shuffle(chars)
    check(encoder, raw, ["".join(chars), "，".join(chars), "“".join(chars), "数".join(chars)])


@pytest.mark.parametrize(("bits", "most_kept"), [(6, 1 << 18), (18, 500), (6, 500)])
def test_small_tables_and_forgetting(
    bits: int, most_kept: int, cuts: HanCuts, raw: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama31_tokenizer.han_encoder._TABLE_BITS", bits)
    monkeypatch.setattr("llama31_tokenizer.han_encoder._MOST_KEPT", most_kept)
    small = HanEncoder(cuts, each_by(raw))
    first = small._table
    for at in range(0, 9000, 300):
        check(small, raw, ["".join(HAN[at : at + 300]), SENTENCE])
        check(small, raw, [SENTENCE, "".join(HAN[at : at + 300])])
    assert (small._table is first) == (most_kept > 500)
    assert small._rows.num_ids <= most_kept + 1000


def test_segments_are_encoded_once(cuts: HanCuts, raw: tiktoken.Encoding) -> None:
    asked: list[str] = []

    def encode_each(texts: Sequence[str]) -> JoinedIds:
        asked.extend(texts)
        return each_by(raw)(texts)

    counting = HanEncoder(cuts, encode_each)
    long = "，" + "a long piece of English " * 3 + "。"
    check(counting, raw, [SENTENCE * 2, long])
    assert len(asked) > 10
    assert len(asked) == len(set(asked))
    before = counting._rows.num_ids
    kept = [text for text in asked if len(text) <= 16]
    asked.clear()
    check(counting, raw, [SENTENCE * 3, long, SENTENCE])
    assert len(asked) == 1  # the long one, which is not kept
    assert asked[0] not in kept
    assert counting._rows.num_ids == before


@pytest.mark.parametrize("text", ["看中文字幕组", "字数\0", "字\uffff数", "字\ud800数"])
def test_what_must_not_be_cut(text: str, encoder: HanEncoder, raw: tiktoken.Encoding, llama3: Tokenizer) -> None:
    assert encoder.encode([SENTENCE, text]) is None
    assert llama3.encode(text * 700) == raw.encode_ordinary(text * 700)


@pytest.mark.parametrize("text", ["", "\0字", "字\0数，\0。", "1\0字", "\n\0“字”", "<|begin_of_text|>的"])
def test_texts_beside_empty_ones_with_zeros_and_names_of_control_tokens(
    text: str, encoder: HanEncoder, raw: tiktoken.Encoding, eager: Tokenizer
) -> None:
    check(encoder, raw, [text, "", SENTENCE, text + SENTENCE, "", ""])
    texts = ["", text + SENTENCE * 60, text, "", SENTENCE + text]
    assert eager.encode_batch(texts, num_threads=1) == [raw.encode_ordinary(one) for one in texts]


def test_a_token_that_merging_does_not_reach_is_found(cuts: HanCuts, llama3: Tokenizer) -> None:
    assert cuts.unmergeable == ["中文字幕"]  # 字幕 has the lowest rank, then 文字幕 is no token
    ranks = llama3.vocabulary.ranks
    whole = "天地玄黄".encode()
    assert whole not in ranks
    assert "天地玄黄" in HanCuts({**ranks, whole: len(ranks)}).unmergeable


@pytest.mark.parametrize("odd", [b"\xed\xa0\x80\xe4\xb8\x80", b"\xe0\x80\x80\xe4", b"\x80\x80\x80\xe4\xb8\x80"])
def test_tokens_that_are_no_text(odd: bytes, llama3: Tokenizer) -> None:
    ranks = {**llama3.vocabulary.ranks, odd: len(llama3.vocabulary.ranks)}
    plain = tiktoken.Encoding("odd", pat_str=str(LLAMA3.split), mergeable_ranks=ranks, special_tokens={})
    check(HanEncoder(HanCuts(ranks), each_by(plain)), plain, [SENTENCE, "一丁七"])


@pytest.fixture
def eager(llama3_file: Path, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """One that cuts Chinese from the first text on."""
    monkeypatch.setattr(han_text, "_CHARS_PER_BUILD", 0)
    return Tokenizer.from_file(llama3_file)


CALLS: dict[str, Callable[[Tokenizer, str], list[int]]] = {
    "encode": lambda tokenizer, text: tokenizer.encode(text),
    "encode_to_numpy": lambda tokenizer, text: tokenizer.encode_to_numpy(text).tolist(),
    "encode_many_to_numpy": lambda tokenizer, text: tokenizer.encode_many_to_numpy([text])[0].tolist(),
    "encode_batch": lambda tokenizer, text: tokenizer.encode_batch([text], num_threads=1)[0],
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_of_a_tokenizer(call: str, eager: Tokenizer, raw: tiktoken.Encoding) -> None:
    text = SENTENCE * 60
    want = raw.encode_ordinary(text)
    assert CALLS[call](eager, text) == want
    assert eager._codec._han._idle  # type: ignore[union-attr]
    assert eager.count(text) == len(want)
    assert eager.decode(want) == text
    assert eager.encode_with_offsets(text).ids == want


def test_long_runs_and_longer_texts(eager: Tokenizer, raw: tiktoken.Encoding) -> None:
    text = SENTENCE * 4000
    assert eager.encode(text + "中" * 200_000 + text)[: len(text) // 4] == raw.encode_ordinary(text)[: len(text) // 4]
    assert eager.encode(text) == raw.encode_ordinary(text)


def test_short_english_and_first_texts_are_left_to_tiktoken(
    llama3_file: Path, monkeypatch: pytest.MonkeyPatch, raw: tiktoken.Encoding
) -> None:
    tokenizer = Tokenizer.from_file(llama3_file)
    policy = tokenizer._codec._han  # type: ignore[union-attr]
    assert policy is not None
    monkeypatch.setattr(han_text, "_CHARS_PER_BUILD", 5 * len(SENTENCE * 60))
    for count in range(1, 6):
        assert policy.encode([SENTENCE]) is None
        assert policy.encode(["It's “quoted” — " * 1000]) is None
        assert (policy.encode([SENTENCE * 60]) is None) == (count < 5)
    assert policy.encode(["It's “quoted” — " * 1000]) is None
    assert policy.encode([SENTENCE[:20]] * 100) is not None


@pytest.mark.parametrize("limit", ["_MOST_UNMERGEABLE", "_MOST_JOINED"])
def test_a_vocabulary_with_many_such_tokens_or_few_cuts_is_left_to_tiktoken(
    limit: str, llama3: Tokenizer, raw: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(han_text, "_CHARS_PER_BUILD", 0)
    monkeypatch.setattr(han_text, limit, 0)
    policy = han_text.HanText(llama3.vocabulary, each_by(raw))
    assert policy.encode([SENTENCE * 60]) is None
    assert policy.encode([SENTENCE * 60]) is None


def test_calls_at_the_same_time_have_an_encoder_each(
    llama3: Tokenizer, raw: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(han_text, "_CHARS_PER_BUILD", 0)
    inside: list[JoinedIds | None] = []

    def encode_each(texts: Sequence[str]) -> JoinedIds:
        if not inside:
            inside.append(None)
            inside[0] = policy.encode([SENTENCE * 60])  # as another thread would
        return each_by(raw)(texts)

    policy = han_text.HanText(llama3.vocabulary, encode_each)
    found = policy.encode([SENTENCE * 60])
    assert found is not None
    assert inside[0] is not None
    assert inside[0].ids.tolist() == found.ids.tolist() == raw.encode_ordinary(SENTENCE * 60)
    assert len(policy._idle) == 2


def test_an_encoder_is_not_used_again_after_an_interrupt(
    llama3: Tokenizer, raw: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(han_text, "_CHARS_PER_BUILD", 0)
    policy = han_text.HanText(llama3.vocabulary, each_by(raw))
    assert policy.encode([SENTENCE * 60]) is not None
    first = policy._idle[0]
    with monkeypatch.context() as context:
        context.setattr(first, "_keep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            policy.encode(["新的文字" + SENTENCE * 60])
    assert policy._idle == []
    found = policy.encode(["新的文字" + SENTENCE * 60])
    assert found is not None
    assert found.ids.tolist() == raw.encode_ordinary("新的文字" + SENTENCE * 60)


def test_many_texts_are_encoded_some_at_once(
    eager: Tokenizer, raw: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(han_text, "_CHARS_AT_ONCE", 2000)
    seen: list[int] = []
    encode = HanEncoder.encode

    def encode_seen(encoder: HanEncoder, texts: Sequence[str]) -> JoinedIds | None:
        seen.append(sum(map(len, texts)))
        return encode(encoder, texts)

    monkeypatch.setattr(HanEncoder, "encode", encode_seen)
    texts = [SENTENCE * count for count in range(40)]
    want = [raw.encode_ordinary(text) for text in texts]
    ids, lengths = eager.encode_many_to_numpy(texts)
    assert lengths.tolist() == list(map(len, want))
    assert ids.tolist() == [token for row in want for token in row]
    assert len(seen) > 10
    assert max(seen) < 2000 + len(texts[-1])


def test_threads_that_share_a_tokenizer(eager: Tokenizer, raw: tiktoken.Encoding) -> None:
    texts = ["".join(random.Random(seed).choices(HAN, k=4000)) + SENTENCE for seed in range(40)]
    want = [raw.encode_ordinary(text) for text in texts]
    found: list[list[list[int]]] = []
    threads = [threading.Thread(target=lambda: found.append([eager.encode(text) for text in texts])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [want] * 4


def test_tokenizers_of_a_vocabulary_share_its_cuts(eager: Tokenizer, llama3_file: Path) -> None:
    twin, other = Tokenizer(eager.vocabulary), Tokenizer.from_file(llama3_file)
    for tokenizer in (eager, twin, other):
        tokenizer.encode(SENTENCE * 60)
    encoders = [tokenizer._codec._han._idle[0] for tokenizer in (eager, twin, other)]  # type: ignore[union-attr]
    assert encoders[0]._cuts is encoders[1]._cuts is not encoders[2]._cuts
    assert encoders[0] is not encoders[1]


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_batches_of_texts_in_several_scripts(num_threads: int, eager: Tokenizer, raw: tiktoken.Encoding) -> None:
    rng = random.Random(num_threads)
    short = [
        SENTENCE,
        "plain words",
        "",
        "été",
        "数",
        "<|eot_id|> in a text",
        "한국어 문장",
        "def f(x):\n    return x\n",
    ]
    texts = [rng.choice(short) * rng.choice([1, 3, 900]) for _ in range(300)]
    want = [raw.encode_ordinary(text) for text in texts]
    assert eager.encode_batch(texts, num_threads=num_threads) == want
    assert eager.count_batch(texts, num_threads=num_threads) == list(map(len, want))
    ids, lengths = eager.encode_many_to_numpy(texts)
    assert lengths.tolist() == list(map(len, want))
    assert ids.tolist() == [token for row in want for token in row]
