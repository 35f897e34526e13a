"""MindIE's config.json, as it is: a file in, typed sections out. Keys and defaults are those of MindIE 1.0.RC3.

A key that MindIE has and this server has no use for is typed too: `mindie_settings` says so, and why.
"""
# ruff: noqa: N815  the keys are MindIE's

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llama31_serve.errors import StartError

Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(ge=1)]
Number = Annotated[int, Field(ge=0)]
# Gibibytes; -1 leaves the size to the server.
MemorySize = Annotated[int, Field(ge=-1)]


class Section(BaseModel):
    """An object of the file: no other keys, no number in quotes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class LogSection(Section):
    """`LogConfig`; sizes in megabytes."""

    logLevel: str = "Info"
    logFileSize: Annotated[int, Field(ge=1, le=500)] = 20
    logFileNum: Annotated[int, Field(ge=1, le=64)] = 20
    logPath: str = "logs/mindservice.log"


class ServerSection(Section):
    """`ServerConfig`; `grpcPort` and `grpcControlPort` are this server's own."""

    ipAddress: str = "127.0.0.1"
    managementIpAddress: str | None = None
    port: Port = 1025
    managementPort: Port = 1026
    metricsPort: Port = 1027
    grpcPort: Port = 50051
    grpcControlPort: Port | None = None
    allowAllZeroIpListening: bool = False
    maxLinkNum: Count = 1000
    httpsEnabled: bool = True
    fullTextEnabled: bool = False
    tlsCaPath: str = ""
    tlsCaFile: list[str] = []
    tlsCert: str = ""
    tlsPk: str = ""
    tlsPkPwd: str = ""
    tlsCrl: str = ""
    tlsCrlPath: str = ""
    tlsCrlFiles: list[str] = []
    managementTlsCaFile: list[str] = []
    managementTlsCert: str = ""
    managementTlsPk: str = ""
    managementTlsPkPwd: str = ""
    managementTlsCrl: str = ""
    managementTlsCrlPath: str = ""
    managementTlsCrlFiles: list[str] = []
    kmcKsfMaster: str = ""
    kmcKsfStandby: str = ""
    inferMode: str = "standard"
    pdInterNodeTLSEnabled: bool = False
    pdCommunicationPort: Port = 1121
    interNodeTlsCaFile: str = ""
    interNodeTlsCert: str = ""
    interNodeTlsPk: str = ""
    interNodeTlsPkPwd: str = ""
    interCommTlsCrl: str = ""
    interNodeKmcKsfMaster: str = ""
    interNodeKmcKsfStandby: str = ""
    interCommTLSEnabled: bool = False
    interCommPort: Port = 1121
    interCommTlsCaPath: str = ""
    interCommTlsCaFile: str = ""
    interCommTlsCaFiles: list[str] = []
    interCommTlsCert: str = ""
    interCommPk: str = ""
    interCommPkPwd: str = ""
    interCommTlsCrlPath: str = ""
    interCommTlsCrlFiles: list[str] = []
    openAiSupport: str = "vllm"
    tokenTimeout: Count = 600
    e2eTimeout: Count = 600
    distDPServerEnabled: bool = False


class ModelSection(Section):
    """One of `BackendConfig.ModelDeployConfig.ModelConfig`."""

    modelInstanceType: str = "Standard"
    modelName: Annotated[str, Field(min_length=1)]
    modelWeightPath: Annotated[str, Field(min_length=1)]
    worldSize: Count = 1
    cpuMemSize: MemorySize = 5
    npuMemSize: MemorySize = -1
    backendType: str = "ms"
    trustRemoteCode: bool = False
    pluginParams: Any = None
    plugin_params: Any = None


class DeploySection(Section):
    """`BackendConfig.ModelDeployConfig`."""

    maxSeqLen: Count = 2560
    maxInputTokenLen: Count = 2048
    truncation: bool = False
    ModelConfig: Annotated[list[ModelSection], Field(min_length=1, max_length=1)]


class ScheduleSection(Section):
    """`BackendConfig.ScheduleConfig`."""

    templateType: Literal["Standard", "Mix"] = "Standard"
    templateName: str = "Standard_LLM"
    cacheBlockSize: Count = 128
    maxPrefillBatchSize: Count = 50
    maxPrefillTokens: Count = 8192
    prefillTimeMsPerReq: Number = 150
    prefillPolicyType: Number = 0
    decodeTimeMsPerReq: Number = 50
    decodePolicyType: Number = 0
    policyType: Number = 0
    maxBatchSize: Count = 200
    maxIterTimes: Count = 512
    maxPreemptCount: Number = 0
    supportSelectBatch: bool = False
    maxQueueDelayMicroseconds: Number = 5000


class BackendSection(Section):
    """`BackendConfig`."""

    backendName: str = "mindieservice_llm_engine"
    modelInstanceNumber: Count = 1
    npuDeviceIds: list[list[Number]] = [[0]]
    tokenizerProcessNumber: Annotated[int, Field(ge=1, le=32)] = 8
    multiNodesInferEnabled: bool = False
    multiNodesInferPort: Port = 1120
    interNodeTLSEnabled: bool = True
    interNodeTlsCaPath: str = ""
    interNodeTlsCaFile: str = ""
    interNodeTlsCaFiles: list[str] = []
    interNodeTlsCert: str = ""
    interNodeTlsPk: str = ""
    interNodeTlsPkPwd: str = ""
    interNodeTlsCrl: str = ""
    interNodeTlsCrlPath: str = ""
    interNodeTlsCrlFiles: list[str] = []
    interNodeKmcKsfMaster: str = ""
    interNodeKmcKsfStandby: str = ""
    ModelDeployConfig: DeploySection
    ScheduleConfig: ScheduleSection = ScheduleSection()


class MindieConfig(Section):
    """The whole file."""

    Version: str = "1.0.0"
    LogConfig: LogSection = LogSection()
    ServerConfig: ServerSection = ServerSection()
    BackendConfig: BackendSection


def load_mindie_config(path: Path) -> MindieConfig:
    """Read and check a file.

    Raises:
        StartError: no such file, no JSON, an unknown key (the nearest known one is named), a value that does not fit.
    """
    try:
        text = path.read_text("utf-8")
        json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"--config {path}: cannot be read ({error})") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise StartError(f"--config {path}: is no JSON ({error})") from error
    try:
        return MindieConfig.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise StartError(f"--config {path}: {_sentence(problem)}") from error


def _sentence(problem: Any) -> str:
    dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(problem["loc"][-1]), _known_keys(), 1)
        return f"unknown key {dotted}; {f'did you mean {close[0]}?' if close else 'leave it out'}"
    if problem["type"] == "missing":
        return f"{dotted} is missing"
    return f"{dotted} is {problem['input']!r}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"


def _known_keys() -> list[str]:
    sections = (MindieConfig, LogSection, ServerSection, BackendSection, DeploySection, ModelSection, ScheduleSection)
    return [key for section in sections for key in section.model_fields]
