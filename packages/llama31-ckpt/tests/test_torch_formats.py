"""PyTorch checkpoints: Meta's shards joined, in HF's row order; HF's `.bin`; and pickles that would run code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from llama31_ckpt.cli import main
from llama31_ckpt.rotary import to_interleaved
from llama31_ckpt.sources import open_source
from llama31_core.checkpoint import rotary_heads, spell
from llama31_core.checkpoint.dtypes import Array
from llama31_core.config import ModelConfig, RopeScaling
from llama31_core.errors import Llama31Error

Tensors = dict[str, Array]
PARAMS = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 512,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}
MetaBuilder = Callable[..., Path]


@pytest.fixture
def build_meta(tensors: Tensors, config: ModelConfig, tmp_path: Path) -> MetaBuilder:
    """Writes the tensors as Meta does: interleaved rotary rows, cut for tensor parallelism, one file a rank."""

    def build(
        num_shards: int = 1, dtype: torch.dtype = torch.float32, by_features: bool = False, **params: Any
    ) -> Path:
        path = tmp_path / "meta"
        path.mkdir()
        (path / "params.json").write_text(json.dumps({**PARAMS, **params}))
        shards: list[dict[str, torch.Tensor]] = [{} for _ in range(num_shards)]
        for canonical, array in tensors.items():
            name = spell(canonical, "meta")
            whole = array if rotary_heads(canonical) is None else to_interleaved(array, config.head_dim)
            tensor = torch.from_numpy(np.ascontiguousarray(whole)).to(dtype)
            columns = name.endswith(("wo.weight", "w2.weight")) or (by_features and name == "tok_embeddings.weight")
            if tensor.dim() == 1:
                pieces = [tensor] * num_shards
            elif name.endswith(("wk.weight", "wv.weight")) and num_shards > config.n_kv_heads:
                copies = num_shards // config.n_kv_heads
                pieces = [head for head in tensor.chunk(config.n_kv_heads) for _ in range(copies)]
            else:
                pieces = list(tensor.chunk(num_shards, dim=1 if columns else 0))
            for shard, piece in zip(shards, pieces, strict=True):
                shard[name] = piece.clone()
        for rank, shard in enumerate(shards):
            shard["rope.freqs"] = torch.ones(8)
            torch.save(shard, path / f"consolidated.{rank:02d}.pth")
        return path

    return build


@pytest.mark.parametrize("by_features", [False, True])
@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_meta_shards_are_joined(
    num_shards: int, by_features: bool, build_meta: MetaBuilder, tensors: Tensors, config: ModelConfig
) -> None:
    source = open_source(build_meta(num_shards, by_features=by_features))
    assert source.ignored == ("rope.freqs",)
    expected = config.model_copy(update={"rope_scaling": RopeScaling(), "max_seq_len": 131072})
    assert source.config == expected
    assert set(source.weights.names()) == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(source.weights.read_slice(name, ()), array)
        part = (slice(7, 45), slice(3, 50))[: array.ndim]
        np.testing.assert_array_equal(source.weights.read_slice(name, part), array[part])


def test_meta_to_a_model_directory_in_bfloat16(build_meta: MetaBuilder, tensors: Tensors, tmp_path: Path) -> None:
    path = build_meta(2, torch.bfloat16)
    (path / "tokenizer.model").write_text("vocabulary")
    assert main(["convert", "--input_path", str(path), "--output_path", str(tmp_path / "model")]) == 0
    source = open_source(tmp_path / "model")
    for name, array in tensors.items():
        np.testing.assert_array_equal(source.weights.read_slice(name, ()), array.astype(ml_dtypes.bfloat16))
    assert (tmp_path / "model" / "tokenizer.model").read_text() == "vocabulary"


def test_the_row_order_makes_meta_s_rotation_and_hf_s_agree(build_meta: MetaBuilder, config: ModelConfig) -> None:
    """Attention scores of Meta's weights under Meta's complex rotation, against ours under HF's half-split one."""
    path = build_meta()
    stored = torch.load(path / "consolidated.00.pth", weights_only=True)
    ours = open_source(path).weights
    x = torch.randn(6, config.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angles = torch.outer(
        torch.arange(6.0, dtype=torch.float64), 10000.0 ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    )

    def rotate_as_meta(rows: torch.Tensor, n_heads: int) -> torch.Tensor:
        pairs = torch.view_as_complex((x @ rows.T).reshape(6, n_heads, -1, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(2)

    def rotate_as_hf(rows: torch.Tensor, n_heads: int) -> torch.Tensor:
        heads = (x @ rows.T).reshape(6, n_heads, -1)
        left, right = heads.chunk(2, dim=-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)

    scores = []
    for rotate, prefix in ((rotate_as_meta, None), (rotate_as_hf, "model.")):
        pair = []
        for name, n_heads in (("layers.1.attention.wq.weight", config.n_heads), ("layers.1.attention.wk.weight", 2)):
            rows = stored[name] if prefix is None else torch.from_numpy(ours.read_slice(prefix + name, ()).copy())
            pair.append(rotate(rows.double(), n_heads))
        q, k = pair[0], pair[1].repeat_interleave(config.n_heads // 2, dim=1)
        scores.append(torch.einsum("qhd,khd->hqk", q, k))
    torch.testing.assert_close(scores[0], scores[1])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_heads": 3}, "dim=64 is not a multiple of n_heads=3"),
        ({"n_kv_heads": 3}, "n_heads=4 is not a multiple of n_kv_heads=3"),
        ({"n_heads": 8, "n_kv_heads": 8}, "wk"),
        ({"n_layers": None}, "n_layers"),
        ({"dim": "64"}, "dim"),
        ({"vision_chunk_size": 448}, "vision_chunk_size is nothing a text Llama has"),
        ({"n_layers": 3}, "9 missing"),
        ({"norm_eps": "small"}, "norm_eps is 'small', expected a number"),
        ({"rope_scaling_factor": [8]}, "rope_scaling_factor is [8], expected a number"),
    ],
)
def test_params_that_do_not_fit_are_refused(
    params: dict[str, Any], message: str, build_meta: MetaBuilder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = build_meta(2, **params)
    assert main(["convert", "--input_path", str(path), "--output_path", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["meta"]


def test_shards_that_disagree_are_named(build_meta: MetaBuilder) -> None:
    path = build_meta(2)
    shard = torch.load(path / "consolidated.01.pth", weights_only=True)
    torch.save({**shard, "norm.weight": torch.ones(4, 4)}, path / "consolidated.01.pth")
    with pytest.raises(Llama31Error, match=r"model\.norm_out\.weight has parts of shapes"):
        open_source(path)
    torch.save({**shard, "extra": torch.ones(1)}, path / "consolidated.01.pth")
    with pytest.raises(Llama31Error, match="hold different tensors: extra"):
        open_source(path)
    torch.save({**shard, "layers.0.feed_forward.w1.weight": torch.tensor(1.0)}, path / "consolidated.01.pth")
    with pytest.raises(Llama31Error, match="w1"):
        open_source(path)


def test_missing_parts_of_a_meta_checkpoint_are_named(build_meta: MetaBuilder) -> None:
    path = build_meta(4)
    (path / "consolidated.01.pth").rename(path / "consolidated.05.pth")
    with pytest.raises(Llama31Error, match=r"no consolidated\.01\.pth; get the missing shard"):
        open_source(path)
    (path / "consolidated.05.pth").rename(path / "consolidated.01.pth")
    (path / "params.json").unlink()
    with pytest.raises(Llama31Error, match=r"params\.json cannot be read"):
        open_source(path)


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_hf_bin_files(old_format: bool, sharded: bool, tensors: Tensors, config: ModelConfig, tmp_path: Path) -> None:
    path = tmp_path / "hf"
    config.save_pretrained(path)
    named = {spell(name, "hf"): torch.from_numpy(array).to(torch.bfloat16) for name, array in tensors.items()}
    named["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    halves = [dict(list(named.items())[:10]), dict(list(named.items())[10:])] if sharded else [named]
    names = [f"pytorch_model-{i}.bin" for i in range(len(halves))] if sharded else ["pytorch_model.bin"]
    for name, half in zip(names, halves, strict=True):
        torch.save(half, path / name, _use_new_zipfile_serialization=not old_format)
    if sharded:
        weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = open_source(path)
    assert source.ignored == ("model.layers.0.self_attn.rotary_emb.inv_freq",)
    for name, array in tensors.items():
        np.testing.assert_array_equal(source.weights.read_slice(name, ()), array.astype(ml_dtypes.bfloat16))
    if sharded:
        (path / names[1]).unlink()
        with pytest.raises(Llama31Error, match=r"pytorch_model-1\.bin does not exist"):
            open_source(path)


class _Evil:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(zipped: bool, config: ModelConfig, tmp_path: Path) -> None:
    path = tmp_path / "hf"
    config.save_pretrained(path)
    content = {"lm_head.weight": _Evil(tmp_path / "executed")}
    if zipped:
        torch.save(content, path / "pytorch_model.bin")
    else:
        (path / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(Llama31Error, match=r"cannot be loaded as tensors alone: it asks .*which may run code"):
        open_source(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"PK\3\4" + bytes(100), b"what", b"\x80\x02}q\0."])
def test_damaged_pytorch_files_are_errors(content: bytes, config: ModelConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(Llama31Error):
        open_source(tmp_path)


def test_entries_that_are_no_tensors_are_errors(config: ModelConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    for content, message in (([1, 2], "holds a list"), ({"a": {"b": 1}}, "entry 'a' is a dict")):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(Llama31Error, match=message):
            open_source(tmp_path)
