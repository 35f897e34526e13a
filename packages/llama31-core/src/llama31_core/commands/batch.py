"""A file of requests through the engine, as many at once as it runs, into a file of results."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llama31_core.commands.answers import Answer, AnswerCollector
from llama31_core.commands.records import Record, RecordReader, Reject
from llama31_core.commands.spool import Spool, write_lines
from llama31_core.errors import RequestError
from llama31_core.inference.engine import Engine
from llama31_core.inference.sampling import TokenLogprobs
from llama31_tokenizer import Tokenizer

REJECTS_SUFFIX = ".rejects.jsonl"


@dataclass
class Figures:
    """What a run did."""

    num_records: int = 0
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    num_failed: int = 0
    elapsed_s: float = 0.0


@dataclass(frozen=True)
class Batch:
    """A file of requests and where its results go.

    Attributes:
        input: JSON Lines of requests.
        output: JSON Lines of results, in the order of the requests.
        reader: of the requests.
        strict: a line that is no request ends the run before it has begun.
        overwrite: replace an existing output.
        run: what, beside the input, the results depend on.
    """

    input: Path
    output: Path
    reader: RecordReader
    strict: bool
    overwrite: bool
    run: Mapping[str, Any]

    @property
    def rejects_path(self) -> Path:
        """Where the lines that are no requests are listed."""
        return self.output.with_name(self.output.name + REJECTS_SUFFIX)

    def open_spool(self) -> Spool:
        """Results of an earlier try of this run, if there are any; see Spool for the errors."""
        with self.input.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Spool(self.output, {**self.run, "input": digest}, overwrite=self.overwrite)

    def check(self) -> tuple[int, list[Reject]]:
        """The number of requests, and the lines that are none.

        Raises:
            RequestError: there is no request, or there is another line and the batch is strict.
        """
        num_records, rejects = 0, []
        for entry in self.reader.read(self.input):
            if not isinstance(entry, Reject):
                num_records += 1
                continue
            rejects.append(entry)
            if self.strict:
                raise RequestError(f"{self.input}:{entry.line}: {entry.error}")
        if num_records == 0:
            why = f"; the first of {len(rejects)} bad lines, {rejects[0].line}: {rejects[0].error}" if rejects else ""
            raise RequestError(f"{self.input} holds no request{why}")
        return num_records, rejects

    def write_rejects(self, rejects: list[Reject]) -> None:
        """List the lines that are no requests; no file if there are none."""
        if rejects:
            write_lines(self.rejects_path, ({"line": r.line, "id": r.key, "error": r.error} for r in rejects))
        else:
            self.rejects_path.unlink(missing_ok=True)


def run_batch(batch: Batch, spool: Spool, engine: Engine, tokenizer: Tokenizer, num_records: int) -> Figures:
    """Complete every request that the spool has no result of; with a bar on a terminal."""
    figures = Figures()
    done = spool.done
    records = (
        entry for entry in batch.reader.read(batch.input) if isinstance(entry, Record) and entry.line not in done
    )
    started = time.perf_counter()
    with tqdm(total=num_records, initial=len(done), unit="record", file=sys.stderr, disable=None) as bar:

        def finish(record: Record, collector: AnswerCollector) -> None:
            spool.add(record.line, result_of(record, collector))
            figures.num_records += 1
            figures.num_prompt_tokens += len(record.prompt_ids)
            figures.num_tokens += sum(len(answer.token_ids) for answer in collector.answers)
            figures.num_failed += any(answer.finish_reason == "error" for answer in collector.answers)
            rate = figures.num_tokens / (time.perf_counter() - started)
            bar.set_postfix_str(f"{rate:.1f} tokens/s", refresh=False)
            bar.update()

        _drive(engine, tokenizer, records, finish)
    figures.elapsed_s = time.perf_counter() - started
    return figures


def _drive(
    engine: Engine, tokenizer: Tokenizer, records: Iterator[Record], finish: Callable[[Record, AnswerCollector], None]
) -> None:
    """Keep the engine's places filled, with as many requests waiting, till all records are complete."""
    open_requests: dict[str, tuple[Record, AnswerCollector]] = {}
    most = 2 * engine.options.max_batch_size
    pending = next(records, None)
    while pending is not None or open_requests:
        while pending is not None and len(open_requests) < most:
            name = str(pending.line)
            engine.add(name, pending.prompt_ids, pending.params, adapter=pending.adapter)
            open_requests[name] = (pending, AnswerCollector(tokenizer, pending.params.n, pending.stop))
            pending = next(records, None)
        for output in engine.step():
            if output.request_id not in open_requests:
                continue  # of the step in which a stop string ended it
            record, collector = open_requests[output.request_id]
            collector.push(output)
            if collector.is_complete:
                engine.abort(output.request_id)  # it does not know of stop strings
                del open_requests[output.request_id]
                finish(record, collector)


def result_of(record: Record, collector: AnswerCollector) -> dict[str, Any]:
    """The line of a request's result."""
    result: dict[str, Any] = {
        "id": record.key,
        "num_prompt_tokens": len(record.prompt_ids),
        "completions": [_completion(answer) for answer in collector.answers],
    }
    if collector.prompt_logprobs is not None:
        result["prompt_logprobs"] = [None if entry is None else _logprob(entry) for entry in collector.prompt_logprobs]
    return result


def _completion(answer: Answer) -> dict[str, Any]:
    values: dict[str, Any] = {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
    }
    if answer.logprobs is not None:
        values["logprobs"] = [_logprob(entry) for entry in answer.logprobs]
    more = {"score": answer.score, "error": answer.error}
    return values | {name: value for name, value in more.items() if value is not None}


def _logprob(entry: TokenLogprobs) -> dict[str, Any]:
    return {"token_id": entry.token_id, "logprob": entry.logprob, "top": [list(pair) for pair in entry.top]}
