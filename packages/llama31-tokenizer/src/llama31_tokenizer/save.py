"""A tokenizer written out: a `Vocabulary` in, the files that this package and transformers load out."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama31_tokenizer import llama3
from llama31_tokenizer.byte_level import bytes_to_spelling
from llama31_tokenizer.controls import is_llama3
from llama31_tokenizer.errors import TokenizerError
from llama31_tokenizer.llama3_template import LLAMA3_TEMPLATE
from llama31_tokenizer.patterns import pre_tokenizer_of_pattern
from llama31_tokenizer.ranks import format_ranks
from llama31_tokenizer.vocabulary import Vocabulary


def save_vocabulary(vocabulary: Vocabulary, directory: Path) -> list[Path]:
    """Write a vocabulary's files into a directory, each whole or not at all.

    tokenizer.json and tokenizer_config.json are what `transformers.AutoTokenizer` loads; tokenizer.model is written
    where its format can hold the vocabulary (Llama 3's ranks, a SentencePiece model).

    Returns:
        The files written.

    Raises:
        TokenizerError: the directory cannot be written.
    """
    files: dict[str, bytes] = {}
    if vocabulary.sentencepiece_model is not None:
        files["tokenizer.model"] = vocabulary.sentencepiece_model
    else:
        if len(vocabulary.ranks) == llama3.NUM_RANKS == max(vocabulary.ranks.values()) + 1:
            files["tokenizer.model"] = format_ranks(vocabulary.ranks)
        files["tokenizer.json"] = _dump(build_hf_json(vocabulary))
    files["tokenizer_config.json"] = _dump(build_config(vocabulary), indent=2)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            _write(directory / name, data)
    except OSError as error:
        raise TokenizerError(f"{directory}: cannot be written ({error.strerror}); choose another directory") from error
    return [directory / name for name in files]


def build_hf_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """The tokenizer.json of a byte-level BPE vocabulary."""
    assert vocabulary.pattern is not None
    vocab = {bytes_to_spelling(token): number for token, number in sorted(vocabulary.ranks.items(), key=lambda i: i[1])}
    merges = _find_merges(vocab)
    added = {**vocabulary.special_tokens, **vocabulary.literal_tokens}
    behind = sorted(number for number in added.values() if number > max(vocab.values()))
    if len(behind) < len(added) or behind != list(range(len(vocab), len(vocab) + len(behind))):
        # tokenizers numbers added tokens from the vocabulary's size on unless the vocabulary has them itself.
        vocab.update(added)
    controls = vocabulary.controls
    names = {number: name for name, number in added.items()}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": name in vocabulary.special_tokens,
            }
            for name, number in sorted(added.items(), key=lambda item: item[1])
        ],
        "normalizer": {"type": vocabulary.normalization} if vocabulary.normalization else None,
        "pre_tokenizer": pre_tokenizer_of_pattern(vocabulary.pattern),
        "post_processor": _build_post_processor(
            names.get(controls.bos_id) if controls.add_bos and controls.bos_id is not None else None,
            names.get(controls.eos_id) if controls.add_eos and controls.eos_id is not None else None,
            added,
        ),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if vocabulary.unknown_byte_id is None else names.get(vocabulary.unknown_byte_id),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": merges,
        },
    }


def build_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """The tokenizer_config.json."""
    controls = vocabulary.controls
    names = {number: name for name, number in vocabulary.special_tokens.items()}
    roles = {"bos": controls.bos_id, "eos": controls.eos_id, "pad": controls.pad_id}
    stated = {f"{role}_token": names[number] for role, number in roles.items() if number in names}
    template = vocabulary.chat_template
    if template is None and is_llama3(vocabulary.special_tokens):
        template = LLAMA3_TEMPLATE
    return {
        **stated,
        "add_bos_token": controls.add_bos,
        "add_eos_token": controls.add_eos,
        **({} if template is None else {"chat_template": template}),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_class": "LlamaTokenizer" if vocabulary.sentencepiece_model else "PreTrainedTokenizerFast",
    }


def _find_merges(vocab: Mapping[str, int]) -> list[list[str]]:
    """Every way to put a token together from two earlier ones, in rank order: what tiktoken's algorithm joins.

    Args:
        vocab: spellings in rank order, one character a byte.
    """
    merges: list[list[str]] = []
    rank_of = vocab.get
    for token, rank in vocab.items():
        known = []
        for cut in range(1, len(token)):
            left = rank_of(token[:cut], rank)
            if left < rank and (right := rank_of(token[cut:], rank)) < rank:
                known.append((left, right, cut))
        merges += [[token[:cut], token[cut:]] for _, _, cut in sorted(known)]
    return merges


def _build_post_processor(bos: str | None, eos: str | None, ids: dict[str, int]) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    if bos is None and eos is None:
        return byte_level

    def around(*sequences: tuple[str, int]) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        for sequence, type_id in sequences:
            parts += [{"SpecialToken": {"id": bos, "type_id": type_id}}] if bos else []
            parts.append({"Sequence": {"id": sequence, "type_id": type_id}})
            parts += [{"SpecialToken": {"id": eos, "type_id": type_id}}] if eos else []
        return parts

    template = {
        "type": "TemplateProcessing",
        "single": around(("A", 0)),
        "pair": around(("A", 0), ("B", 1)),
        "special_tokens": {
            name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (bos, eos) if name is not None
        },
    }
    return {"type": "Sequence", "processors": [byte_level, template]}


def _dump(value: Any, indent: int | None = None) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=indent) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
