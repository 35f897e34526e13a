"""What tools/bench/data.py runs in processes of their own: names and paths in, figures out."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SEQ_LENGTH = 8192


class Clock:
    """Seconds of wall and of cpu, this process's and its finished children's, since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), self._cpu_s()

    @staticmethod
    def _cpu_s() -> float:
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system

    def figures(self) -> dict[str, float]:
        return {"wall_s": time.perf_counter() - self._wall, "cpu_s": self._cpu_s() - self._cpu}


def repeat_records(data: str | None, count: int, path: Path) -> Path:
    """A JSON Lines file of the records of an Alpaca file, over and over."""
    from llama31_data.sample import SAMPLE_PATH

    lines = [json.dumps(record) + "\n" for record in json.loads(Path(data or SAMPLE_PATH).read_text(encoding="utf-8"))]
    with path.open("w", encoding="utf-8") as file:
        for first in range(0, count, len(lines)):
            file.writelines(lines[: count - first])
    return path


def _dialogs(source: str) -> list[list[dict[str, str]]]:
    from llama31_data.alpaca import prompt_and_answer

    with open(source, encoding="utf-8") as file:
        pairs = [prompt_and_answer(json.loads(line)) for line in file]
    return [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]


def tokenise(source: str, tokenizer_file: str) -> dict[str, Any]:
    """Dialogs that are in memory through ChatFormat, ids thrown away; only this counts."""
    from llama31_tokenizer import ChatFormat, Tokenizer

    dialogs = _dialogs(source)
    chat = ChatFormat(Tokenizer.from_file(tokenizer_file))
    clock = Clock()
    tokens = sum(len(chat.encode_dialog(dialog).ids) for dialog in dialogs)
    return {"samples": len(dialogs), "tokens": tokens, **clock.figures()}


def tokenise_text(source: str, tokenizer_file: str) -> dict[str, Any]:
    """The text of the dialogs alone, without what the chat format puts around it."""
    from llama31_tokenizer import Tokenizer

    texts = [message["content"] for dialog in _dialogs(source) for message in dialog]
    encode = Tokenizer.from_file(tokenizer_file).encode
    clock = Clock()
    tokens = sum(len(encode(text)) for text in texts)
    return {"samples": len(texts) // 2, "tokens": tokens, **clock.figures()}


def preprocess(
    source: str, tokenizer_file: str, work: str, layout: str, workers: str, output: str | None = None
) -> dict[str, Any]:
    """A whole run."""
    from llama31_data import PreprocessOptions
    from llama31_data import preprocess as run
    from llama31_data.encode import encoder_for

    options = PreprocessOptions(
        (source,),
        tokenizer_file,
        output or f"{work}/bench.mindrecord",
        seq_length=SEQ_LENGTH,
        packing=layout == "packed",
        buckets=() if layout == "buckets" else None,
        workers=int(workers),
        overwrite=True,
    )
    encoder_for(options.recipe)
    clock = Clock()
    manifest = run(options)
    figures = clock.figures()
    tokens_written = sum(int(width) * n for entry in manifest.sets for width, n in entry.records_by_width.items())
    return {
        "samples": manifest.counts["samples"],
        "tokens": manifest.counts["tokens"],
        "fill_rate": manifest.fill_rate,
        "size_mb": tokens_written * 4 * len(manifest.columns) / 1e6,
        **figures,
    }


def synthetic(count: str, tokenizer_file: str, work: str) -> dict[str, Any]:
    """A run with two workers over records that are made as they are read."""
    path = Path(work) / "synthetic.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(_synthetic_lines(int(count)))
    return preprocess(str(path), tokenizer_file, work, "packed", "2")


def _synthetic_lines(count: int) -> Iterator[str]:
    words = ("river", "stone", "lantern", "copper", "quiet", "harbour", "seven", "maple", "winter", "signal")
    for number in range(count):
        chosen = [words[number * step % 10] for step in (1, 3, 7, 9)]
        record = {
            "instruction": f"Put {', '.join(chosen)} into sentence {number}.",
            "input": "",
            "output": f"The {chosen[0]} {chosen[1]} stood by the {chosen[2]} {chosen[3]} for {number} days.",
        }
        yield json.dumps(record) + "\n"


def guide_script(source: str, tokenizer_file: str, work: str) -> dict[str, Any]:
    """MindFormers' llama_preprocess.py as it works: tokenise, again for the mask, pad as lists, write one by one."""
    import numpy as np
    from fastchat.conversation import get_conv_template
    from mindspore.mindrecord import FileWriter

    from llama31_tokenizer import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_file)
    dialogs = _dialogs(source)
    width = SEQ_LENGTH + 1
    writer = FileWriter(f"{work}/guide.mindrecord", 1, overwrite=True)
    writer.add_schema({name: {"type": "int32", "shape": [-1]} for name in ("input_ids", "labels")}, "qa")
    samples = []
    clock = Clock()
    for dialog in dialogs:
        conversation = get_conv_template("vicuna_v1.1")
        for role, message in zip(conversation.roles, dialog, strict=True):
            conversation.append_message(role, message["content"])
        (text,) = filter(None, re.split("</s>", conversation.get_prompt()))
        ids = tokenizer.encode(text, bos=True, eos=True)
        padded = (ids + [tokenizer.pad_id] * (width - len(ids)))[:width]
        target = np.array(padded)
        question = text.split(" ASSISTANT: ")[0] + " ASSISTANT: "
        length = len(tokenizer.encode(text, bos=True, eos=True))
        target[: len(tokenizer.encode(question, bos=True, eos=True)) - 2] = -100
        target[length:] = -100
        samples.append((padded, target.tolist()))
    ids_of, labels_of = (np.array([sample[column] for sample in samples], np.int32) for column in (0, 1))
    for row in range(len(samples)):
        writer.write_raw_data([{"input_ids": ids_of[row], "labels": labels_of[row]}])
    writer.commit()
    return {"samples": len(samples), "size_mb": len(samples) * width * 8 / 1e6, **clock.figures()}


def load(path: str, workers: str) -> dict[str, Any]:
    """One epoch through load_dataset."""
    from llama31_data import load_dataset

    dataset = load_dataset(path, 8, SEQ_LENGTH, num_workers=int(workers))
    clock = Clock()
    records = size = 0
    for batch in dataset.create_dict_iterator(num_epochs=1, output_numpy=True):
        records += len(batch["input_ids"])
        size += sum(column.nbytes for column in batch.values())
    return {"records": records, "size_mb": size / 1e6, **clock.figures()}
