"""Ranks that are set to do different things: the same one error on all of them. Ranks are threads here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from mindspore import Tensor

from llama31_core.checkpoint import save_weights
from llama31_core.cli import main
from llama31_core.commands import finetune
from llama31_core.config import ModelConfig
from llama31_core.errors import AgreedError, ConfigError
from llama31_core.parallel import agreement
from llama31_core.parallel.groups import Group

Weights = dict[str, npt.NDArray[np.float32]]


class Threads:
    """A transport between threads: what all have brought is what each gets."""

    def __init__(self, size: int) -> None:
        self._rows: list[npt.NDArray[np.float32]] = [np.zeros(0, np.float32)] * size
        self._barrier = threading.Barrier(size, timeout=30)

    def all_gather(self, group: Group) -> Callable[[Tensor], Tensor]:
        """See Transport."""

        def gather(x: Tensor) -> Tensor:
            self._rows[group.index] = x.asnumpy()
            self._barrier.wait()
            found = np.concatenate(self._rows)
            self._barrier.wait()  # nobody writes its next row before all have read
            return Tensor(found)

        return gather


def errors_of_all(
    facts: Sequence[Mapping[str, str]], problems: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> list[str | None]:
    """What `agree` raises on each rank."""
    ranks = tuple(range(len(facts)))
    threads = Threads(len(facts))
    monkeypatch.setattr(agreement, "transport", lambda: threads)

    def rank(index: int) -> str | None:
        try:
            agreement.agree(Group(ranks, index, "all"), facts[index], problems[index])
        except ConfigError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(rank, ranks))


@pytest.fixture
def checkpoints(tmp_path: Path, random_weights: Callable[..., Weights]) -> list[Path]:
    """The same checkpoint on three machines; the third one's differs in one number of one weight."""
    config = ModelConfig.preset("tiny")
    weights = random_weights(config)
    paths = []
    for machine in range(3):
        paths.append(tmp_path / f"machine{machine}" / "model")
        paths[-1].mkdir(parents=True)
        config.save_pretrained(paths[-1])
        if machine == 2:
            weights["model.layers.1.attention.wq.weight"][3, 5] += 1e-3
        save_weights(paths[-1], weights.items())
    return paths


def test_ranks_with_other_weights_are_one_error_on_every_rank(
    checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = [{"the checkpoint": agreement.digest_of_checkpoint(path, rank)} for rank, path in enumerate(checkpoints)]
    found = errors_of_all(facts, [""] * 3, monkeypatch)
    assert found == ["ranks do not agree on the checkpoint: rank 2 of 3 has another one; give all ranks the same"] * 3
    assert errors_of_all(facts[:2], [""] * 2, monkeypatch) == [None, None]


def test_ranks_with_other_configurations_are_one_error_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [ModelConfig.preset("tiny"), ModelConfig.preset("tiny").model_copy(update={"rope_theta": 7.0})]
    facts = [
        {"the layout": "same", "the configuration": agreement.digest_of(models[rank in (1, 3)].model_dump_json())}
        for rank in range(5)
    ]
    found = errors_of_all(facts, [""] * 5, monkeypatch)
    want = "ranks do not agree on the configuration: rank 1, 3 of 5 has another one; give all ranks the same"
    assert found == [want] * 5


def test_what_one_rank_cannot_do_all_hear_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its facts are missing, and do not count."""
    facts: list[Mapping[str, str]] = [{"the checkpoint": "a"}, {}, {"the checkpoint": "a"}]
    found = errors_of_all(facts, ["", "model.safetensors: no such file", ""], monkeypatch)
    assert found == ["rank 1: model.safetensors: no such file"] * 3


@pytest.mark.parametrize(
    ("rank", "role", "error", "said"),
    [
        ("0", "MS_WORKER", AgreedError("rank 2: no"), "llama31-core: error: rank 2: no\n"),
        ("2", "MS_WORKER", AgreedError("rank 2: no"), "this rank cannot begin; rank 0 says why\n"),
        ("2", "MS_WORKER", ConfigError("the ranks did not meet"), "llama31-core: error: the ranks did not meet\n"),
        ("0", "MS_SCHED", ConfigError("the ranks did not meet"), "llama31-core: error: the ranks did not meet\n"),
    ],
)
def test_rank_0_tells_what_all_know_and_each_what_it_alone_does(
    rank: str,
    role: str,
    error: ConfigError,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error

    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(finetune, "load_run_config", fail)
    monkeypatch.setenv("RANK_ID", rank)
    monkeypatch.setenv("MS_ROLE", role)
    assert main(["finetune", "run.yaml"]) == 1
    assert capsys.readouterr().err == said
    assert bool(pauses) == ((rank, role) != ("0", "MS_WORKER"))  # so that rank 0 is the first to end
