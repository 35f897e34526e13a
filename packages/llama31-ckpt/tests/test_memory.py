"""Memory of a conversion does not grow with the model: 2x the largest tensor + 400 MB, measured in another process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llama31_core.checkpoint import parameter_shapes, spell
from llama31_core.checkpoint.dtypes import dtype_of
from llama31_core.checkpoint.safetensors_format import build_header
from llama31_core.checkpoint.staging import remove_tree
from llama31_core.config import ModelConfig

# 1.0 GB in bfloat16, the largest tensor 67 MB.
CONFIG = ModelConfig(vocab_size=16384, dim=2048, n_layers=10, n_heads=16, n_kv_heads=8, ffn_dim=5120)
RUN = """
import sys
from pathlib import Path
from llama31_ckpt.cli import main
assert main(sys.argv[1:]) == 0
# Not getrusage: its maximum starts with that of the process that started this one.
print("peak KB", Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.fixture
def big_hf_dir(tmp_path: Path) -> Path:
    """A checkpoint of zeros, as a file with a hole: it takes no room on the disk."""
    path = tmp_path / "hf"
    CONFIG.save_pretrained(path)
    specs = {spell(name, "hf"): (dtype_of("bf16"), shape) for name, shape in parameter_shapes(CONFIG).items()}
    header = build_header(specs, {})
    with (path / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * CONFIG.num_parameters)
    return path


@pytest.mark.parametrize(("target", "options"), [("out", []), ("out.ckpt", ["--dtype", "fp16"])])
def test_peak_memory_is_bounded(target: str, options: list[str], big_hf_dir: Path, tmp_path: Path) -> None:
    command = ["convert", "--input_path", str(big_hf_dir), "--output_path", str(tmp_path / target), *options]
    result = subprocess.run([sys.executable, "-c", RUN, *command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    remove_tree(tmp_path / target)  # pytest keeps its directories, and this is a gigabyte
    peak_bytes = int(result.stdout.split("peak KB")[1]) * 1024
    largest = 2 * CONFIG.vocab_size * CONFIG.dim
    assert 2 * CONFIG.num_parameters > 1.0e9
    assert peak_bytes < 2 * largest + 400e6
