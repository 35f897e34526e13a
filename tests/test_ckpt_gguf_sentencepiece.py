"""The tokenizer.model that llama31-ckpt writes from a GGUF file against the SentencePiece model it came from."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece

from llama31_ckpt.cli import main
from llama31_core.checkpoint import parameter_shapes, spell
from llama31_core.config import ModelConfig
from llama31_tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "A checkpoint holds tensors, names and shapes; nothing else.",
    "def f(x): return x ** 2  # squares 1234567890",
    "naïve café, 中文分词, ñandú and Ünïcödé",
] * 20
TEXTS = ["Hello world", "  two  spaces ", "a\tb\nc", "日本語 👍🏽 unseen", "", "<s> plain text </s>", "café 中文 12345"]


def train(path: Path, **settings: Any) -> sentencepiece.SentencePieceProcessor:
    """A model with Llama's settings."""
    wishes = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", **settings}
    wishes |= {"remove_extra_whitespaces": False, "vocab_size": 360, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(path.with_suffix("")), **wishes
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def kind_of(model: Any, number: int) -> gguf.TokenType:
    checks = {"UNKNOWN": "is_unknown", "CONTROL": "is_control", "UNUSED": "is_unused", "BYTE": "is_byte"}
    found = [gguf.TokenType[kind] for kind, check in checks.items() if getattr(model, check)(number)]
    return found[0] if found else gguf.TokenType.NORMAL


def write_gguf(path: Path, model: Any, **changes: Any) -> Path:
    """A tiny model with this vocabulary, as llama.cpp's converter writes it."""
    config = ModelConfig.preset("tiny").model_copy(update={"vocab_size": model.get_piece_size()})
    numbers = range(model.get_piece_size())
    file = gguf.GGUFWriter(str(path), "llama")
    file.add_block_count(config.n_layers)
    file.add_context_length(config.max_seq_len)
    file.add_embedding_length(config.dim)
    file.add_feed_forward_length(config.ffn_dim)
    file.add_head_count(config.n_heads)
    file.add_head_count_kv(config.n_kv_heads)
    file.add_layer_norm_rms_eps(config.norm_eps)
    file.add_tokenizer_model("llama")
    file.add_token_list(changes.get("tokens", [model.id_to_piece(number) for number in numbers]))
    file.add_token_scores(changes.get("scores", [model.get_score(number) for number in numbers]))
    file.add_token_types(changes.get("types", [kind_of(model, number) for number in numbers]))
    file.add_bos_token_id(model.bos_id())
    file.add_eos_token_id(model.eos_id())
    file.add_unk_token_id(model.unk_id())
    file.add_add_space_prefix(changes.get("add_space_prefix", True))
    for name, shape in parameter_shapes(config).items():
        file.add_tensor(spell(name, "gguf"), np.zeros(shape, np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
def test_ids_are_those_of_the_original(add_dummy_prefix: bool, tmp_path: Path) -> None:
    original = train(tmp_path / "m.model", add_dummy_prefix=add_dummy_prefix)
    source = write_gguf(tmp_path / "m.gguf", original, add_space_prefix=add_dummy_prefix)
    assert main(["convert", "--input_path", str(source), "--output_path", f"{tmp_path}/model"]) == 0
    written = sentencepiece.SentencePieceProcessor(model_file=f"{tmp_path}/model/tokenizer.model")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "model")
    rng = random.Random(3)
    texts = TEXTS + ["".join(rng.choices("abc XYZ019.,\n\téß中👍▁", k=rng.randint(1, 40))) for _ in range(300)]
    for text in texts:
        ids = original.encode(text)
        assert written.encode(text) == ids, text
        assert tokenizer.encode(text, bos=False, eos=False) == ids, text
        assert written.decode(ids) == original.decode(ids), text
    assert (written.bos_id(), written.eos_id(), written.unk_id()) == (1, 2, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [0.0]}, "tokenizer.ggml.scores has 1 entries, expected 360"),
        ({"types": [1] * 360}, "this one has 0 unknown, 0 bytes, 0 empty"),
        ({"types": [2] + [6] * 255 + [1] * 104}, "this one has 1 unknown, 255 bytes, 0 empty"),
    ],
)
def test_a_vocabulary_that_is_none_stops_the_conversion(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_gguf(tmp_path / "m.gguf", train(tmp_path / "m.model"), **changes)
    assert main(["convert", "--input_path", str(source), "--output_path", f"{tmp_path}/model"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
