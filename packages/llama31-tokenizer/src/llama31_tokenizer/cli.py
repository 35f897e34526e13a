"""The command `llama31-tokenizer`: files or standard input in, ids, text, counts or a vocabulary's facts out.

Exit status: 0 done, 1 an error in the input (one line on standard error), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, get_args

from llama31_tokenizer import __version__, llama3
from llama31_tokenizer.errors import TokenizerError
from llama31_tokenizer.fast_engine import Engine
from llama31_tokenizer.tokenizer import Tokenizer

_BATCH_TEXTS = 16_384
_BATCH_CHARS = 1 << 21  # enough for threads to share
MODEL_VARIABLE = "LLAMA31_TOKENIZER"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="llama31-tokenizer", description="Tokenise with a Llama vocabulary.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, with_files: str | None) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        command.add_argument(
            "--model",
            default=os.environ.get(MODEL_VARIABLE),
            help=f"tokenizer file or model directory (default: ${MODEL_VARIABLE})",
        )
        command.add_argument("--compat", choices=["mindformers", "meta"], help="ways of another Llama 3 tokenizer")
        command.add_argument(
            "--engine",
            choices=get_args(Engine),
            default="tiktoken",
            help="what encodes; fastokens (extra `fast`) gives the same ids faster and takes seconds to load",
        )
        if with_files:
            command.add_argument("files", nargs="*", metavar="FILE", help=f"{with_files}; '-' or none: standard input")
        return command

    encode = add("encode", "Write a JSON line of ids for each text.", "text files")
    count = add("count", "Write the number of tokens of each text.", "text files")
    for command in (encode, count):
        command.add_argument("--text", action="append", help="a text to encode instead of files; may be repeated")
        command.add_argument("--lines", action="store_true", help="each line of a file is a text of its own")
        command.add_argument("--jsonl", metavar="KEY", help="each line is a JSON object, its KEY the text")
        command.add_argument("--threads", type=int, metavar="N", help="threads (default: as many as cores)")
    encode.add_argument("--bos", action="store_true", help="put the beginning-of-text id in front")
    encode.add_argument("--eos", action="store_true", help="put the end-of-text id behind")
    encode.add_argument("--allow-special", action="store_true", help="read names of control tokens as their ids")
    encode.add_argument("--offsets", action="store_true", help="add the tokens' places in characters and bytes")
    decode = add("decode", "Write the text of each line of ids (JSON lists, or numbers with spaces).", "files of ids")
    decode.add_argument("--skip-special", action="store_true", help="leave control tokens out")
    decode.add_argument("--ids", metavar="IDS", help="ids to decode instead of files")
    chat = add("chat", "Write a JSON line of ids for each dialog (a JSON list of messages a line).", "files of dialogs")
    chat.add_argument("--generation-prompt", action="store_true", help="end with the start of an assistant's turn")
    chat.add_argument("--tools", type=Path, metavar="FILE", help="JSON list of function definitions")
    chat.add_argument("--date", help="today's date, as in '26 Jul 2024'")
    chat.add_argument("--text", action="store_true", help="write the rendered text instead of ids")
    add("inspect", "Write what a vocabulary is.", None)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.model is None:
        parser.error(f"--model is missing and ${MODEL_VARIABLE} is not set")
    commands = {"encode": _encode, "count": _count, "decode": _decode, "chat": _chat, "inspect": _inspect}
    try:
        path = Path(arguments.model)
        load = Tokenizer.from_pretrained if path.is_dir() else Tokenizer.from_file
        commands[arguments.command](load(path, compat=arguments.compat, engine=arguments.engine), arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has enough; keep the interpreter from flushing into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (TokenizerError, OSError) as error:
        if arguments.debug:
            raise
        print(f"llama31-tokenizer: error: {error}", file=sys.stderr)
        return 1
    return 0


def _encode(tokenizer: Tokenizer, arguments: argparse.Namespace) -> None:
    allowed = "all" if arguments.allow_special else frozenset[str]()
    if arguments.offsets:
        if arguments.allow_special or arguments.bos or arguments.eos:
            raise TokenizerError("--offsets is for plain texts; leave --allow-special, --bos and --eos out")
        for source, text in _read_texts(arguments):
            found = tokenizer.encode_with_offsets(text)
            spans = {"chars": found.char_spans.tolist(), "bytes": found.byte_spans.tolist()}
            _write({"source": source, "ids": found.ids, **spans})
        return
    for batch in _batches(_read_texts(arguments)):
        rows = tokenizer.encode_batch(
            [text for _, text in batch],
            bos=arguments.bos,
            eos=arguments.eos,
            allowed_special=allowed,
            num_threads=arguments.threads,
        )
        for (source, _), ids in zip(batch, rows, strict=True):
            _write({"source": source, "ids": ids})


def _count(tokenizer: Tokenizer, arguments: argparse.Namespace) -> None:
    total = 0
    for batch in _batches(_read_texts(arguments)):
        counts = tokenizer.count_batch([text for _, text in batch], num_threads=arguments.threads)
        for (source, text), tokens in zip(batch, counts, strict=True):
            _write({"source": source, "tokens": tokens, "characters": len(text)})
            total += tokens
    print(f"{total:,} tokens", file=sys.stderr)


def _decode(tokenizer: Tokenizer, arguments: argparse.Namespace) -> None:
    lines = [("--ids", arguments.ids)] if arguments.ids is not None else _read_lines(arguments.files)
    for source, line in lines:
        if not line.strip():
            continue
        try:
            ids = json.loads(line) if line.lstrip().startswith(("[", "{")) else [int(word) for word in line.split()]
        except ValueError as error:
            raise TokenizerError(f"{source}: not ids ({error}); expected [1, 2] or 1 2") from error
        ids = ids.get("ids") if isinstance(ids, dict) else ids
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise TokenizerError(f"{source}: not a list of ids; expected [1, 2] or 1 2")
        print(tokenizer.decode(ids, skip_special_tokens=arguments.skip_special))


def _chat(tokenizer: Tokenizer, arguments: argparse.Namespace) -> None:
    from llama31_tokenizer.chat import ChatFormat

    chat = ChatFormat(tokenizer)
    tools = (
        _parse_json(_text(arguments.tools.read_bytes(), str(arguments.tools)), str(arguments.tools))
        if arguments.tools
        else None
    )
    for source, line in _read_lines(arguments.files):
        if not line.strip():
            continue
        messages = _parse_json(line, source)
        if isinstance(messages, dict):
            messages = messages.get("messages", [])
        try:
            dialog = chat.encode_dialog(
                messages, add_generation_prompt=arguments.generation_prompt, tools=tools, date=arguments.date
            )
            spans = [] if arguments.text else dialog.assistant_spans
        except TokenizerError as error:
            raise TokenizerError(f"{source}: {error}") from error
        if arguments.text:
            print(tokenizer.decode(dialog.ids))
        else:
            _write({"source": source, "ids": dialog.ids, "assistant_spans": spans})


def _inspect(tokenizer: Tokenizer, _: argparse.Namespace) -> None:
    vocabulary = tokenizer.vocabulary
    template = vocabulary.chat_template
    facts = {
        "file": str(vocabulary.source),
        "kind": vocabulary.kind,
        "sha256": tokenizer.sha256,
        "genuine": tokenizer.sha256 == llama3.GENUINE_SHA256,
        "vocab_size": tokenizer.vocab_size,
        "ranks": len(vocabulary.ranks) or None,
        "pre_tokenizer": vocabulary.pattern.name if vocabulary.pattern else None,
        "normalization": vocabulary.normalization,
        **{f"{role}_id": getattr(tokenizer, f"{role}_id") for role in ("bos", "eos", "pad", "eot", "eom")},
        "stop_ids": list(tokenizer.stop_ids),
        "special_tokens": len(tokenizer.special_tokens),
        "chat_template": None if template is None else f"{len(template)} characters",
    }
    print(json.dumps(facts, indent=2, ensure_ascii=False))


def _read_texts(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    if arguments.text is not None:
        yield from (("--text", text) for text in arguments.text)
    elif arguments.jsonl is not None:
        for source, line in _read_lines(arguments.files):
            value = _parse_json(line, source)
            if not isinstance(value, dict) or not isinstance(value.get(arguments.jsonl), str):
                raise TokenizerError(f"{source}: no text under {arguments.jsonl!r}; --jsonl names the key of the text")
            yield source, value[arguments.jsonl]
    elif arguments.lines:
        yield from _read_lines(arguments.files)
    else:
        for name in arguments.files or ["-"]:
            with _open(name) as file:
                yield name, _text(file.read(), name)


def _read_lines(files: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in files or ["-"]:
        with _open(name) as file:
            for number, line in enumerate(file, start=1):
                yield f"{name}:{number}", _text(line.removesuffix(b"\n"), f"{name}:{number}")


def _open(name: str) -> AbstractContextManager[BinaryIO]:
    # Bytes, so that line ends reach the tokenizer as they are.
    return nullcontext(sys.stdin.buffer) if name == "-" else Path(name).open("rb")


def _text(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{source}: byte {error.start} is not UTF-8; convert the file first") from error


def _parse_json(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{source}: not JSON ({error.msg} at column {error.colno})") from error


def _batches(texts: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    size = 0
    for source, text in texts:
        batch.append((source, text))
        size += len(text)
        if size >= _BATCH_CHARS or len(batch) == _BATCH_TEXTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(record: dict[str, Any]) -> None:
    print(json.dumps(record, ensure_ascii=False))


if __name__ == "__main__":
    raise SystemExit(main())
