"""Plain text: as MindFormers' script cuts it, and as records of text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llama31_data import DataError
from llama31_data.wikitext import clean_wikitext
from llama31_tokenizer import Tokenizer

# WikiText's spelling, in words of our own.
WIKITEXT = """ \n = Lantern fish = \n \n The lantern fish ( family Myctophidae ) is a small , deep @-@ sea fish . It
 weighs 1 @,@ 200 mg at 3 @.@ 5 cm . \n Its lights are its own ; nobody " lends " them . \n \n = = Habitat = = \n
 \n By day it stays at 400 m ; by night it rises . \n It has no home , only a depth . \n"""


def old_script(tokenizer: Tokenizer, text: str, width: int) -> list[list[int]]:
    """What llama_preprocess.py writes for a file of WikiText: cleaned as a whole, each paragraph with bos and eos."""
    stream: list[int] = []
    for paragraph in clean_wikitext(text).split("\n\n"):
        if paragraph and not paragraph.strip().startswith("="):
            stream += tokenizer.encode(paragraph.strip("\n"), bos=True, eos=True)
    return [stream[start : start + width] for start in range(0, len(stream) - width + 1, width)]


def test_cleaning_undoes_wikitext_spelling() -> None:
    raw = 'a deep @-@ sea fish ( small ) , 1 @,@ 200 mg ; " lends " it \'s \n'
    assert clean_wikitext(raw) == 'a deep-sea fish (small), 1,200 mg; "lends" it\'s\n'


def test_text_is_one_stream_cut_at_the_record_length(lab: Any, llama3: Tokenizer) -> None:
    text = WIKITEXT * 20
    (lab.path / "wiki.train.tokens").write_text(text, encoding="utf-8")
    manifest = lab.run(dataset_type="wiki", input_glob=(str(lab.path / "wiki.train.tokens"),), seq_length=63)
    records = [record["input_ids"].tolist() for record in lab.records()]
    assert records == old_script(llama3, text, 64)
    assert all((record["labels"] == record["input_ids"]).all() for record in lab.records())
    assert manifest.counts["headings"] == 40
    assert manifest.counts["tokens"] == 64 * len(records)
    assert manifest.counts["dropped_tokens"] < 64
    assert manifest.fill_rate == 1


def test_repeat_goes_through_the_stream_again_before_it_is_cut(lab: Any) -> None:
    (lab.path / "a.txt").write_text(WIKITEXT, encoding="utf-8")
    lab.run(dataset_type="wiki", input_glob=(str(lab.path / "a.txt"),), seq_length=15)
    once = np.concatenate([record["input_ids"] for record in lab.records()])
    manifest = lab.run(
        dataset_type="wiki", input_glob=(str(lab.path / "a.txt"),), seq_length=15, repeat=3, overwrite=True
    )
    thrice = np.concatenate([record["input_ids"] for record in lab.records()])
    assert thrice[: len(once)].tolist() == once.tolist()
    assert len(thrice) + manifest.counts["dropped_tokens"] > 3 * len(once)


def test_records_of_text_pack_with_every_token_but_the_first_trained_on(lab: Any, llama3: Tokenizer) -> None:
    texts = ["One short text.", "Another ( untouched ) text.", "word " * 100]
    path = lab.jsonl([{"text": text} for text in texts])
    lab.run(dataset_type="wiki", input_glob=(path,), seq_length=63, packing=True)
    seen = []
    for record in lab.records():
        for segment in range(1, record["segment_ids"].max() + 1):
            here = record["segment_ids"] == segment
            ids, labels = record["input_ids"][here], record["labels"][here]
            assert labels[0] == -100
            assert (labels[1:] == ids[1:]).all()
            seen.append(llama3.decode(ids.tolist(), skip_special_tokens=True))
    assert set(texts[:2]) <= set(seen)
    assert sum(text.count("word") for text in seen) == 100


def test_too_little_text_for_one_record_is_an_error(lab: Any) -> None:
    (lab.path / "a.txt").write_text("few words", encoding="utf-8")
    with pytest.raises(DataError, match=r"the input has 4 tokens, fewer than one record of 257"):
        lab.run(dataset_type="wiki", input_glob=(str(lab.path / "a.txt"),))
    assert lab.snapshot() == {}
