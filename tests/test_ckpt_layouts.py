"""Layouts against MindSpore's own checkpoint tools, its strategy files, and a trained model over ranks and back."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from transform_checkpoint import main as transform

from llama31_ckpt.cli import main
from llama31_core.checkpoint import describe_file, open_sharded, open_weights, parameter_shapes, save_weights
from llama31_core.checkpoint.dtypes import Array
from llama31_core.config import ModelConfig

CONFIG = ModelConfig(vocab_size=96, dim=32, n_layers=4, n_heads=8, n_kv_heads=2, head_dim=4, ffn_dim=48, max_seq_len=64)
MESHES = {
    "tp2_pp2": ["--tp", "2", "--pp", "2"],
    "dp2_tp2_pp2_zero1": ["--dp", "2", "--tp", "2", "--pp", "2", "--shard_optimizer"],
    "tp8_copied_heads": ["--tp", "8"],
    "tp4_pp4_whole_embedding": ["--tp", "4", "--pp", "4", "--vocab_emb_dp"],
    "cp2_tp2": ["--cp", "2", "--tp", "2"],
    "tp4": ["--tp", "4"],
}
PAIRS = [
    (None, "dp2_tp2_pp2_zero1"),
    ("tp2_pp2", None),
    ("tp2_pp2", "tp8_copied_heads"),
    ("tp8_copied_heads", "dp2_tp2_pp2_zero1"),
    ("dp2_tp2_pp2_zero1", "tp4_pp4_whole_embedding"),
    ("tp4_pp4_whole_embedding", "cp2_tp2"),
]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def layouts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`full`, and for each mesh our ranks, our strategy files, and these merged by MindSpore."""
    path = tmp_path_factory.mktemp("layouts")
    config = CONFIG.model_copy(update={"tie_word_embeddings": request.param})
    rng = np.random.default_rng(0)
    tensors: dict[str, Array] = {
        prefix + name: rng.standard_normal(shape).astype(np.float32)
        for prefix in ("", "adam_mean.", "adam_variance.")
        for name, shape in parameter_shapes(config).items()
    }
    tensors["global_step"] = np.array([7], np.int32)
    config.save_pretrained(path / "full" / "rank_0")
    save_weights(path / "full" / "rank_0" / "full.ckpt", tensors.items())
    for mesh, options in MESHES.items():
        source = ["--input_path", f"{path}/full/rank_0", "--format", "ckpt"]
        assert main(["shard", *source, "--output_path", f"{path}/{mesh}", *options]) == 0
        directory = f"{path}/strategies_{mesh}"
        assert main(["strategy", "--config", f"{path}/full/rank_0", "--output_path", directory, *options]) == 0
        ms.parallel.merge_pipeline_strategys(directory, f"{path}/{mesh}.ckpt")
    return path


def strategy(layouts: Path, mesh: str | None) -> str | None:
    return None if mesh is None else f"{layouts}/{mesh}.ckpt"


def load(directory: Path) -> dict[str, Array]:
    [file] = directory.glob("*.ckpt")
    parameters: Mapping[str, ms.Parameter] = ms.load_checkpoint(str(file))
    return {name: parameter.asnumpy() for name, parameter in parameters.items()}


def assert_same_ranks(one: Path, other: Path) -> None:
    ranks = sorted(path.name for path in one.glob("rank_*"))
    assert ranks == sorted(path.name for path in other.glob("rank_*"))
    for rank in ranks:
        a, b = load(one / rank), load(other / rank)
        assert set(a) == set(b), rank
        assert [name for name in a if not np.array_equal(a[name], b[name])] == [], rank


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_mindspore_s_tool_with_our_strategies_makes_our_ranks(
    layouts: Path, source: str | None, target: str | None, tmp_path: Path
) -> None:
    ms.transform_checkpoints(
        f"{layouts}/{source or 'full'}",
        str(tmp_path / "ms"),
        "checkpoint_",
        strategy(layouts, source),
        strategy(layouts, target),
    )
    assert_same_ranks(tmp_path / "ms", layouts / (target or "full"))
    # The old command makes them too, and reads what MindSpore wrote.
    for name, start, src, dst in (
        ("ours", layouts / (source or "full"), source, target),
        ("back", tmp_path / "ms", target, source),
    ):
        command = ["--src_checkpoint", str(start), "--dst_checkpoint_dir", str(tmp_path / name)]
        command += ["--src_strategy", str(strategy(layouts, src)), "--dst_strategy", str(strategy(layouts, dst))]
        assert transform(command) == 0
        assert_same_ranks(tmp_path / name, layouts / (dst or "full"))


def test_mindspore_s_tool_with_our_json_strategies(layouts: Path, tmp_path: Path) -> None:
    source, target = "dp2_tp2_pp2_zero1", "tp4"
    for mesh in (source, target):
        command = ["strategy", "--config", f"{layouts}/full/rank_0", "--format", "json"]
        assert main([*command, "--output_path", f"{tmp_path}/s_{mesh}", *MESHES[mesh]]) == 0
        ms.parallel.merge_pipeline_strategys(f"{tmp_path}/s_{mesh}", f"{tmp_path}/{mesh}.json")
    files = f"{tmp_path}/{source}.json", f"{tmp_path}/{target}.json"
    ms.transform_checkpoints(f"{layouts}/{source}", f"{tmp_path}/ms", "checkpoint_", *files)
    assert_same_ranks(tmp_path / "ms", layouts / target)
    # What MindSpore merged is read by ours.
    command = ["--src_checkpoint", f"{tmp_path}/ms", "--src_strategy", files[1], "--dst_strategy", files[0]]
    assert transform([*command, "--dst_checkpoint_dir", f"{tmp_path}/back"]) == 0
    assert_same_ranks(tmp_path / "back", layouts / source)


def test_one_rank_by_mindspore_from_the_ranks_that_it_says_it_needs(layouts: Path, tmp_path: Path) -> None:
    source, target = "dp2_tp2_pp2_zero1", "tp8_copied_heads"
    files = strategy(layouts, source), strategy(layouts, target)
    needed = ms.rank_list_for_transform(5, *files)
    paths = {rank: f"{layouts}/{source}/rank_{rank}/checkpoint_{rank}.ckpt" for rank in needed}
    (tmp_path / "rank_5").mkdir()
    ms.transform_checkpoint_by_rank(5, paths, f"{tmp_path}/rank_5/x5.ckpt", *files)
    a, b = load(tmp_path / "rank_5"), load(layouts / target / "rank_5")
    assert set(a) == set(b)
    assert [name for name in a if not np.array_equal(a[name], b[name])] == []


def test_mindspore_s_ranks_merge_with_our_command(layouts: Path, tmp_path: Path) -> None:
    mesh = "tp4_pp4_whole_embedding"
    ms.transform_checkpoints(f"{layouts}/full", f"{tmp_path}/ms", "llama_", None, strategy(layouts, mesh))
    command = ["merge", "--input_path", f"{tmp_path}/ms", "--config", f"{layouts}/full/rank_0"]
    for name, files in (("merged", f"{layouts}/{mesh}.ckpt"), ("stages", f"{layouts}/strategies_{mesh}")):
        assert main([*command, "--output_path", f"{tmp_path}/{name}.ckpt", "--src_strategy", files]) == 0
        assert (
            describe_file(tmp_path / f"{name}.ckpt").sha256 == describe_file(layouts / "full/rank_0/full.ckpt").sha256
        )


def test_the_old_command_shared_out_over_processes(layouts: Path, tmp_path: Path) -> None:
    command = ["--src_checkpoint", f"{layouts}/tp2_pp2", "--dst_checkpoint_dir", f"{tmp_path}/ranks"]
    command += ["--dst_strategy", f"{layouts}/tp8_copied_heads.ckpt", "--prefix", "llama_"]
    share = ["--world_size", "8", "--transform_process_num", "2"]
    assert transform([*command, *share, "--rank_id", "4"]) == 0
    assert sorted(path.name for path in (tmp_path / "ranks").iterdir()) == [f"rank_{rank}" for rank in range(4, 8)]
    assert transform([*command, *share, "--rank_id", "0"]) == 0
    assert (tmp_path / "ranks" / "rank_3" / "llama_3.ckpt").is_file()
    assert_same_ranks(tmp_path / "ranks", layouts / "tp8_copied_heads")
    with open_sharded(tmp_path / "ranks") as weights, open_weights(layouts / "full" / "rank_0") as full:
        assert all(np.array_equal(weights.read(name), full.read(name)) for name in full.names())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("cp2_tp2", "tensors that the layout gives it"),  # no stages: rank 0 should have all layers
        ("tp4", "tensors that the layout gives it"),
        ("pp4", "gives to other pipeline stages"),
    ],
)
def test_the_strategy_of_another_layout_is_an_error(
    layouts: Path, wrong: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(layouts / "tp2_pp2", tmp_path / "ranks")
    for manifest in (tmp_path / "ranks").glob("rank_*/manifest.json"):
        manifest.unlink()  # MindSpore writes none
    mesh = {"pp4": ["--pp", "4"], **MESHES}[wrong]
    files = ["strategy", "--config", f"{layouts}/full/rank_0", "--output_path", f"{tmp_path}/strategies"]
    assert main([*files, *mesh]) == 0
    command = ["--src_checkpoint", f"{tmp_path}/ranks", "--src_strategy", f"{tmp_path}/strategies"]
    assert transform([*command, "--dst_checkpoint_dir", f"{tmp_path}/out"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world_size", "4"], "world_size is 4, dst_strategy describes 8 ranks"),
        (["--transform_process_num", "3"], "must divide the 8 ranks"),
        (["--transform_process_num", "2", "--rank_id", "1"], "have 0, 4"),
        (["--src_strategy", "{}/cp2_tp2.ckpt"], "tensors that the layout gives it"),
        (["--src_checkpoint", "{}/cp2_tp2", "--src_strategy", "{}/tp4.ckpt"], "manifest that says otherwise"),
        (["--src_strategy", "{}/dp2_tp2_pp2_zero1.ckpt"], "lacks 4 of 8 ranks"),
        (["--src_strategy", "{}/full/rank_0/config.json"], "no MindSpore strategy file"),
        (["--src_checkpoint", "{}/none"], "does not exist"),
    ],
)
def test_the_old_command_with_what_does_not_fit(
    layouts: Path, arguments: Sequence[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--src_checkpoint", "{}/tp2_pp2", "--dst_strategy", "{}/tp8_copied_heads.ckpt", *arguments]
    command += ["--dst_checkpoint_dir", f"{tmp_path}/out"]
    assert transform([part.format(layouts) for part in command]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("by_rank", [(), ("--transform_by_rank", "True")], ids=["at_once", "by_rank"])
def test_the_old_command_told_to_end_clears_up(
    by_rank: Sequence[str], layouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama31_ckpt.distribute.write_manifest", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    command = ["--src_checkpoint", f"{layouts}/tp2_pp2", "--dst_strategy", f"{layouts}/tp4.ckpt", *by_rank]
    assert transform([*command, "--dst_checkpoint_dir", f"{tmp_path}/out"]) == 130
    assert list(tmp_path.rglob("*")) == []


def test_smollm2_over_ranks_and_back_keeps_its_sha256(smollm2_dir: Path, tmp_path: Path) -> None:
    """Its 9 heads (3 of keys and values) do not divide by 2, so tp is 3."""
    whole = describe_file(smollm2_dir / "model.safetensors")
    assert main(["shard", "--input_path", str(smollm2_dir), "--output_path", f"{tmp_path}/x", "--tp", "2"]) == 1
    mesh = ["--tp", "3", "--pp", "2"]
    assert main(["shard", "--input_path", str(smollm2_dir), "--output_path", f"{tmp_path}/a", *mesh]) == 0
    command = ["reshard", "--input_path", f"{tmp_path}/a", "--output_path", f"{tmp_path}/b", "--format", "ckpt"]
    assert main([*command, "--tp", "9", "--vocab_emb_dp"]) == 1  # 49152 rows, 1536 inner columns: 9 does not divide
    assert main([*command, "--pp", "3"]) == 0
    for source in ("a", "b"):
        target = tmp_path / f"{source}_merged"
        assert main(["merge", "--input_path", f"{tmp_path}/{source}", "--output_path", str(target)]) == 0
        assert describe_file(target / "model.safetensors") == whole
        assert (target / "tokenizer.json").read_bytes() == (smollm2_dir / "tokenizer.json").read_bytes()
        shutil.rmtree(target)
