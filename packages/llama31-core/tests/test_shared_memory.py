"""Sums through shared memory: NumPy's, for any sizes and in any order of calls, and what happens without it."""

from __future__ import annotations

import mmap
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mindspore as ms
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor

from llama31_core.errors import RankLostError
from llama31_core.parallel import shared_memory
from llama31_core.parallel.groups import Group
from llama31_core.parallel.shared_memory import SharedMemory

Floats = npt.NDArray[np.float32]
MOVES = ["all_reduce", "reduce_scatter", "all_gather"]


def ranks_of(size: int) -> list[SharedMemory]:
    """Of one process, each for a thread."""
    groups = [Group(tuple(range(size)), index, "all") for index in range(size)]
    memory = mmap.mmap(-1, shared_memory._size(groups[0]))
    return [SharedMemory(group, memory) for group in groups]


@pytest.fixture
def small_areas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_CHUNK", 24)


@pytest.mark.usefixtures("small_areas")
@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 5),
    st.lists(
        st.tuples(st.sampled_from(["all_reduce", "reduce_scatter", "all_gather"]), st.integers(1, 40)), max_size=8
    ),
    st.integers(0, 2**16),
)
def test_any_calls_give_numpy_s_sums_and_the_same_bits_on_all_ranks(
    size: int, calls: Sequence[tuple[str, int]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    given_ = [rng.normal(size=(size, rows * size, 3)).astype(np.float32) for _, rows in calls]
    ranks = ranks_of(size)

    def rank(index: int) -> list[Floats]:
        group = Group(tuple(range(size)), index, "all")
        return [
            getattr(ranks[index], name)(group)(Tensor(arrays[index])).asnumpy()
            for (name, _), arrays in zip(calls, given_, strict=True)
        ]

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(rank, range(size)))
    for number, ((name, rows), arrays) in enumerate(zip(calls, given_, strict=True)):
        total = arrays[0].copy()
        for array in arrays[1:]:
            total += array
        for index in range(size):
            expected = {
                "all_reduce": total,
                "reduce_scatter": total[rows * index : rows * (index + 1)],
                "all_gather": np.concatenate(arrays),
            }[name]
            np.testing.assert_array_equal(found[index][number], expected)


def test_a_rank_that_has_ended_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_LIVENESS_S", 0.01)
    first, _ = ranks_of(2)
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    first._processes[1] = ended.pid
    with pytest.raises(RankLostError, match=rf"rank 1 \(process {ended.pid}\) has ended"):
        first.all_reduce(Group((0, 1), 0, "all"))(Tensor(np.ones(3, np.float32)))


def fails(*_: object) -> None:
    raise OSError("no memory")


@pytest.mark.parametrize("what_fails", [None, "posix_fallocate", "mmap"])
def test_memory_is_shared_by_all_or_by_none_and_leaves_no_file(
    what_fails: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "_FOLDER", tmp_path)
    if what_fails == "posix_fallocate":
        monkeypatch.setattr("os.posix_fallocate", fails)
    said, both = ["", ""], threading.Barrier(2, timeout=30)

    def exchange(group: Group, text: str) -> list[str]:
        said[group.index] = text
        both.wait()
        heard = list(said)
        both.wait()  # nobody says the next before both have heard
        return heard

    monkeypatch.setattr(shared_memory, "exchange_texts", exchange)

    def rank(index: int) -> mmap.mmap | None:
        if what_fails == "mmap" and index == 1:
            monkeypatch.setattr("mmap.mmap", fails)  # the first rank's, too, or not
        return shared_memory._share(Group((0, 1), index, "pair"))

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(rank, range(2)))
    assert [memory is not None for memory in found] == [what_fails is None] * 2
    assert list(tmp_path.iterdir()) == []
    if what_fails is None:
        first, second = found
        assert first is not None
        assert second is not None
        first[7] = 3
        assert second[7] == 3


def test_other_types_go_through_mindspore(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        def all_reduce(self, group: Group) -> Callable[[Tensor], Tensor]:
            return lambda x: x + 1

    monkeypatch.setattr(shared_memory, "transport", Other)
    first, _ = ranks_of(2)
    assert first.all_reduce(Group((0, 1), 0, "all"))(Tensor([1, 2], ms.int32)).asnumpy().tolist() == [2, 3]
