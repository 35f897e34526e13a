"""Llama 3's own vocabulary in a GGUF file: what llama31-ckpt writes from it gives the ids of Meta's tokenizer.model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import transformers
from transformers.convert_slow_tokenizer import TikTokenConverter

from llama31_ckpt.cli import main
from llama31_tokenizer import Tokenizer
from model_assets import fetch

TEXTS = (
    "The quick brown fox — it's 12345678 o'clock, I'LL say!",
    "  \n\n\t indented\r\n   code():  # ümläut 中文 日本語 한국어 🇫🇷👍🏽",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "x" * 100 + " " * 40 + "\n" * 5,
    "٣٤٥ ½ Ⅷ naïve été",
    "",
)


@pytest.fixture(scope="module")
def meta_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(fetch("llama3-tokenizer"))


@pytest.fixture(scope="module")
def model_dir(meta_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer model with the real vocabulary, written by the gguf library, through llama31-ckpt."""
    directory = tmp_path_factory.mktemp("llama3")
    vocabulary, merges = TikTokenConverter().extract_vocab_merges_from_model(str(fetch("llama3-tokenizer")))
    special = sorted(meta_tokenizer.special_tokens.items(), key=lambda item: item[1])
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), *(token for token, _ in special)]
    assert [number for _, number in special] == list(range(128000, len(tokens)))
    file = gguf.GGUFWriter(str(directory / "llama3.gguf"), "llama")
    file.add_block_count(1)
    file.add_context_length(8192)
    file.add_embedding_length(32)
    file.add_feed_forward_length(32)
    file.add_head_count(2)
    file.add_head_count_kv(1)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_freq_base(500000.0)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("llama-bpe")
    file.add_token_list(tokens)
    file.add_token_types([1] * len(vocabulary) + [3] * len(special))
    file.add_token_merges([" ".join(merge) for merge in merges])
    file.add_bos_token_id(128000)
    file.add_eos_token_id(128009)
    file.add_add_bos_token(True)
    shapes: dict[str, tuple[int, ...]] = {
        "attn_q": (32, 32),
        "attn_k": (16, 32),
        "attn_v": (16, 32),
        "attn_output": (32, 32),
    }
    shapes |= {"ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32), "attn_norm": (32,), "ffn_norm": (32,)}
    for name, shape in shapes.items():
        file.add_tensor(f"blk.0.{name}.weight", np.ones(shape, np.float32))
    file.add_tensor("token_embd.weight", np.ones((len(tokens), 32), np.float16))
    file.add_tensor("output_norm.weight", np.ones(32, np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    command = ["convert", "--input_path", str(directory / "llama3.gguf"), "--output_path", str(directory / "model")]
    assert main(command) == 0
    return directory / "model"


@pytest.fixture(scope="module")
def written(model_dir: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(model_dir)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_meta_s_file(text: str, model_dir: Path, written: Any, meta_tokenizer: Tokenizer) -> None:
    expected = meta_tokenizer.encode(text, bos=True, allowed_special="all")
    assert written.encode(text) == expected
    assert Tokenizer.from_pretrained(model_dir).encode(text, bos=True, allowed_special="all") == expected


def test_random_texts_get_the_same_ids(model_dir: Path, written: Any, meta_tokenizer: Tokenizer) -> None:
    rng = random.Random(8)
    # Runs of spaces and newlines matter most: the merges of longer runs from shorter ones are in no simple order.
    texts = ["".join(rng.choices("     \n\n\tabcE.,'019-=中é👍", k=rng.randint(1, 80))) for _ in range(400)]
    ours = Tokenizer.from_pretrained(model_dir)
    expected = [meta_tokenizer.encode(text, bos=True) for text in texts]
    assert [ours.encode(text, bos=True) for text in texts] == expected
    assert [written.encode(text) for text in texts] == expected


def test_special_tokens_keep_their_ids(written: Any, meta_tokenizer: Tokenizer) -> None:
    assert {token: written.convert_tokens_to_ids(token) for token in meta_tokenizer.special_tokens} == dict(
        meta_tokenizer.special_tokens
    )
    assert (written.bos_token_id, written.eos_token_id) == (128000, 128009)
