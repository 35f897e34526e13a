"""What the tests run with: constraints.txt pins every requirement, and torch in it is the build without CUDA."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import numpy
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = sorted(ROOT.glob("packages/*/pyproject.toml"))


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    parsed = [line.split("==") for line in lines]
    assert all(len(parts) == 2 for parts in parsed), "a line of constraints.txt is not NAME==VERSION"
    return {canonicalize_name(name): version for name, version in parsed}


def requirements() -> Iterator[tuple[str, Requirement]]:
    for project in PROJECTS:
        tables = tomllib.loads(project.read_text())["project"]
        lists = [tables["dependencies"], *tables.get("optional-dependencies", {}).values()]
        yield from ((project.parent.name, Requirement(text)) for texts in lists for text in texts)
    dev = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["dev"]
    yield from (("dev group", Requirement(text)) for text in dev)


def test_five_packages() -> None:
    assert len(PROJECTS) == 5


def test_every_requirement_is_pinned_to_a_version_it_allows() -> None:
    pinned = pins()
    third_party = [(owner, need) for owner, need in requirements() if not need.name.startswith("llama31-")]
    missing = [f"{owner}: {need}" for owner, need in third_party if canonicalize_name(need.name) not in pinned]
    assert not missing
    unmet = [
        f"{owner}: {need}, pinned {pinned[canonicalize_name(need.name)]}"
        for owner, need in third_party
        if not need.specifier.contains(pinned[canonicalize_name(need.name)], prereleases=True)
    ]
    assert not unmet


def test_torch_is_the_cpu_build() -> None:
    assert torch.version.cuda is None
    assert torch.version.hip is None
    assert not [name for name in (dist.metadata["Name"] for dist in distributions()) if name.startswith("nvidia-")]


def test_numpy_is_the_one_mindspore_was_built_for() -> None:
    assert numpy.__version__.startswith("1.")


@pytest.mark.parametrize("name", ["mindspore", "numpy", "torch", "transformers", "grpcio", "protobuf"])
def test_the_tests_run_with_the_pinned_version(name: str) -> None:
    installed = [dist.version for dist in distributions() if canonicalize_name(dist.metadata["Name"]) == name]
    assert [version.partition("+")[0] for version in installed] == [pins()[name]]
