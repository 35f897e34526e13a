"""From MindIE's config.json to this server's settings: every key is honoured, refused, or named with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama31_serve.errors import StartError
from llama31_serve.server.listener import Security
from llama31_serve.server.mindie_file import MindieConfig, Section, ServerSection
from llama31_serve.server.options import EngineOptions, ServerOptions, is_any_address
from llama31_serve.server.peer_check import PeerCheck
from llama31_serve.server.settings import LogFile, Settings
from llama31_serve.server.tls import ServerTls

GIB = 1 << 30
LOG_LEVELS = {
    "verbose": "debug", "debug": "debug", "info": "info", "warn": "warning", "warning": "warning", "error": "error",
    "none": "critical",
}  # fmt: skip

# Keys without effect, by the reason. A key is named if the file has it.
_NO_NODES = "one process serves; prefill and decode are not split over nodes"
_NO_EFFECT: dict[str, tuple[str, ...]] = {
    _NO_NODES: (
        "ServerConfig.pdInterNodeTLSEnabled", "ServerConfig.pdCommunicationPort", "ServerConfig.interNode*",
        "ServerConfig.interComm*", "ServerConfig.distDPServerEnabled", "BackendConfig.multiNodesInferPort",
        "BackendConfig.interNode*",
    ),
    "there is one engine and one template": (
        "BackendConfig.backendName", "BackendConfig.ScheduleConfig.templateType",
        "BackendConfig.ScheduleConfig.templateName",
    ),
    "there is no key manager; tlsPkPwd holds the password itself": (
        "ServerConfig.kmcKsfMaster", "ServerConfig.kmcKsfStandby",
    ),
    "a step computes prompts and decoding sequences together, so nothing chooses between them": (
        "BackendConfig.ScheduleConfig.prefillTimeMsPerReq", "BackendConfig.ScheduleConfig.decodeTimeMsPerReq",
        "BackendConfig.ScheduleConfig.supportSelectBatch",
    ),
    "both forms are served, each on its own route": ("ServerConfig.openAiSupport",),
    "a request's own timeout counts": ("ServerConfig.tokenTimeout", "ServerConfig.e2eTimeout"),
    "no code of a model directory is run": ("BackendConfig.ModelDeployConfig.ModelConfig[0].trustRemoteCode",),
    "there are no plug-ins": (
        "BackendConfig.ModelDeployConfig.ModelConfig[0].pluginParams",
        "BackendConfig.ModelDeployConfig.ModelConfig[0].plugin_params",
    ),
}  # fmt: skip


def settings_of(
    config: MindieConfig, path: Path, *, allow_any_address: bool = False, replica: int | None = None
) -> Settings:
    """The settings of a file, for a server of its own or for one of modelInstanceNumber processes.

    Its relative paths begin at its directory, or above it if that is called `conf`.

    Raises:
        StartError: a value that this server cannot do, named with its key and what to change.
    """
    server, backend = config.ServerConfig, config.BackendConfig
    deploy, schedule = backend.ModelDeployConfig, backend.ScheduleConfig
    model = deploy.ModelConfig[0]
    base = path.resolve().parent
    base = base.parent if base.name == "conf" else base
    _refuse(path, config, allow_any_address=allow_any_address, replica=replica)
    engine = EngineOptions(
        max_seq_len=deploy.maxSeqLen,
        max_batch_size=schedule.maxBatchSize,
        block_size=schedule.cacheBlockSize,
        cache_memory_bytes=None if model.npuMemSize < 1 else model.npuMemSize * GIB,
        max_prefill_tokens=schedule.maxPrefillTokens,
        max_prefill_batch_size=schedule.maxPrefillBatchSize,
        max_queue_delay_s=schedule.maxQueueDelayMicroseconds / 1e6,
    )
    options = ServerOptions(
        host=server.ipAddress,
        port=server.grpcPort,
        http_port=server.port,
        control_host=server.managementIpAddress or server.ipAddress,
        control_port=server.grpcControlPort,
        management_port=server.managementPort,
        metrics_port=server.metricsPort,
        model_name=model.modelName,
        max_running=server.maxLinkNum,
        max_prompt_tokens=deploy.maxInputTokenLen,
        max_new_tokens=schedule.maxIterTimes,
        default_max_tokens=schedule.maxIterTimes,
        truncate_prompts=deploy.truncation,
        tokenizer_threads=backend.tokenizerProcessNumber,
        allow_any_address=allow_any_address or server.allowAllZeroIpListening,
    )
    log = config.LogConfig
    log_path = base / log.logPath
    if replica is not None:
        log_path = log_path.with_stem(f"{log_path.stem}.{replica}")
    preempts = schedule.maxPreemptCount > 0
    return Settings(
        model_dir=base / model.modelWeightPath,
        options=options,
        engine=engine,
        host_cache_bytes=max(model.cpuMemSize, 0) * GIB if preempts else 0,
        tensor_parallel=model.worldSize,
        visible_devices=tuple(backend.npuDeviceIds[replica or 0]),
        security=Security(_tls(server, base, "tls")),
        management_security=Security(_tls(server, base, "managementTls")),
        log_level=LOG_LEVELS[log.logLevel.lower()],
        log_file=LogFile(log_path, log.logFileSize * 1_000_000, log.logFileNum),
        notes=tuple(_notes(config)),
    )


def _refuse(path: Path, config: MindieConfig, *, allow_any_address: bool, replica: int | None) -> None:
    server, backend = config.ServerConfig, config.BackendConfig
    model, schedule = backend.ModelDeployConfig.ModelConfig[0], backend.ScheduleConfig
    devices = backend.npuDeviceIds
    any_address = not (allow_any_address or server.allowAllZeroIpListening)
    for bad, problem in (
        (
            any_address and is_any_address(server.ipAddress),
            f"ServerConfig.ipAddress {server.ipAddress} listens on every interface; name one address, or set "
            "ServerConfig.allowAllZeroIpListening to true",
        ),
        (
            any_address and is_any_address(server.managementIpAddress or "127.0.0.1"),
            f"ServerConfig.managementIpAddress {server.managementIpAddress} listens on every interface; name one "
            "address, or set ServerConfig.allowAllZeroIpListening to true",
        ),
        (server.inferMode != "standard", f"ServerConfig.inferMode is {server.inferMode!r}, allowed is 'standard'"),
        (
            backend.multiNodesInferEnabled,
            "BackendConfig.multiNodesInferEnabled is true; one node serves, set it to false",
        ),
        (
            replica is None and backend.modelInstanceNumber > 1,
            f"BackendConfig.modelInstanceNumber is {backend.modelInstanceNumber}, a process serves 1; set it to 1 and "
            "start several with `llama31-serve replicas`",
        ),
        (
            len(devices) != backend.modelInstanceNumber or any(len(ids) != model.worldSize for ids in devices),
            f"BackendConfig.npuDeviceIds is {devices}, needs modelInstanceNumber ({backend.modelInstanceNumber}) lists "
            f"of worldSize ({model.worldSize}) ids",
        ),
        (
            replica is not None and replica >= backend.modelInstanceNumber,
            f"--replica is {replica}, BackendConfig.modelInstanceNumber is {backend.modelInstanceNumber}; raise it",
        ),
        (model.backendType != "ms", f"ModelConfig[0].backendType is {model.backendType!r}, allowed is 'ms'"),
        (
            model.modelInstanceType != "Standard",
            f"ModelConfig[0].modelInstanceType is {model.modelInstanceType!r}, allowed is 'Standard'",
        ),
        (
            config.LogConfig.logLevel.lower() not in LOG_LEVELS,
            f"LogConfig.logLevel is {config.LogConfig.logLevel!r}, allowed are {', '.join(LOG_LEVELS)}",
        ),
        (
            bool(schedule.prefillPolicyType or schedule.decodePolicyType or schedule.policyType),
            "ScheduleConfig.prefillPolicyType, decodePolicyType and policyType are allowed to be 0 (first come, first "
            "served, after a request's priority)",
        ),
    ):
        if bad:
            raise StartError(f"--config {path}: {problem}")


def _notes(config: MindieConfig) -> Iterator[str]:
    given = list(_given(config, ""))
    for reason, patterns in _NO_EFFECT.items():
        keys = [key for key in given if any(_matches(key, pattern) for pattern in patterns)]
        if keys:
            yield f"{', '.join(keys)} ({reason})"
    server, schedule = config.ServerConfig, config.BackendConfig.ScheduleConfig
    if server.fullTextEnabled:
        yield "ServerConfig.fullTextEnabled (streams tell what is new, as clients of TGI and OpenAI expect)"
    if schedule.maxPreemptCount > 0:
        yield (
            f"ScheduleConfig.maxPreemptCount {schedule.maxPreemptCount} (cpuMemSize is used for what makes room; how "
            "many do at once is not limited)"
        )
    if not server.httpsEnabled and (server.tlsCert or server.tlsPk):
        yield "ServerConfig.tls*, managementTls* (httpsEnabled is false)"


def _matches(key: str, pattern: str) -> bool:
    return key.startswith(pattern[:-1]) if pattern.endswith("*") else key == pattern


def _given(section: Section, prefix: str) -> Iterator[str]:
    """The keys that the file has, dotted."""
    for name in (name for name in type(section).model_fields if name in section.model_fields_set):
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _given(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Section):
            yield from _given(value[0], f"{prefix}{name}[0].")
        else:
            yield f"{prefix}{name}"


def _tls(server: ServerSection, base: Path, prefix: str) -> ServerTls | None:
    """Of the business listeners ("tls") or the others ("managementTls"); their authorities are in one directory."""
    if not server.httpsEnabled:
        return None

    def value(name: str) -> Any:
        return getattr(server, prefix + name)

    single = (base / value("Crl"),) if value("Crl") else ()
    crls = single + tuple(base / value("CrlPath") / name for name in value("CrlFiles"))
    return ServerTls(
        base / value("Cert"),
        base / value("Pk"),
        tuple(base / server.tlsCaPath / name for name in value("CaFile")),
        base / value("PkPwd") if value("PkPwd") else None,
        PeerCheck(crls),
    )
