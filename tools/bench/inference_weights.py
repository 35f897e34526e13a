"""The weights of tools/bench/inference in the forms that its peers load."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import safetensors

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_hf(model_dir: Path, target: Path) -> Path:
    """A model directory as Hugging Face's, by our own converter."""
    command = [sys.executable, "-m", "llama31_ckpt", "convert", "--reversed"]
    subprocess.run([*command, "--input_path", str(model_dir), "--output_path", str(target)], check=True)
    return target


def write_gguf(hf: Path, like: Path, kind: str, target: Path) -> None:
    """A Hugging Face directory as a GGUF file in F32 or BF16, with the description and vocabulary of another file."""
    reader = gguf.GGUFReader(str(like))
    heads = int(reader.get_field("llama.attention.head_count").contents())
    kv_heads = int(reader.get_field("llama.attention.head_count_kv").contents())
    writer = gguf.GGUFWriter(str(target), "llama")
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kinds = entry.types
            writer.add_key_value(name, entry.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    quantized = gguf.GGMLQuantizationType[kind]
    for file in sorted(hf.glob("*.safetensors")):
        with safetensors.safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no mapping
                values = tensors.get_tensor(name).float().numpy()
                if "q_proj" in name or "k_proj" in name:
                    values = _interleaved(values, heads if "q_proj" in name else kv_heads)
                kept = values.ndim == 1
                data = values if kept or kind == "F32" else gguf.quants.quantize(values, quantized)
                writer.add_tensor(_gguf_name(name), data, raw_dtype=None if kept or kind == "F32" else quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize_gguf(source: Path, kind: str, target: Path) -> None:
    """A GGUF file with few bits made by llama.cpp itself: the embedding, which is the head too, keeps more in Q4_0."""
    import llama_cpp

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def drop(level: int, text: bytes, data: object) -> None:
        """Not a line for each tensor."""

    llama_cpp.llama_log_set(drop, None)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)):
        raise SystemExit(f"llama.cpp could not make {target} of {source}")


def _gguf_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:  # type: ignore[type-arg]
    """Rows of queries or keys in the order in which pairs that turn together are neighbours."""
    rows, columns = values.shape
    return values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
