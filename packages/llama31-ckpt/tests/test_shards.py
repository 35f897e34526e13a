"""Shard, merge and reshard: every byte survives any sequence of layouts; what does not fit together is one error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from llama31_ckpt.cli import main
from llama31_ckpt.convert import Options, convert
from llama31_ckpt.distribute import ShardOptions, distribute, distribute_rank
from llama31_ckpt.sources import open_source
from llama31_core.checkpoint import (
    describe_file,
    open_for_rank,
    open_weights,
    parameter_shapes,
    read_rank,
    save_weights,
)
from llama31_core.checkpoint.dtypes import Array
from llama31_core.checkpoint.sharded import open_sharded, rank_directories
from llama31_core.config import ModelConfig
from llama31_core.errors import CheckpointError, ConfigError
from llama31_core.parallel import ParallelConfig, plan_shards
from llama31_core.parallel.layout import TableLayout

SMALL = ModelConfig(vocab_size=48, dim=16, n_layers=4, n_heads=8, n_kv_heads=2, head_dim=2, ffn_dim=24, max_seq_len=64)
meshes = st.builds(
    ParallelConfig,
    dp=st.sampled_from([1, 2, 3]),
    cp=st.sampled_from([1, 2]),
    tp=st.sampled_from([1, 2, 4, 8]),
    pp=st.sampled_from([1, 2, 3, 4]),
    vocab_parallel=st.booleans(),
    shard_optimizer=st.booleans(),
).filter(lambda parallel: parallel.world_size <= 16)  # every file is synced to disk


def make_full(directory: Path, *, tied: bool = False, states: bool = True, config: ModelConfig = SMALL) -> ModelConfig:
    """A whole checkpoint of random bfloat16 weights with float32 moments and a step counter."""
    config = config.model_copy(update={"tie_word_embeddings": tied})
    rng = np.random.default_rng(3)
    tensors: dict[str, Array] = {}
    kinds = (("", ml_dtypes.bfloat16), ("adam_mean.", np.float32), ("adam_variance.", np.float32))
    for prefix, dtype in kinds if states else kinds[:1]:
        for name, shape in parameter_shapes(config).items():
            tensors[prefix + name] = rng.standard_normal(shape).astype(dtype)
    if states:
        tensors["global_step"] = np.array([1234], np.int32)
    config.save_pretrained(directory)
    save_weights(directory, tensors.items())
    return config


def spread(source: Path, destination: Path, config: ModelConfig, parallel: ParallelConfig, suffix: str) -> None:
    with closing(open_source(source)) as opened:
        distribute(opened, destination, TableLayout(config, parallel), ShardOptions(suffix, workers=2))


# Each example writes five checkpoints: shrinking a failure would take minutes.
@settings(max_examples=20, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(meshes, meshes, st.booleans(), st.sampled_from(["safetensors", "ckpt"]))
def test_any_two_layouts_and_back_keep_the_sha256(
    first: ParallelConfig, second: ParallelConfig, tied: bool, suffix: str
) -> None:
    with TemporaryDirectory() as scratch:
        path = Path(scratch)
        config = make_full(path / "full", tied=tied)
        spread(path / "full", path / "a", config, first, suffix)
        spread(path / "a", path / "b", config, second, "safetensors")
        assert len(rank_directories(path / "b")) == second.world_size
        # A direct way and one over another layout give the same ranks.
        spread(path / "full", path / "direct", config, second, "safetensors")
        for rank, directory in rank_directories(path / "direct").items():
            name = f"checkpoint_{rank}.safetensors"
            assert describe_file(directory / name) == describe_file(path / "b" / directory.name / name)
        with closing(open_source(path / "b")) as opened:
            convert(opened, path / "merged", Options(states=True))
        assert describe_file(path / "merged" / "model.safetensors") == describe_file(
            path / "full" / "model.safetensors"
        )


def test_a_rank_holds_what_the_table_says(tmp_path: Path) -> None:
    config = make_full(tmp_path / "full")
    parallel = ParallelConfig(dp=2, tp=4, pp=2, shard_optimizer=True)
    spread(tmp_path / "full", tmp_path / "ranks", config, parallel, "safetensors")
    with open_weights(tmp_path / "full") as full:
        for rank, directory in rank_directories(tmp_path / "ranks").items():
            shards = plan_shards(config, parallel, rank)
            with open_weights(directory) as own:
                assert set(own.names()) == set(shards)
                assert len(own.states) == 2 * len(shards) + 1
                for name, shard in shards.items():
                    np.testing.assert_array_equal(own.read(name), full.read_slice(name, shard.slices))
                    moment = full.read_slice(f"adam_mean.{name}", shard.optimizer_slices)
                    np.testing.assert_array_equal(own.read(f"adam_mean.{name}"), moment)


def test_bytes_that_a_rank_of_eight_reads(tmp_path: Path) -> None:
    config = ModelConfig(
        vocab_size=512, dim=128, n_layers=2, n_heads=16, n_kv_heads=8, head_dim=8, ffn_dim=256, max_seq_len=64
    )
    make_full(tmp_path / "full", states=False, config=config)
    parallel = ParallelConfig(tp=8)
    spread(tmp_path / "full", tmp_path / "ranks", config, parallel, "safetensors")
    sizes = {name: 2 * int(np.prod(shape)) for name, shape in parameter_shapes(config).items()}
    for rank in (0, 7):
        shards = plan_shards(config, parallel, rank)
        replicated = sum(sizes[name] for name, shard in shards.items() if shard.shape == shard.full_shape)
        split = sum(sizes.values()) - replicated
        slices = {name: shard.slices for name, shard in shards.items()}
        arrays = []
        for path in (tmp_path / "full", tmp_path / "ranks"):
            with open_for_rank(path, slices, rank=rank) as weights:
                arrays.append({name: weights.read_slice(name, part) for name, part in slices.items()})
                assert weights.bytes_read <= 1.05 / 8 * split + replicated
        assert all(arrays[0][name].tobytes() == arrays[1][name].tobytes() for name in slices)
    # Its own directory is all that a rank needs.
    for other in range(7):
        shutil.rmtree(tmp_path / "ranks" / f"rank_{other}")
    assert dict(read_rank(tmp_path / "ranks", slices, rank=7)).keys() == slices.keys()
    with pytest.raises(
        CheckpointError, match=r"lacks 7 of 8 ranks: rank_0, rank_1.* because rank_7 has not all of .*vocab_emb_dp"
    ):
        dict(read_rank(tmp_path / "ranks", dict.fromkeys(slices, ()), rank=7))


def test_a_rank_of_another_mesh_reads_just_its_slices(tmp_path: Path) -> None:
    config = make_full(tmp_path / "full", states=False)
    spread(tmp_path / "full", tmp_path / "ranks", config, ParallelConfig(tp=4, pp=2), "ckpt")
    slices = {name: shard.slices for name, shard in plan_shards(config, ParallelConfig(tp=2), 1).items()}
    needed = sum(2 * int(np.prod([part.stop - part.start for part in parts])) for parts in slices.values())
    with open_for_rank(tmp_path / "ranks", slices, rank=1) as weights, open_weights(tmp_path / "full") as full:
        for name, part in slices.items():
            assert weights.read_slice(name, part).tobytes() == full.read_slice(name, part).tobytes()
        assert weights.bytes_read == needed


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_full(tmp_path / "full")
    ranks, again, merged = tmp_path / "ranks", tmp_path / "again", tmp_path / "merged"
    mesh = ["--tp", "2", "--pp", "2", "--dp", "2", "--shard_optimizer"]
    assert main(["shard", "--input_path", f"{tmp_path}/full", "--output_path", str(ranks), *mesh]) == 0
    assert "8 ranks" in capsys.readouterr().out
    command = ["reshard", "--input_path", str(ranks), "--output_path", str(again), "--tp", "4", "--format", "ckpt"]
    assert main([*command, "--prefix", "llama_", "--workers", "2"]) == 0
    assert (again / "rank_3" / "llama_3.ckpt").is_file()
    assert main(["merge", "--input_path", str(again), "--output_path", str(merged)]) == 0
    assert describe_file(merged / "model.safetensors") == describe_file(tmp_path / "full" / "model.safetensors")
    assert main(["merge", "--weights_only", "--input_path", str(ranks), "--output_path", f"{tmp_path}/w.ckpt"]) == 0
    with open_weights(tmp_path / "w.ckpt") as reader:
        assert reader.states == ()
    # What works on a checkpoint of any format works on one over ranks.
    assert main(["diff", str(tmp_path / "full"), str(again)]) == 0
    assert main(["verify", str(ranks)]) == 0
    capsys.readouterr()
    assert main(["inspect", "--json", str(ranks)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layout"]["world_size"] == 8
    assert report["layout"]["mesh"]["tp"] == 2
    manifest = json.loads((ranks / "rank_7" / "manifest.json").read_text())["layout"]
    assert manifest["tensors"]["lm_head.weight"] == {"full_shape": [48, 16], "start": [24, 0], "shape": [24, 16]}
    moment = {"full_shape": [48, 16], "start": [36, 0], "shape": [12, 16]}  # split over dp as well
    assert manifest["tensors"]["adam_mean.lm_head.weight"] == moment


def test_verify_finds_a_changed_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_full(tmp_path / "full", states=False)
    spread(tmp_path / "full", tmp_path / "ranks", config, ParallelConfig(tp=2), "safetensors")
    file = tmp_path / "ranks" / "rank_1" / "checkpoint_1.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["verify", str(tmp_path / "ranks")]) == 1
    assert "rank_1: checkpoint_1.safetensors has another sha256" in capsys.readouterr().out


def test_one_rank_at_a_time_makes_the_same_checkpoint(tmp_path: Path) -> None:
    config = make_full(tmp_path / "full")
    layout = TableLayout(config, ParallelConfig(tp=2, pp=2))
    spread(tmp_path / "full", tmp_path / "ranks", config, layout.parallel, "ckpt")
    for rank in (3, 0, 1, 2):
        with closing(open_source(tmp_path / "full")) as source:
            distribute_rank(source, tmp_path / "alone", layout, rank, ShardOptions("ckpt"))
    for rank in range(4):
        files = [path / f"rank_{rank}" / f"checkpoint_{rank}.ckpt" for path in (tmp_path / "ranks", tmp_path / "alone")]
        assert describe_file(files[0]) == describe_file(files[1])
    with open_sharded(tmp_path / "alone") as weights, open_weights(tmp_path / "full") as full:
        assert weights.read("lm_head.weight").tobytes() == full.read("lm_head.weight").tobytes()
    with closing(open_source(tmp_path / "full")) as source, pytest.raises(ConfigError, match="rank is 4"):
        distribute_rank(source, tmp_path / "alone", layout, 4)


def _lose_a_rank(ranks: Path, other: Path) -> None:
    shutil.rmtree(ranks / "rank_2")


def _take_a_rank_of_another_checkpoint(ranks: Path, other: Path) -> None:
    shutil.rmtree(ranks / "rank_1")
    shutil.copytree(other / "rank_1", ranks / "rank_1")


def _rename_a_rank(ranks: Path, other: Path) -> None:
    (ranks / "rank_3").rename(ranks / "rank_4")


def _lose_a_manifest(ranks: Path, other: Path) -> None:
    (ranks / "rank_0" / "manifest.json").unlink()


def _truncate_a_file(ranks: Path, other: Path) -> None:
    file = ranks / "rank_2" / "checkpoint_2.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def _edit_layout(key: str, value: object) -> Callable[[Path, Path], None]:
    def edit(ranks: Path, other: Path) -> None:
        path = ranks / "rank_0" / "manifest.json"
        content = json.loads(path.read_text())
        content["layout"]["tensors"]["model.norm_out.weight"] = {
            "full_shape": [16],
            "start": [0],
            "shape": [16],
            key: value,
        }
        path.write_text(json.dumps(content))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_lose_a_rank, "lacks 1 of 4 ranks: rank_2"),
        (_take_a_rank_of_another_checkpoint, "do not mix them"),
        (_rename_a_rank, "was it renamed"),
        (_lose_a_manifest, "give the strategy"),
        (_truncate_a_file, "truncated or its header lies"),
        (_edit_layout("shape", [8]), "do not make up its shape"),
        (_edit_layout("start", [9]), "lies beyond its tensor"),
        (_edit_layout("shape", [-1]), "no list of sizes"),
        (_edit_layout("full_shape", [17]), "ranks say 'model.norm_out.weight' has shape"),
        (_edit_layout("full_shape", "16"), "no valid layout"),
    ],
)
def test_ranks_that_do_not_fit_together(
    damage: Callable[[Path, Path], None], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_full(tmp_path / "full", states=False)
    ranks, other = tmp_path / "ranks", tmp_path / "other"
    spread(tmp_path / "full", ranks, config, ParallelConfig(tp=2, pp=2), "safetensors")
    spread(tmp_path / "full", other, config, ParallelConfig(tp=4), "safetensors")
    damage(ranks, other)
    capsys.readouterr()
    assert main(["merge", "--input_path", str(ranks), "--output_path", str(tmp_path / "merged")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp", "3"], "tp=3 does not fit n_heads=8"),
        (["--pp", "5"], "has 4 layers; every stage needs one"),
        (["--dp", "0"], "dp: Input should be greater than or equal to 1"),
        (["--offset", "x"], "--offset is 'x'"),
        (["--dst_strategy", "nowhere", "--tp", "2"], "leave --dp"),
        (["--dst_strategy", "nowhere"], "nowhere cannot be read"),
        (["--prefix", "../up_"], "no plain file name"),
        (["--workers", "0"], "at least 1"),
        (["--output_path", "{}/full/ranks"], "lie in each other"),
        (["--output_path", "{}/taken"], "exists"),
        (["--input_path", "{}/none"], "does not exist"),
    ],
)
def test_bad_requests_leave_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_full(tmp_path / "full", states=False)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    command = ["shard", "--input_path", "{}/full", "--output_path", "{}/ranks", *arguments]
    assert main([part.format(tmp_path) for part in command]) == 1
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_commands_that_do_not_fit_the_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_full(tmp_path / "full", states=False)
    spread(tmp_path / "full", tmp_path / "ranks", config, ParallelConfig(tp=2), "safetensors")
    for command, source, message in (
        ("shard", "ranks", "use reshard or merge"),
        ("reshard", "full", "use shard or convert"),
        ("merge", "full", "use shard or convert"),
    ):
        assert main([command, "--input_path", f"{tmp_path}/{source}", "--output_path", f"{tmp_path}/out"]) == 1
        assert message in capsys.readouterr().err
