"""The five wheels: what is in them, what they ask for, and that each installs by itself into an empty environment.

Pants hands over the wheels of `tools/pants package ::`; a plain pytest builds its own from packages/.
"""

from __future__ import annotations

import configparser
import email.message
import email.parser
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from model_assets import fetch

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("tokenizer", "core", "data", "ckpt", "serve")
SIBLINGS = {
    "tokenizer": set(),
    "core": {"llama31-tokenizer"},
    "data": {"llama31-tokenizer"},
    "ckpt": {"llama31-core", "llama31-tokenizer"},
    "serve": {"llama31-core", "llama31-tokenizer"},
}


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the five wheels and nothing else: what `--find-links` is given."""
    folder = tmp_path_factory.mktemp("wheels")
    built = [path for path in ROOT.glob("**/llama31_*.whl") if ".venv" not in path.parts and "dist" not in path.parts]
    for path in built:
        (folder / path.name).write_bytes(path.read_bytes())
    if not built:
        for name in NAMES:
            command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
            subprocess.run(command, cwd=ROOT / "packages" / f"llama31-{name}", check=True, capture_output=True)
    return folder


def wheel_of(wheels: Path, name: str) -> zipfile.ZipFile:
    (path,) = wheels.glob(f"llama31_{name}-*.whl")
    return zipfile.ZipFile(path)


def metadata_of(wheels: Path, name: str) -> email.message.Message:
    with wheel_of(wheels, name) as wheel:
        (path,) = [entry for entry in wheel.namelist() if entry.endswith(".dist-info/METADATA")]
        return email.parser.Parser().parsestr(wheel.read(path).decode())


def requirements_of(wheels: Path, name: str) -> list[Requirement]:
    return [Requirement(text) for text in metadata_of(wheels, name).get_all("Requires-Dist", [])]


def test_five_wheels_of_one_version(wheels: Path) -> None:
    assert len(list(wheels.glob("*.whl"))) == 5
    assert len({metadata_of(wheels, name)["Version"] for name in NAMES}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_contents(wheels: Path, name: str) -> None:
    with wheel_of(wheels, name) as wheel:
        files = wheel.namelist()
        (entry_points,) = [file for file in files if file.endswith(".dist-info/entry_points.txt")]
        scripts = configparser.ConfigParser()
        scripts.read_string(wheel.read(entry_points).decode())
    package = f"llama31_{name}"
    assert f"{package}/py.typed" in files
    assert f"{package}/__main__.py" in files
    assert {file.split("/")[0].partition("-")[0] for file in files} == {package}
    assert not [file for file in files if "test" in Path(file).name or "/tests/" in file]
    assert dict(scripts["console_scripts"]) == {f"llama31-{name}": f"{package}.cli:main"}


def test_every_file_of_the_source_is_in_its_wheel(wheels: Path) -> None:
    for name in NAMES:
        source = ROOT / "packages" / f"llama31-{name}" / "src"
        wanted = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
        wanted = {path for path in wanted if "__pycache__" not in path and Path(path).name != "BUILD"}
        with wheel_of(wheels, name) as wheel:
            packed = {file for file in wheel.namelist() if ".dist-info/" not in file}
        assert packed == wanted


@pytest.mark.parametrize("name", NAMES)
def test_metadata(wheels: Path, name: str) -> None:
    metadata = metadata_of(wheels, name)
    assert metadata["Name"] == f"llama31-{name}"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert sorted(metadata["Requires-Python"].split(",")) == ["<3.12", ">=3.11"]
    ours = {str(need).partition(";")[0].strip() for need in requirements_of(wheels, name) if "llama31" in need.name}
    assert ours == {f"{sibling}=={metadata['Version']}" for sibling in SIBLINGS[name]}


def test_the_licence_is_in_every_wheel(wheels: Path) -> None:
    texts = set()
    for name in NAMES:
        assert metadata_of(wheels, name).get_all("License-File") == ["LICENSE"]
        with wheel_of(wheels, name) as wheel:
            (path,) = [file for file in wheel.namelist() if file.endswith(".dist-info/licenses/LICENSE")]
            texts.add(wheel.read(path).decode())
    (text,) = texts
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text


def test_only_core_and_data_ask_for_mindspore_and_numpy_1(wheels: Path) -> None:
    asking = {name for name in NAMES if "mindspore" in {need.name for need in requirements_of(wheels, name)}}
    assert asking == {"core", "data"}
    for name in asking:
        (numpy,) = [need for need in requirements_of(wheels, name) if need.name == "numpy"]
        assert not numpy.specifier.contains("2.0")


# --- installing ------------------------------------------------------------------------------------------------------


def empty_environment(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True)
    return folder / "bin" / "python"


def pip(python: Path, *arguments: str) -> str:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=python.parent, env=clean())
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def clean() -> dict[str, str]:
    """The environment without PYTHONPATH, through which an empty environment would see these sources."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def chosen(python: Path, wheels: Path, requirement: str) -> set[str]:
    """The names pip would install for one requirement."""
    arguments = ("install", "--quiet", "--dry-run", "--report", "-", "--find-links", str(wheels), requirement)
    report = json.loads(pip(python, *arguments))
    return {item["metadata"]["name"].lower().replace("_", "-") for item in report["install"]}


def test_the_tokenizer_installs_alone_and_encodes(wheels: Path, tmp_path: Path) -> None:
    python = empty_environment(tmp_path / "venv")
    pip(python, "install", "--quiet", "--find-links", str(wheels), "llama31-tokenizer")
    installed = {item["name"].lower() for item in json.loads(pip(python, "list", "--format", "json"))}
    assert "llama31-tokenizer" in installed
    assert not installed & {"mindspore", "torch", "transformers", "llama31-core"}
    program = (
        "import sys; from llama31_tokenizer import Tokenizer; "
        "print(Tokenizer.from_file(sys.argv[1]).encode('The capital of France is Paris.'))"
    )
    command = [str(python), "-c", program, str(fetch("llama3-tokenizer"))]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=clean())
    assert json.loads(result.stdout) == [791, 6864, 315, 9822, 374, 12366, 13]


def test_the_client_installs_without_mindspore(wheels: Path, tmp_path: Path) -> None:
    python = empty_environment(tmp_path / "venv")
    pip(python, "install", "--quiet", "--find-links", str(wheels), "llama31-serve")
    installed = {item["name"].lower() for item in json.loads(pip(python, "list", "--format", "json"))}
    assert not installed & {"mindspore", "numpy", "torch", "llama31-core", "llama31-tokenizer"}
    program = "from llama31_serve import AsyncClient, Client; print(Client.__name__, AsyncClient.__name__)"
    command = [str(python), "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=clean())
    assert result.stdout.split() == ["Client", "AsyncClient"]


@pytest.mark.parametrize(
    ("requirement", "ours"),
    [
        ("llama31-data", {"llama31-data", "llama31-tokenizer"}),
        ("llama31-ckpt", {"llama31-ckpt", "llama31-core", "llama31-tokenizer"}),
        ("llama31-serve[server]", {"llama31-serve", "llama31-core", "llama31-tokenizer"}),
    ],
)
def test_pip_finds_a_set_of_versions(wheels: Path, tmp_path: Path, requirement: str, ours: set[str]) -> None:
    names = chosen(empty_environment(tmp_path / "venv"), wheels, requirement)
    assert {name for name in names if name.startswith("llama31-")} == ours
    assert "mindspore" in names
    assert not names & {"torch", "transformers", "fschat"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_install_from_source_in_the_documented_order(tmp_path: Path, name: str) -> None:
    """`pip install ./packages/X` for the siblings it needs, then for itself, and its command runs."""
    python = empty_environment(tmp_path / "venv")
    needed = {"core": ["tokenizer"], "data": ["tokenizer"], "ckpt": ["tokenizer", "core"]}.get(name, [])
    for package in (*needed, name):
        pip(python, "install", "--quiet", str(ROOT / "packages" / f"llama31-{package}"))
    command = [str(python.parent / f"llama31-{name}"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=clean())
    assert result.returncode == 0, result.stderr
    assert f"llama31-{name}" in result.stdout
