"""MindIE's config.json: what each key does, what is said of those without effect, what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from llama31_serve.errors import StartError
from llama31_serve.server.mindie_file import MindieConfig, load_mindie_config
from llama31_serve.server.mindie_settings import _NO_EFFECT, _given, _matches, settings_of
from llama31_serve.server.settings import Settings

GIB = 1 << 30
MINIMAL: dict[str, Any] = {
    "ServerConfig": {"httpsEnabled": False},
    "BackendConfig": {"ModelDeployConfig": {"ModelConfig": [{"modelName": "m", "modelWeightPath": "/models/m"}]}},
}
FULL: dict[str, Any] = {
    "Version": "1.0.0",
    "LogConfig": {"logLevel": "Error", "logFileSize": 5, "logFileNum": 3, "logPath": "logs/x.log"},
    "ServerConfig": {
        "ipAddress": "127.0.0.3", "managementIpAddress": "127.0.0.4", "port": 2025, "managementPort": 2026,
        "metricsPort": 2027, "grpcPort": 2028, "grpcControlPort": 2029, "maxLinkNum": 300, "httpsEnabled": True,
        "tlsCaPath": "ca", "tlsCaFile": ["a.pem", "b.pem"], "tlsCert": "s.pem", "tlsPk": "s.key", "tlsPkPwd": "pwd",
        "tlsCrl": "crl.pem", "managementTlsCaFile": ["m.pem"], "managementTlsCert": "ms.pem",
        "managementTlsPk": "ms.key", "managementTlsPkPwd": "", "managementTlsCrl": "",
    },
    "BackendConfig": {
        "npuDeviceIds": [[3]], "tokenizerProcessNumber": 4,
        "ModelDeployConfig": {
            "maxSeqLen": 1000, "maxInputTokenLen": 800, "truncation": True,
            "ModelConfig": [{"modelName": "m", "modelWeightPath": "models/m", "cpuMemSize": 2, "npuMemSize": 4}],
        },
        "ScheduleConfig": {
            "cacheBlockSize": 64, "maxPrefillBatchSize": 7, "maxPrefillTokens": 900, "maxBatchSize": 33,
            "maxIterTimes": 111, "maxPreemptCount": 2, "maxQueueDelayMicroseconds": 2500,
        },
    },
}  # fmt: skip


def read(tmp_path: Path, values: Any, **options: Any) -> Settings:
    path = tmp_path / "config.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values), "utf-8")
    return settings_of(load_mindie_config(path), path, **options)


def changed(path: str, value: object) -> dict[str, Any]:
    """MINIMAL with one key set."""
    values = copy.deepcopy(MINIMAL)
    holder: Any = values
    *sections, key = path.split(".")
    for section in sections:
        holder = holder[int(section)] if section.isdecimal() else holder.setdefault(section, {})
    holder[key] = value
    return values


def test_every_key_that_has_a_meaning_is_honoured(tmp_path: Path) -> None:
    settings = read(tmp_path, FULL)
    options, engine = settings.options, settings.engine
    assert (options.host, options.control_host) == ("127.0.0.3", "127.0.0.4")
    ports = (options.http_port, options.management_port, options.metrics_port, options.port, options.control_port)
    assert ports == (2025, 2026, 2027, 2028, 2029)
    assert (options.max_running, options.max_prompt_tokens, options.truncate_prompts) == (300, 800, True)
    assert (options.max_new_tokens, options.default_max_tokens, options.tokenizer_threads) == (111, 111, 4)
    assert options.model_name == "m"
    assert (engine.max_seq_len, engine.block_size, engine.max_batch_size) == (1000, 64, 33)
    assert (engine.max_prefill_tokens, engine.max_prefill_batch_size) == (900, 7)
    assert (engine.max_queue_delay_s, engine.cache_memory_bytes) == (0.0025, 4 * GIB)
    assert settings.host_cache_bytes == 2 * GIB
    assert settings.visible_devices == (3,)
    assert settings.model_dir == tmp_path / "models" / "m"
    assert settings.log_level == "error"
    assert settings.log_file is not None
    assert settings.log_file.path == tmp_path / "logs" / "x.log"
    assert (settings.log_file.max_bytes, settings.log_file.count) == (5_000_000, 3)
    business, management = settings.security.tls, settings.management_security
    assert business is not None
    assert (business.cert, business.key, business.key_password) == (
        tmp_path / "s.pem", tmp_path / "s.key", tmp_path / "pwd",
    )  # fmt: skip
    assert business.client_cas == (tmp_path / "ca" / "a.pem", tmp_path / "ca" / "b.pem")
    assert business.peers.crls == (tmp_path / "crl.pem",)
    assert management is not None
    assert management.tls is not None
    assert (management.tls.cert, management.tls.client_cas) == (tmp_path / "ms.pem", (tmp_path / "ca" / "m.pem",))
    assert (management.tls.key_password, management.tls.peers.crls) == (None, ())


def test_relative_paths_begin_above_a_directory_called_conf(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    assert read(tmp_path / "conf", FULL).model_dir == tmp_path / "models" / "m"


def test_defaults_and_no_preemption(tmp_path: Path) -> None:
    settings = read(tmp_path, MINIMAL)
    assert (settings.options.http_port, settings.options.management_port) == (1025, 1026)
    assert settings.host_cache_bytes == 0  # maxPreemptCount is 0
    assert settings.engine.cache_memory_bytes is None  # npuMemSize is -1
    assert settings.security.tls is None
    assert settings.notes == ()


def test_keys_without_effect_are_named_with_the_reason(tmp_path: Path) -> None:
    def note(path: str, value: object) -> str:
        return "; ".join(read(tmp_path, changed(path, value)).notes)

    schedule = "BackendConfig.ScheduleConfig"
    assert note("ServerConfig.kmcKsfMaster", "x") == (
        "ServerConfig.kmcKsfMaster (there is no key manager; tlsPkPwd holds the password itself)"
    )
    assert "not split over nodes" in note("ServerConfig.pdCommunicationPort", 1121)
    assert "BackendConfig.interNodeTLSEnabled" in note("BackendConfig.interNodeTLSEnabled", True)
    assert "supportSelectBatch (a step computes" in note(f"{schedule}.supportSelectBatch", False)
    assert "one engine" in note("BackendConfig.backendName", "mindieservice_llm_engine")
    assert "streams tell what is new" in note("ServerConfig.fullTextEnabled", True)
    assert "not limited" in note(f"{schedule}.maxPreemptCount", 3)
    assert "httpsEnabled is false" in note("ServerConfig.tlsCert", "x.pem")
    assert note(f"{schedule}.maxBatchSize", 7) == ""


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("ServerConfig.ipAddress", "0.0.0.0", "ServerConfig.ipAddress 0.0.0.0 listens on every interface"),
        ("ServerConfig.managementIpAddress", "::", "ServerConfig.managementIpAddress :: listens"),
        ("ServerConfig.inferMode", "dmi", "ServerConfig.inferMode is 'dmi', allowed is 'standard'"),
        ("ServerConfig.port", 70000, "ServerConfig.port is 70000: input should be less than or equal to 65535"),
        ("ServerConfig.port", "1025", "ServerConfig.port is '1025': input should be a valid integer"),
        ("ServerConfig.ports", 1, "unknown key ServerConfig.ports; did you mean port?"),
        ("ServerConfig.maxLinkNumber", 1, "unknown key ServerConfig.maxLinkNumber; did you mean maxLinkNum?"),
        ("Xyzzy", 1, "unknown key Xyzzy; leave it out"),
        ("BackendConfig.multiNodesInferEnabled", True, "BackendConfig.multiNodesInferEnabled is true"),
        ("BackendConfig.modelInstanceNumber", 2, "start several with `llama31-serve replicas`"),
        ("BackendConfig.npuDeviceIds", [[0, 1]], "needs modelInstanceNumber (1) lists of worldSize (1) ids"),
        ("BackendConfig.ModelDeployConfig.ModelConfig.0.worldSize", 2, "npuDeviceIds is [[0]], needs"),
        ("BackendConfig.ModelDeployConfig.ModelConfig.0.backendType", "atb", "backendType is 'atb', allowed is 'ms'"),
        ("BackendConfig.ModelDeployConfig.ModelConfig", [], "ModelConfig is []: list should have at least 1 item"),
        ("BackendConfig.ScheduleConfig.maxBatchSize", 0, "ScheduleConfig.maxBatchSize is 0: input should be greater"),
        ("BackendConfig.ScheduleConfig.prefillPolicyType", 3, "are allowed to be 0"),
        ("LogConfig.logLevel", "loud", "LogConfig.logLevel is 'loud', allowed are"),
    ],
)
def test_refused(tmp_path: Path, path: str, value: object, message: str) -> None:
    with pytest.raises(StartError) as error:
        read(tmp_path, changed(path, value))
    assert message in str(error.value)
    assert str(error.value).startswith(f"--config {tmp_path / 'config.json'}: ")


def test_one_of_several(tmp_path: Path) -> None:
    values = changed("BackendConfig.modelInstanceNumber", 2)
    values["BackendConfig"]["npuDeviceIds"] = [[4], [5]]
    settings = read(tmp_path, values, replica=1)
    assert settings.visible_devices == (5,)
    assert settings.log_file is not None
    assert settings.log_file.path == tmp_path / "logs" / "mindservice.1.log"
    with pytest.raises(StartError, match="--replica is 2, BackendConfig"):
        read(tmp_path, values, replica=2)


def test_several_devices(tmp_path: Path) -> None:
    values = changed("BackendConfig.npuDeviceIds", [[0, 1]])
    values["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]["worldSize"] = 2
    assert read(tmp_path, values).tensor_parallel == 2


def test_every_interface_if_that_is_meant(tmp_path: Path) -> None:
    values = changed("ServerConfig.ipAddress", "0.0.0.0")
    assert read(tmp_path, values, allow_any_address=True).options.host == "0.0.0.0"
    values["ServerConfig"]["allowAllZeroIpListening"] = True
    assert read(tmp_path, values).options.host == "0.0.0.0"


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is no JSON"), ("{", "is no JSON"), ("[]", "input should be an object"), ("{}", "BackendConfig is missing")],
)
def test_files_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(StartError, match=message):
        read(tmp_path, text)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="cannot be read"):
        load_mindie_config(tmp_path / "none.json")


def test_the_table_of_keys_without_effect_names_keys_that_exist() -> None:
    config = MindieConfig.model_validate(MINIMAL)
    keys = {
        f"{name}.{key}"
        for name in ("ServerConfig", "BackendConfig")
        for key in type(getattr(config, name)).model_fields
    }
    backend = config.BackendConfig
    deploy = "BackendConfig.ModelDeployConfig.ModelConfig[0]"
    keys |= {f"BackendConfig.ScheduleConfig.{key}" for key in type(backend.ScheduleConfig).model_fields}
    keys |= {f"{deploy}.{key}" for key in type(backend.ModelDeployConfig.ModelConfig[0]).model_fields}
    assert set(_given(config, "")) <= keys
    for patterns in _NO_EFFECT.values():
        for pattern in patterns:
            assert any(_matches(key, pattern) for key in keys), pattern
