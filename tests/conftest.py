"""A trained model for the tests that cross packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama31_ckpt.cli import main as ckpt
from model_assets import fetch


@pytest.fixture(scope="session")
def smollm2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a model directory in float32."""
    path = tmp_path_factory.mktemp("models") / "smollm2-135m-instruct"
    assert ckpt(["convert", "--input_path", str(fetch("smollm2-gguf")), "--output_path", str(path)]) == 0
    return path
