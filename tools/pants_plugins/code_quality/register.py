"""The tools behind `lint`, `fmt`, `fix` and `check`: ruff, import-linter, buf and mypy, at constraints.txt's versions.

Pants 2.17 brings ruff 0.0.261 and mypy 1.1, and would give each newer one an installation of its own. Here all of them
run from the one installation of constraints.txt that tests run in, with the settings in the root pyproject.toml.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from pants.backend.python.subsystems.setup import PythonSetup
from pants.backend.python.target_types import PythonSourceField
from pants.backend.python.util_rules.interpreter_constraints import InterpreterConstraints
from pants.backend.python.util_rules.pex import Pex, PexRequest, VenvPex, VenvPexProcess
from pants.backend.python.util_rules.pex_from_targets import RequirementsPexRequest
from pants.backend.python.util_rules.python_sources import PythonSourceFiles, PythonSourceFilesRequest
from pants.core.goals.check import CheckRequest, CheckResult, CheckResults
from pants.core.goals.fix import FixFilesRequest, FixResult
from pants.core.goals.fmt import FmtFilesRequest, FmtResult
from pants.core.goals.lint import LintFilesRequest, LintResult
from pants.core.util_rules.partitions import Partitions
from pants.core.util_rules.source_files import SourceFiles, SourceFilesRequest
from pants.engine.fs import Digest, DigestContents, MergeDigests, PathGlobs, Snapshot
from pants.engine.process import FallibleProcessResult
from pants.engine.rules import Get, MultiGet, collect_rules, rule
from pants.engine.target import FieldSet, TransitiveTargets, TransitiveTargetsRequest
from pants.engine.unions import UnionRule
from pants.option.option_types import SkipOption
from pants.option.subsystem import Subsystem
from pants.util.logging import LogLevel

CONFIG = "pyproject.toml"


@dataclass(frozen=True)
class Tool:
    """One run of a console script of constraints.txt."""

    script: str
    arguments: tuple[str, ...]
    inputs: Digest
    description: str
    output_files: tuple[str, ...] = ()
    source_roots: tuple[str, ...] = ()
    named_cache: tuple[tuple[str, str], ...] = ()  # (name, folder in the sandbox), kept from run to run


@rule(level=LogLevel.DEBUG)
async def run_tool(tool: Tool, python_setup: PythonSetup) -> FallibleProcessResult:
    requirements = await Get(Pex, RequirementsPexRequest(()))
    tools = PexRequest(
        output_filename="tools.pex",
        internal_only=True,
        pex_path=[requirements],
        interpreter_constraints=InterpreterConstraints(python_setup.interpreter_constraints),
    )
    venv, config = await MultiGet(Get(VenvPex, PexRequest, tools), Get(Digest, PathGlobs([CONFIG])))
    inputs = await Get(Digest, MergeDigests([tool.inputs, config]))
    return await Get(
        FallibleProcessResult,
        VenvPexProcess(
            venv,
            argv=tool.arguments,
            input_digest=inputs,
            extra_env={"PEX_SCRIPT": tool.script, "PEX_EXTRA_SYS_PATH": ":".join(tool.source_roots)},
            output_files=tool.output_files,
            append_only_caches=dict(tool.named_cache),
            description=tool.description,
            level=LogLevel.DEBUG,
        ),
    )


# --- ruff: every Python file, scripts without a suffix included ------------------------------------------------------


class Ruff(Subsystem):
    options_scope = "ruff"
    name = "ruff"
    help = "ruff's linter and formatter."
    skip = SkipOption("lint", "fmt", "fix")


class RuffLint(LintFilesRequest):
    tool_subsystem = Ruff


class RuffFix(FixFilesRequest):
    tool_subsystem = Ruff
    tool_name = "ruff check --fix"


class RuffFormat(FmtFilesRequest):
    tool_subsystem = Ruff
    tool_name = "ruff format"


@dataclass(frozen=True)
class CandidateFiles:
    files: tuple[str, ...]


@dataclass(frozen=True)
class PythonFiles:
    files: tuple[str, ...]


@rule
async def python_files(candidates: CandidateFiles) -> PythonFiles:
    scripts = [file for file in candidates.files if not PurePath(file).suffix]
    contents = await Get(DigestContents, PathGlobs(scripts))
    python_scripts = {file.path for file in contents if is_python_script(file.content)}
    return PythonFiles(tuple(f for f in candidates.files if f.endswith((".py", ".pyi")) or f in python_scripts))


def is_python_script(content: bytes) -> bool:
    first_line = content.partition(b"\n")[0]
    return first_line.startswith(b"#!") and b"python" in first_line


@rule
async def partition_lint(request: RuffLint.PartitionRequest, ruff: Ruff) -> Partitions[str, Any]:
    found = await Get(PythonFiles, CandidateFiles(() if ruff.skip else request.files))
    return Partitions.single_partition(found.files) if found.files else Partitions()


@rule
async def partition_fix(request: RuffFix.PartitionRequest, ruff: Ruff) -> Partitions[str, Any]:
    found = await Get(PythonFiles, CandidateFiles(() if ruff.skip else request.files))
    return Partitions.single_partition(found.files) if found.files else Partitions()


@rule
async def partition_format(request: RuffFormat.PartitionRequest, ruff: Ruff) -> Partitions[str, Any]:
    found = await Get(PythonFiles, CandidateFiles(() if ruff.skip else request.files))
    return Partitions.single_partition(found.files) if found.files else Partitions()


@rule(desc="Lint with ruff", level=LogLevel.DEBUG)
async def ruff_lint(request: RuffLint.Batch) -> LintResult:
    sources = await Get(Snapshot, PathGlobs(request.elements))
    arguments = ("check", "--no-cache", "--force-exclude", *sources.files)
    result = await Get(FallibleProcessResult, Tool("ruff", arguments, sources.digest, "Run ruff check"))
    return LintResult.create(request, result)


@rule(desc="Fix with ruff", level=LogLevel.DEBUG)
async def ruff_fix(request: RuffFix.Batch) -> FixResult:
    arguments = ("check", "--no-cache", "--force-exclude", "--fix-only", "--exit-zero", *request.files)
    tool = Tool("ruff", arguments, request.snapshot.digest, "Run ruff check --fix", output_files=request.files)
    return await FixResult.create(request, await Get(FallibleProcessResult, Tool, tool))


@rule(desc="Format with ruff", level=LogLevel.DEBUG)
async def ruff_format(request: RuffFormat.Batch) -> FmtResult:
    arguments = ("format", "--no-cache", "--force-exclude", *request.files)
    tool = Tool("ruff", arguments, request.snapshot.digest, "Run ruff format", output_files=request.files)
    return await FmtResult.create(request, await Get(FallibleProcessResult, Tool, tool))


# --- import-linter: all packages at once -----------------------------------------------------------------------------


class ImportLinter(Subsystem):
    options_scope = "import-linter"
    name = "import-linter"
    help = "The contracts in [tool.importlinter]: who may import whom."
    skip = SkipOption("lint")


class ImportLinterLint(LintFilesRequest):
    tool_subsystem = ImportLinter


@rule
async def partition_import_linter(
    request: ImportLinterLint.PartitionRequest, linter: ImportLinter
) -> Partitions[str, Any]:
    sources = [f for f in request.files if PurePath(f).match("packages/*/src/*/**/*.py")]
    # One element stands for all: a contract is about the whole graph, whichever file was asked for.
    return Partitions.single_partition(sources[:1]) if sources and not linter.skip else Partitions()


@rule(desc="Check the import contracts", level=LogLevel.DEBUG)
async def import_linter_lint(request: ImportLinterLint.Batch) -> LintResult:
    sources = await Get(Snapshot, PathGlobs(["packages/*/src/**/*.py"]))
    roots = sorted({"/".join(PurePath(file).parts[:3]) for file in sources.files})
    tool = Tool("lint-imports", ("--no-cache",), sources.digest, "Run lint-imports", source_roots=tuple(roots))
    return LintResult.create(request, await Get(FallibleProcessResult, Tool, tool))


# --- buf: the protocol -----------------------------------------------------------------------------------------------


class Buf(Subsystem):
    options_scope = "buf"
    name = "buf"
    help = "buf's lint rules for .proto files, set in the buf.yaml above them."
    skip = SkipOption("lint")


class BufLint(LintFilesRequest):
    tool_subsystem = Buf


@rule
async def partition_buf(request: BufLint.PartitionRequest, buf: Buf) -> Partitions[str, Any]:
    sources = [file for file in request.files if file.endswith(".proto")]
    return Partitions.single_partition(sources) if sources and not buf.skip else Partitions()


@rule(desc="Lint with buf", level=LogLevel.DEBUG)
async def buf_lint(request: BufLint.Batch) -> LintResult:
    sources = await Get(Snapshot, PathGlobs(["packages/*/proto/**"]))
    modules = [str(PurePath(file).parent) for file in sources.files if PurePath(file).name == "buf.yaml"]
    tool = Tool("buf", ("lint", *modules), sources.digest, "Run buf lint")
    return LintResult.create(request, await Get(FallibleProcessResult, Tool, tool))


# --- mypy: one run for a package and its tests -----------------------------------------------------------------------


@dataclass(frozen=True)
class MyPyFieldSet(FieldSet):
    required_fields = (PythonSourceField,)
    sources: PythonSourceField


class MyPy(Subsystem):
    options_scope = "mypy"
    name = "mypy"
    help = "mypy, set in [tool.mypy]."
    skip = SkipOption("check")


class MyPyRequest(CheckRequest):
    field_set_type = MyPyFieldSet
    tool_name = "mypy"


@dataclass(frozen=True)
class MyPyPartition:
    name: str
    field_sets: tuple[MyPyFieldSet, ...]


def partition_of(path: str) -> str:
    """`packages/llama31-core`, or the top folder. Two packages may have a test_cli.py; mypy takes a name once a run."""
    parts = PurePath(path).parts
    return "/".join(parts[:2]) if parts[0] == "packages" else parts[0]


def without_stubbed_modules(files: Iterable[str]) -> list[str]:
    """mypy takes a module once: where x.pyi lies beside x.py, it is x.pyi that counts."""
    stubs = {file for file in files if file.endswith(".pyi")}
    return [file for file in files if file + "i" not in stubs]


@rule(desc="Type-check with mypy", level=LogLevel.DEBUG)
async def check_with_mypy(request: MyPyRequest, mypy: MyPy) -> CheckResults:
    partitions = defaultdict(list)
    for field_set in () if mypy.skip else request.field_sets:
        partitions[partition_of(field_set.sources.file_path)].append(field_set)
    results = await MultiGet(
        Get(CheckResult, MyPyPartition(name, tuple(field_sets))) for name, field_sets in sorted(partitions.items())
    )
    return CheckResults(results, checker_name="mypy")


@rule(level=LogLevel.DEBUG)
async def check_partition(partition: MyPyPartition) -> CheckResult:
    roots, transitive = await MultiGet(
        Get(SourceFiles, SourceFilesRequest(field_set.sources for field_set in partition.field_sets)),
        Get(TransitiveTargets, TransitiveTargetsRequest(field_set.address for field_set in partition.field_sets)),
    )
    sources = await Get(PythonSourceFiles, PythonSourceFilesRequest(transitive.closure))
    # mypy replaces the files of its cache whole, so runs may share it. Sandboxes give files new times: go by content.
    cache = f".cache/mypy/{partition.name}"
    arguments = (f"--cache-dir={cache}", "--skip-cache-mtime-check", "--scripts-are-modules", "--no-color-output")
    tool = Tool(
        "mypy",
        (*arguments, *without_stubbed_modules(roots.files)),
        sources.source_files.snapshot.digest,
        f"Run mypy on {partition.name}",
        named_cache=(("llama_mypy", ".cache/mypy"),),
    )
    result = await Get(FallibleProcessResult, Tool, tool)
    return CheckResult.from_fallible_process_result(result, partition_description=partition.name)


def rules() -> list[Any]:
    return [
        *collect_rules(),
        *RuffLint.rules(),
        *RuffFix.rules(),
        *RuffFormat.rules(),
        *ImportLinterLint.rules(),
        *BufLint.rules(),
        UnionRule(CheckRequest, MyPyRequest),
    ]
