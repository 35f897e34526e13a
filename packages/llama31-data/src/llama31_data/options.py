"""What a preprocessing run is asked to do, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llama31_data.encode import Recipe
from llama31_data.errors import DataError
from llama31_data.layouts import Layout, default_buckets
from llama31_data.mindrecord_file import check_name
from llama31_data.schemas import SCHEMAS
from llama31_data.templates import CHAT

MAX_SEQ_LENGTH = 1 << 20  # four int32 columns of it stay under MindRecord's page of 32 MiB
MAX_FILES = 1000


@dataclass(frozen=True)
class PreprocessOptions:
    """A run from files to MindRecord.

    Attributes:
        input_glob: files or globs, each file once.
        model_file: tokenizer file or model directory.
        output_file: the MindRecord set; its manifest and rejects get this name with a suffix.
        dataset_type: "qa" (conversations, trained on the answers) or "wiki" (plain text, trained on everything).
        seq_length: records have `seq_length + 1` tokens.
        template: "chat" (the model's own), "llama3.1", or the name of an fschat template. Only for "qa".
        schema: "auto" takes each record as what it looks like.
        packing: many samples in a record, with segment_ids and position_ids.
        buckets: pad to the next bucket instead of to seq_length; () chooses 128, 256, … seq_length.
        split_long: cut a longer sample into several instead of leaving out its end.
        file_partition: files in each set; records are dealt out to them in turn.
        shards: sets; each is complete in itself.
        repeat: times the input is gone through.
        workers: processes that tokenise. It never changes the output.
        pad_id: instead of the vocabulary's.
        strict: the first record that cannot be used ends the run.
        overwrite: replace an existing output.
        engine: "local", or "ray" for a cluster.
    """

    input_glob: tuple[str, ...]
    model_file: str
    output_file: str
    dataset_type: Literal["qa", "wiki"] = "qa"
    seq_length: int = 2048
    template: str = CHAT
    schema: str = "auto"
    packing: bool = False
    buckets: tuple[int, ...] | None = None
    split_long: bool = False
    file_partition: int = 1
    shards: int = 1
    repeat: int = 1
    workers: int = 1
    pad_id: int | None = None
    strict: bool = False
    overwrite: bool = False
    engine: Literal["local", "ray"] = "local"

    def __post_init__(self) -> None:
        """Raises:
        DataError: naming the first option that is out of range or does not go with another.
        """
        self._in_range("seq_length", 1, MAX_SEQ_LENGTH)
        self._in_range("file_partition", 1, MAX_FILES)
        self._in_range("shards", 1, 99_999)
        self._in_range("repeat", 1, 1_000_000)
        self._in_range("workers", 1, 1024)
        if self.schema not in ("auto", *SCHEMAS):
            raise DataError(f"--schema is {self.schema!r}, allowed are auto, {', '.join(SCHEMAS)}")
        if self.packing and self.buckets is not None:
            raise DataError("--packing and --padding bucket exclude each other: packed records have no padding to save")
        if self.buckets is not None and self.file_partition > 1:
            raise DataError("--padding bucket keeps records of one length together: use --shards, not --file_partition")
        if self.dataset_type == "wiki" and self.buckets is not None:
            raise DataError("--padding bucket is for --dataset_type qa: plain text is cut to whole records")
        if self.buckets:
            wrong = [length for length in self.buckets if not 1 <= length <= self.seq_length]
            if wrong or list(self.buckets) != sorted(set(self.buckets)) or self.buckets[-1] != self.seq_length:
                raise DataError(
                    f"--buckets is {', '.join(map(str, self.buckets))}: expected ascending lengths that end with "
                    f"--seq_length {self.seq_length}"
                )
        check_name(Path(self.output_file))

    def _in_range(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not low <= value <= high:
            raise DataError(f"--{name} is {value}, allowed are {low} to {high}")

    @property
    def recipe(self) -> Recipe:
        """The part that decides which tokens a record becomes."""
        streamed = self.dataset_type == "wiki" and not self.packing
        return Recipe(
            kind=self.dataset_type,
            model_file=self.model_file,
            template=self.template if self.dataset_type == "qa" else CHAT,
            schema=self.schema,
            seq_length=None if streamed else self.seq_length,
            split_long=self.split_long or self.dataset_type == "wiki",
        )

    def layout(self, pad_id: int) -> Layout:
        """The part that decides how samples become records."""
        if self.packing:
            return Layout("packed", self.seq_length, pad_id)
        if self.dataset_type == "wiki":
            return Layout("concatenated", self.seq_length, pad_id)
        if self.buckets is not None:
            return Layout("buckets", self.seq_length, pad_id, self.buckets or default_buckets(self.seq_length))
        return Layout("padded", self.seq_length, pad_id)
