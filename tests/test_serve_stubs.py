"""The committed gRPC stubs are, byte for byte, what tools/generate_stubs writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

GENERATE_STUBS = Path(__file__).resolve().parents[1] / "tools" / "generate_stubs"


def test_stubs_are_current() -> None:
    command = [sys.executable, str(GENERATE_STUBS), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 3:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stderr
