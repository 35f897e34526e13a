"""A local Ray of two workers: the same bytes as the local engine, set for set."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from llama31_data import DataError

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")


@pytest.fixture(scope="module", autouse=True)
def shut_down() -> Iterator[None]:
    yield
    ray.shutdown()


def inputs(lab: Any, sample_records: list[dict[str, str]], count: int) -> tuple[str, ...]:
    random_ = random.Random(0)
    records: list[Any] = [
        {**random_.choice(sample_records), "instruction": f"{number}. {random_.choice(sample_records)['instruction']}"}
        for number in range(count)
    ]
    records[count // 2] = {"question": "?"}
    return (lab.jsonl(records[: count // 3], "a.jsonl"), lab.jsonl(records[count // 3 :], "b.jsonl"))


@pytest.mark.parametrize("changes", [{"packing": True, "seq_length": 512}, {"seq_length": 128, "buckets": (64, 128)}])
def test_ray_writes_what_the_local_engine_writes(
    lab: Any, sample_records: list[dict[str, str]], changes: dict[str, Any]
) -> None:
    options = {"input_glob": inputs(lab, sample_records, 6000), "shards": 3, **changes}
    lab.run(**options)
    expected = lab.snapshot()
    assert sum(name.endswith("-of-00003") for name in expected) == 3
    assert len(lab.rejects()) == 1
    lab.run(**options, engine="ray", workers=2, overwrite=True)
    assert lab.snapshot() == expected


def test_an_error_in_a_task_is_the_same_error_here(lab: Any) -> None:
    (lab.path / "in.json").write_text('[{"instruction": "a", "output": "b"},\n{"instruction": ]')
    with pytest.raises(DataError, match=r"in\.json:2: not JSON") as caught:
        lab.run(input_glob=(str(lab.path / "in.json"),), engine="ray", workers=2)
    assert "\n" not in str(caught.value)
    assert lab.snapshot() == {}
