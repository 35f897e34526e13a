"""Ranks with MindFormers' fused tensors: each rank stacks its own parts, so joining the stacks would be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from llama31_ckpt.cli import main
from llama31_core.checkpoint import describe_file, open_weights, parameter_shapes, save_weights
from llama31_core.checkpoint.dtypes import Array
from llama31_core.config import ModelConfig
from llama31_core.parallel import ParallelConfig, plan_shards

# Grouped heads: a rank's stack has four rows of wq for one of wk and one of wv.
CONFIG = ModelConfig(vocab_size=48, dim=16, n_layers=2, n_heads=8, n_kv_heads=2, head_dim=2, ffn_dim=24, max_seq_len=64)
STACKS = {
    "attention.w_qkv": ("attention.wq", "attention.wk", "attention.wv"),
    "feed_forward.w_gate_hidden": ("feed_forward.w1", "feed_forward.w3"),
}
TP2 = ParallelConfig(tp=2)


def make_full(directory: Path, *, moments: bool = True) -> Path:
    rng = np.random.default_rng(5)
    tensors: dict[str, Array] = {}
    for prefix, dtype in (("", ml_dtypes.bfloat16), *((("adam_mean.", np.float32),) if moments else ())):
        for name, shape in parameter_shapes(CONFIG).items():
            tensors[prefix + name] = rng.standard_normal(shape).astype(dtype)
    CONFIG.save_pretrained(directory)
    save_weights(directory, tensors.items())
    return directory


def stacked(tensors: dict[str, Array]) -> dict[str, Array]:
    """One rank's tensors as MindFormers' `qkv_concat` model has them."""
    result = dict(tensors)
    for layer in range(CONFIG.n_layers):
        for prefix in ("", "adam_mean."):
            for fused, members in STACKS.items():
                names = [f"{prefix}model.layers.{layer}.{member}.weight" for member in members]
                if names[0] in tensors:
                    stack = np.concatenate([result.pop(name) for name in names])
                    result[f"{prefix}model.layers.{layer}.{fused}.weight"] = stack
    return result


def make_ranks(full: Path, directory: Path) -> dict[int, dict[str, Array]]:
    """What MindFormers would save: fused tensors, a strategy and no manifests. Returns each rank's tensors."""
    ranks: dict[int, dict[str, Array]] = {}
    with open_weights(full) as reader:
        for rank in range(2):
            own = {
                prefix + name: reader.read_slice(prefix + name, shard.slices)
                for prefix in ("", "adam_mean.")
                for name, shard in plan_shards(CONFIG, TP2, rank).items()
                if prefix + name in (*reader.names(), *reader.states)
            }
            ranks[rank] = stacked(own)
            (directory / f"rank_{rank}").mkdir(parents=True)
            save_weights(directory / f"rank_{rank}" / f"llama_{rank}.ckpt", ranks[rank].items())
    return ranks


def write_strategy(path: Path, ranks: dict[int, dict[str, Array]], *, moment_shards: int = 0) -> Path:
    """A strategy file that splits the fused tensors by rows, and the others as the table does."""
    shards = plan_shards(CONFIG, TP2, 0)
    layouts = {}
    for name, array in ranks[0].items():
        shard = shards.get(name.removeprefix("adam_mean."))
        parts = shard.parts if shard is not None else (2, 1)
        assert len(parts) == array.ndim
        extra = moment_shards if name.startswith("adam_mean.") and parts[0] > 1 else 0
        layouts[name] = {
            "dev_matrix": [max(1, moment_shards), 2],
            "tensor_map": [0 if count > 1 else -1 for count in parts],
            "opt_weight_shard_step": 2 if extra else 0,
            "opt_weight_shard_size": extra,
        }
    content = {"parallel_layout_item": layouts, "parallel_strategy_item": {"op": {"stage": 0}}}
    path.write_text(json.dumps(content))
    return path


def test_mindformers_ranks_merge_to_the_bytes_they_were_split_from(tmp_path: Path) -> None:
    full = make_full(tmp_path / "full")
    strategy = write_strategy(tmp_path / "strategy.json", make_ranks(full, tmp_path / "ranks"))
    command = ["merge", "--input_path", f"{tmp_path}/ranks", "--src_strategy", str(strategy), "--config", str(full)]
    assert main([*command, "--output_path", f"{tmp_path}/merged"]) == 0
    assert describe_file(tmp_path / "merged/model.safetensors") == describe_file(full / "model.safetensors")


@pytest.mark.parametrize("by_strategy", [True, False])
def test_our_ranks_are_those_of_mindformers(by_strategy: bool, tmp_path: Path) -> None:
    full = make_full(tmp_path / "full")
    expected = make_ranks(full, tmp_path / "ranks")
    mesh = ["--tp", "2", "--qkv_concat"]
    if by_strategy:
        mesh = ["--dst_strategy", str(write_strategy(tmp_path / "strategy.json", expected))]
    assert main(["shard", "--input_path", str(full), "--output_path", f"{tmp_path}/ours", *mesh]) == 0
    for rank, tensors in expected.items():
        path = tmp_path / f"ours/rank_{rank}/checkpoint_{rank}.safetensors"
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        assert set(header) - {"__metadata__"} == set(tensors)
        with open_weights(path) as ours, open_weights(tmp_path / f"ranks/rank_{rank}") as theirs:
            for name in (*theirs.names(), *theirs.states):
                assert ours.read(name).tobytes() == theirs.read(name).tobytes(), name
    # Over another mesh, from fused ranks with manifests, and back.
    command = ["reshard", "--input_path", f"{tmp_path}/ours", "--output_path", f"{tmp_path}/pp2", "--pp", "2"]
    assert main(command) == 0
    assert main(["merge", "--input_path", f"{tmp_path}/pp2", "--output_path", f"{tmp_path}/merged"]) == 0
    assert describe_file(tmp_path / "merged/model.safetensors") == describe_file(full / "model.safetensors")


def test_fused_moments_split_over_dp_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = make_full(tmp_path / "full")
    command = ["shard", "--input_path", str(full), "--output_path", f"{tmp_path}/out", "--qkv_concat"]
    assert main([*command, "--dp", "2", "--tp", "2", "--shard_optimizer"]) == 1
    assert "leave shard_optimizer or qkv_concat out" in capsys.readouterr().err
    strategy = write_strategy(tmp_path / "zero.json", make_ranks(full, tmp_path / "ranks"), moment_shards=2)
    assert main([*command[:-1], "--dst_strategy", str(strategy)]) == 1
    assert "does not say how adam_mean." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
