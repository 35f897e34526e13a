"""What the tests share: the genuine Llama 3 vocabulary, and a directory to preprocess small inputs in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llama31_data import Manifest, PreprocessOptions, load_manifest, preprocess
from llama31_data.sample import SAMPLE_PATH
from llama31_tokenizer import Tokenizer
from model_assets import fetch


class Lab:
    """A directory with an output in it. Tests get it as `lab: Any`: test modules cannot import from conftest.

    Attributes:
        path: for inputs.
        out: where outputs go.
        output: the MindRecord that `run` writes.
    """

    def __init__(self, path: Path, tokenizer_file: str) -> None:
        self.path = path
        self.out = path / "out"
        self.output = self.out / "data.mindrecord"
        self._defaults = {
            "input_glob": (str(SAMPLE_PATH),),
            "model_file": tokenizer_file,
            "output_file": str(self.output),
            "seq_length": 256,
        }

    def options(self, **changes: Any) -> PreprocessOptions:
        """The sample to `output` at 256 tokens, with changes."""
        return PreprocessOptions(**{**self._defaults, **changes})

    def run(self, **changes: Any) -> Manifest:
        return preprocess(self.options(**changes))

    def jsonl(self, records: list[Any], name: str = "in.jsonl") -> str:
        """A JSON Lines file of the records."""
        path = self.path / name
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        path.write_text("".join(lines), encoding="utf-8")
        return str(path)

    def records(self, output: Path | None = None) -> list[dict[str, NDArray[np.int32]]]:
        """Every record of an output, in order, as MindSpore reads it."""
        import mindspore.dataset as ds

        output = output or self.output
        manifest = load_manifest(output)
        records: list[dict[str, NDArray[np.int32]]] = []
        for entry in manifest.sets:
            dataset = ds.MindDataset(str(output.parent / entry.files[0]), list(manifest.columns), shuffle=False)
            records += dataset.create_dict_iterator(num_epochs=1, output_numpy=True)
        return records

    def rejects(self) -> list[tuple[int, str]]:
        """Line and reason of each line of the rejects file."""
        text = self.output.with_name(f"{self.output.name}.rejects.jsonl").read_text(encoding="utf-8")
        return [(entry["line"], entry["reason"]) for entry in map(json.loads, text.splitlines())]

    def snapshot(self, directory: Path | None = None) -> dict[str, bytes]:
        """Name and content of every file under a directory (the output's)."""
        directory = directory or self.out
        files = [path for path in directory.rglob("*") if path.is_file()]
        return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture(scope="session")
def tokenizer_file() -> str:
    return str(fetch("llama3-tokenizer"))


@pytest.fixture(scope="session")
def llama3(tokenizer_file: str) -> Tokenizer:
    return Tokenizer.from_file(tokenizer_file)


@pytest.fixture(scope="session")
def sample_records() -> list[dict[str, str]]:
    records: list[dict[str, str]] = json.loads(SAMPLE_PATH.read_text(encoding="utf-8"))
    return records


@pytest.fixture
def lab(tmp_path: Path, tokenizer_file: str) -> Lab:
    return Lab(tmp_path, tokenizer_file)
