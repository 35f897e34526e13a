"""A model of random weights in the shape of a preset, and a GGUF file that describes it, for `inference.py`.

    python tools/bench/random_model.py llama3.2-1b OUT_DIR

leaves OUT_DIR/model, a bfloat16 model directory, and OUT_DIR/like.gguf, without tensors and with made-up words. Rotary
frequencies are those of `rope_theta` alone: llama.cpp takes scaled ones from a tensor.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gguf
from bench.ckpt import make_checkpoint

from llama31_core.config import ModelConfig
from llama31_core.presets import PRESETS


def write_description(config: ModelConfig, target: Path) -> None:
    """What llama.cpp wants to know of a model beside its tensors."""
    writer = gguf.GGUFWriter(str(target), "llama")
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([f"w{number}" for number in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["w 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def main() -> None:
    """Write both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=sorted(PRESETS))
    parser.add_argument("out_dir", type=Path)
    args = parser.parse_args()
    config = ModelConfig.preset(args.preset).model_copy(update={"rope_scaling": None})
    args.out_dir.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=args.out_dir) as scratch:
        make_checkpoint(Path(scratch), config)
        convert = [sys.executable, "-m", "llama31_ckpt", "convert", "--input_path", scratch, "--dtype", "bf16"]
        subprocess.run([*convert, "--output_path", str(args.out_dir / "model")], check=True)
    write_description(config, args.out_dir / "like.gguf")


if __name__ == "__main__":
    main()
