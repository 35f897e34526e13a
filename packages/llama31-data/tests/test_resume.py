"""The same bytes for any number of workers, and for a run that was killed at any moment and started again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama31_data import DataError, load_manifest

NUM_RECORDS = 6000


@pytest.fixture(scope="module")
def big_input(tmp_path_factory: pytest.TempPathFactory, sample_records: list[dict[str, str]]) -> list[str]:
    """Two files, one an array, one lines, of six chunks in all, with a bad record in each."""
    directory = tmp_path_factory.mktemp("input")
    random_ = random.Random(0)
    records: list[Any] = [
        {**random_.choice(sample_records), "instruction": f"{number}. {random_.choice(sample_records)['instruction']}"}
        for number in range(NUM_RECORDS)
    ]
    records[1500] = {"question": "?"}
    records[5000] = {"instruction": "no output"}
    array, lines = directory / "a.json", directory / "b.jsonl"
    array.write_text(json.dumps(records[:3000], ensure_ascii=False, indent=1), encoding="utf-8")
    lines.write_text("".join(json.dumps(record) + "\n" for record in records[3000:]), encoding="utf-8")
    return [str(array), str(lines)]


LAYOUTS: list[dict[str, Any]] = [
    {"packing": True, "seq_length": 512},
    {"seq_length": 256, "file_partition": 3},
    {"seq_length": 256, "buckets": ()},
    {"packing": True, "seq_length": 512, "shards": 3, "repeat": 2},
]


@pytest.mark.parametrize("changes", LAYOUTS)
def test_the_output_is_the_same_for_any_number_of_workers(
    lab: Any, big_input: list[str], changes: dict[str, Any]
) -> None:
    outputs = []
    for workers in (1, 3):
        lab.run(input_glob=tuple(big_input), workers=workers, overwrite=True, **changes)
        outputs.append(lab.snapshot())
    assert outputs[0] == outputs[1]
    assert len(lab.rejects()) == 2


def command(lab: Any, big_input: list[str], *more: str) -> list[str]:
    options = lab.options()
    return [
        *(sys.executable, "-m", "llama31_data", "preprocess"),
        *("--model_file", options.model_file),
        *("--output_file", options.output_file),
        *("--input_glob", *big_input),
        *("--seq_length", "512", "--packing", "--shards", "2"),
        *more,
    ]


def run_until(reached: Callable[[], bool], arguments: list[str]) -> int:
    """Runs a command and kills it, it alone, as soon as `reached` or after a minute."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while process.poll() is None and not reached() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    return process.wait()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_again_and_again_it_ends_with_the_same_bytes(lab: Any, big_input: list[str], workers: str) -> None:
    lab.run(input_glob=tuple(big_input), seq_length=512, packing=True, shards=2)
    expected = lab.snapshot()
    for path in lab.out.iterdir():
        path.unlink()
    partial = lab.out / ".data.mindrecord.partial"
    moments: list[Callable[[], bool]] = [
        partial.exists,
        lambda: len(list(partial.glob("chunks/*.npz"))) >= 2,
        lambda: len(list(partial.glob("chunks/*.npz"))) >= 4,
        lambda: any(partial.glob("files/*")),
        lambda: any(partial.glob("files/*.built.json")),
    ]
    for moment in moments:
        assert run_until(moment, command(lab, big_input, "--workers", workers)) == -signal.SIGKILL
        with pytest.raises(DataError, match=r"manifest\.json: No such file"):
            load_manifest(lab.output)
        visible = [path.name for path in lab.out.iterdir() if not path.name.startswith(".")]
        assert visible == [], "nothing that a reader could take for data"
    assert run_until(lambda: False, command(lab, big_input, "--workers", workers)) == 0
    assert lab.snapshot() == expected


@pytest.mark.parametrize("shards", [1, 2])
def test_a_resumed_run_encodes_only_what_is_missing_or_changed(
    lab: Any, big_input: list[str], monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    from llama31_data import pipeline
    from llama31_data.encode import Encoder

    encoded: list[tuple[int, int]] = []
    original = Encoder.encode

    def spy(self: Encoder, chunk: Any) -> Any:
        encoded.append(tuple(chunk.id))
        return original(self, chunk)

    monkeypatch.setattr(Encoder, "encode", spy)
    options = {"input_glob": tuple(big_input), "seq_length": 512, "packing": True, "shards": shards}
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_rejects", interrupt)
        with pytest.raises(KeyboardInterrupt):
            lab.run(**options)
    assert encoded == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    spool = lab.out / ".data.mindrecord.partial" / "chunks"
    torn = spool / "000001-000000001.npz"
    torn.write_bytes(torn.read_bytes()[:-100])
    (spool / "000000-000000002.npz").unlink()
    lines = Path(big_input[1]).read_text(encoding="utf-8").splitlines(keepends=True)
    lines[-1] = lines[-1].replace("instruction", "Instruction")  # same size, other content
    Path(big_input[1]).write_text("".join(lines), encoding="utf-8")
    encoded.clear()
    manifest = lab.run(**options)
    assert encoded == [(0, 2), (1, 1), (1, 2)]
    assert manifest.counts["rejected"] == 3
    assert not spool.exists()
    resumed = lab.snapshot()
    lab.run(**options, overwrite=True)
    assert lab.snapshot() == resumed
    lines[-1] = lines[-1].replace("Instruction", "instruction")
    Path(big_input[1]).write_text("".join(lines), encoding="utf-8")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_other_options_do_not_take_up_what_was_left(lab: Any, big_input: list[str], monkeypatch: Any) -> None:
    from llama31_data import pipeline

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_rejects", interrupt)
        with pytest.raises(KeyboardInterrupt):
            lab.run(input_glob=tuple(big_input), seq_length=64)
    manifest = lab.run(input_glob=tuple(big_input), seq_length=128)
    assert manifest.seq_length == 128
    assert {len(record["input_ids"]) for record in lab.records()} == {129}


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_killed_while_files_are_moved_it_goes_on_moving(lab: Any, monkeypatch: Any, moved: int) -> None:
    lab.run()
    expected = lab.snapshot()
    lab.run(seq_length=128, overwrite=True)
    replace = Path.replace
    done: list[str] = []

    def stop_after(path: Path, target: Path) -> Path:
        if path.parent.name == "files" and target.parent == lab.out:
            if len(done) == moved:
                raise KeyboardInterrupt
            done.append(path.name)
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop_after)
        with pytest.raises(KeyboardInterrupt):
            lab.run(overwrite=True)
    assert done == ["data.mindrecord.db", "data.mindrecord"][:moved]
    with pytest.raises(DataError, match=r"manifest\.json"):
        load_manifest(lab.output)
    lab.run()
    assert lab.snapshot() == expected


def test_two_runs_on_one_output_do_not_meet(lab: Any) -> None:
    import fcntl

    directory = lab.out / ".data.mindrecord.partial"
    directory.mkdir(parents=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another run is writing it"):
            lab.run()


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (200_000, "cannot be written: File too large; free space and run again"),  # no room for encoded chunks
        (20_000_000, "MindRecord cannot be written"),  # room for them, but not for the set
    ],
)
def test_a_full_disk_is_one_error_and_the_run_goes_on_later(
    lab: Any, big_input: list[str], limit: int, message: str
) -> None:
    """The limit on a file's size stands for the disk's: writing fails the same way."""
    limited = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
    code = limited + "from llama31_data.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = command(lab, big_input, "--workers", "2")
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments[3:]], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert message in result.stderr
    assert "Refer to" not in result.stderr  # MindSpore's headings above its reason
    assert [path.name for path in lab.out.iterdir()] == [".data.mindrecord.partial"]
    assert lab.run(input_glob=tuple(big_input), seq_length=512, packing=True, shards=2).counts["read"] == NUM_RECORDS


def test_an_unwritable_directory_is_one_error(lab: Any) -> None:
    (lab.path / "out").write_text("a file")
    with pytest.raises(DataError, match=r"--output_file .*: cannot be written: "):
        lab.run()


def test_a_killed_parent_takes_its_workers_along(lab: Any, big_input: list[str]) -> None:
    process = subprocess.Popen(command(lab, big_input, "--workers", "3", "--repeat", "50"), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (workers := children_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert workers
    deadline = time.monotonic() + 90  # a worker that is still importing notices only after that
    while any(is_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(is_alive(pid) for pid in workers)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
