"""MindIE's way in: its config.json as the guide has it, the guide's model directory, and the guide's request."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama31_ckpt.cli import main as ckpt
from llama31_core import ModelConfig
from llama31_core.native_support import what_is_missing
from llama31_serve.server import core_engine
from llama31_serve.server.mindie_file import load_mindie_config
from llama31_serve.server.mindie_settings import settings_of
from llama31_serve.server.options import EngineOptions
from llama31_serve.server.settings import Settings

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "serve" / "config.json"
PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
NAME = "llama3_1_8b"


def test_the_file_as_it_is() -> None:
    settings = settings_of(load_mindie_config(CONFIG), CONFIG)
    options, engine = settings.options, settings.engine
    assert (options.host, options.http_port, options.control_host) == ("127.0.0.1", 1025, "127.0.0.2")
    assert (options.management_port, options.metrics_port, options.port) == (1026, 1027, 50051)
    assert (options.max_running, options.max_prompt_tokens, options.max_new_tokens) == (1000, 2048, 512)
    assert (engine.max_seq_len, engine.block_size, engine.max_batch_size) == (2560, 128, 200)
    assert (engine.max_prefill_tokens, engine.max_prefill_batch_size, engine.max_queue_delay_s) == (8192, 50, 0.005)
    assert (settings.model_dir, settings.security.tls) == (Path("/mf_model/llama3_1_8b"), None)
    named = {key for note in settings.notes for key in note.partition(" (")[0].split(", ")}
    assert "ServerConfig.kmcKsfMaster" in named
    assert "BackendConfig.ScheduleConfig.supportSelectBatch" in named
    assert not {"ServerConfig.port", "BackendConfig.ScheduleConfig.maxBatchSize"} & named


def test_the_cache_on_a_cpu_has_a_quarter_of_what_the_kept_weights_leave(
    smollm2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = tmp_path / "half"
    assert ckpt(["convert", "--input_path", str(smollm2_dir), "--output_path", str(half), "--dtype", "bf16"]) == 0
    monkeypatch.setattr(core_engine, "available_memory_bytes", lambda: 2 << 30)
    numbers = ModelConfig.from_pretrained(half).num_parameters
    in_half = 4 if what_is_missing() else 2  # without the native kernels weights are kept in float32
    for directory, bytes_per_number in ((smollm2_dir, 4), (half, in_half)):
        settings = Settings(directory, engine=EngineOptions(cache_memory_bytes=8 << 30), host_cache_bytes=2 << 20)
        options, [note] = core_engine.fit_caches(directory, directory, settings)
        assert options.cache_memory_bytes == ((2 << 30) - bytes_per_number * numbers) // 4
        # A block of 16 tokens has 720 KiB, or 360 with keys and values in bfloat16 as the weights are.
        assert options.num_host_blocks == (2 if bytes_per_number == 4 else 5)
        assert note.startswith("npuMemSize 8 GiB (on this CPU the cache has 0.")


def write_model_dir(directory: Path, source: Path) -> None:
    """The guide's layout: paths of the YAML are of another machine, and the tokenizer's code must not be run."""
    directory.mkdir()
    ModelConfig.from_pretrained(source).save_pretrained(directory, form="mindformers")
    assert ckpt(["convert", "--input_path", str(source), "--output_path", str(directory / f"{NAME}.ckpt")]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, directory / name)
    (directory / "llama3_1_tokenizer.py").write_text("raise SystemExit('this code was run')\n")
    run = {
        "run_mode": "predict",
        "load_checkpoint": f"/mf_model/{NAME}/{NAME}.ckpt",
        "use_parallel": False,
        "model": {
            "model_config": {
                "type": "LlamaConfig",
                "auto_map": {"AutoTokenizer": ["llama3_1_tokenizer.Llama3Tokenizer", None]},
            }
        },
        "processor": {"tokenizer": {"vocab_file": f"/mf_model/{NAME}/tokenizer.json"}},
    }
    (directory / f"predict_{NAME}.yaml").write_text(yaml.safe_dump(run), "utf-8")


def write_config(path: Path) -> None:
    """The guide's file on free ports, with a model of this machine and a smaller cache."""
    config: Any = json.loads(CONFIG.read_text("utf-8"))
    config["ServerConfig"] |= {"port": 0, "managementPort": 0, "metricsPort": 0, "grpcPort": 0}
    [model] = config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"]
    model |= {"modelWeightPath": NAME, "npuMemSize": 1}
    path.write_text(json.dumps(config), "utf-8")


def test_the_guides_directory_and_request(smollm2_dir: Path, tmp_path: Path) -> None:
    write_model_dir(tmp_path / NAME, smollm2_dir)
    write_config(tmp_path / "config.json")
    flags = ("--config", str(tmp_path / "config.json"), "--allow_special_tokens")
    command = [sys.executable, "-m", "llama31_serve", "start", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stderr is not None
            business = ""
            for line in server.stdout:
                if line.startswith("HTTP (business) on "):
                    business = line.split()[-1]
                if line.startswith("Daemon start success!"):
                    break
            else:
                raise AssertionError(server.stderr.read())
            body = json.dumps({"inputs": PROMPT, "stream": False}).encode()
            headers = {"Accept": "application/json", "Content-type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(f"{business}/generate", body, headers)) as response:
                assert json.load(response) == {"generated_text": "The capital of France is Paris."}
            server.send_signal(signal.SIGTERM)
            warnings = server.stderr.read().splitlines()
            assert server.wait(60) == 0
        finally:
            server.kill()
    assert len([line for line in warnings if "without effect" in line]) == 1
    assert (tmp_path / "logs" / "mindservice.log").read_text("utf-8").count("without effect") == 1
