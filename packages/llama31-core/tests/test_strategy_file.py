"""Strategy files: what is written reads back as the layout table, whatever the mesh; damaged files are one error."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

from llama31_core.checkpoint.shapes import parameter_shapes
from llama31_core.config import ModelConfig
from llama31_core.errors import CheckpointError, ConfigError
from llama31_core.parallel.layout import TableLayout, plan_shards
from llama31_core.parallel.mesh import ParallelConfig
from llama31_core.parallel.strategy_file import build_strategy, load_strategy, save_strategy_files

SMALL = ModelConfig(vocab_size=96, dim=32, n_layers=5, n_heads=8, n_kv_heads=2, head_dim=4, ffn_dim=48, max_seq_len=64)

meshes = st.builds(
    ParallelConfig,
    dp=st.sampled_from([1, 2, 3]),
    cp=st.sampled_from([1, 2]),
    tp=st.sampled_from([1, 2, 4, 8]),
    pp=st.integers(1, 5),
    vocab_parallel=st.booleans(),
    shard_optimizer=st.booleans(),
)


def can_be_said(config: ModelConfig, parallel: ParallelConfig) -> bool:
    """Moments split over dp on top of tp, between ranks that hold copies, are the one thing such files cannot say."""
    shards = [shard for rank in range(parallel.world_size) for shard in plan_shards(config, parallel, rank).values()]
    return not any(
        shard.optimizer_slices != shard.slices and shard.parts[0] > 1 and (parallel.cp > 1 or shard.copies > 1)
        for shard in shards
    )


@settings(max_examples=50, deadline=None)
@given(meshes, st.booleans(), st.sampled_from([".ckpt", ".json"]))
def test_files_read_back_as_the_layout_table(parallel: ParallelConfig, tied: bool, suffix: str) -> None:
    config = SMALL.model_copy(update={"tie_word_embeddings": tied})
    with TemporaryDirectory() as scratch:
        if not can_be_said(config, parallel):
            with pytest.raises(ConfigError, match="leave shard_optimizer out"):
                save_strategy_files(Path(scratch), config, parallel, suffix=suffix)
            assert list(Path(scratch).iterdir()) == []
            return
        assert len(save_strategy_files(Path(scratch), config, parallel, suffix=suffix)) == parallel.pp
        layout, table = load_strategy(Path(scratch)), TableLayout(config, parallel)
    assert layout.world_size == table.world_size
    for name, shape in parameter_shapes(config).items():
        for full_name in (name, f"adam_mean.{name}"):
            for rank in range(table.world_size):
                place = layout.place(full_name, shape, rank)
                assert place == table.place(full_name, shape, rank), (full_name, rank)
                if place is not None:
                    assert layout.full_shape(full_name, tuple(part.stop - part.start for part in place)) == shape
    assert layout.place("global_step", (1,), 0) == (slice(0, 1),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a JSON list"),
        ("{}", "empty one"),
        ('{"parallel_layout_item": []}', "no JSON objects"),
        ('{"parallel_layout_item": {"a": 1}}', "must have dev_matrix"),
        ('{"parallel_layout_item": {"a": {"dev_matrix": [2], "tensor_map": [true]}}}', "lists of whole numbers"),
        ('{"parallel_layout_item": {"a": {"dev_matrix": 2, "tensor_map": [0]}}}', "lists of whole numbers"),
        ('{"parallel_layout_item": {"a": {"dev_matrix": [2], "tensor_map": [1]}}}', "do not fit"),
    ],
)
def test_json_that_is_no_strategy(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "strategy.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_strategy(tmp_path / "strategy.json")


def test_json_with_an_axis_split_by_two_of_the_matrix(tmp_path: Path) -> None:
    layout = '{"dev_matrix": [2, 3], "tensor_map": [[0, 1], [-1]]}'
    (tmp_path / "strategy.json").write_text(f'{{"parallel_layout_item": {{"a": {layout}}}}}')
    assert load_strategy(tmp_path / "strategy.json").place("a", (12, 5), 1) == (slice(4, 6), slice(0, 5))


def test_moments_that_a_file_does_not_name_are_not_taken_for_loop_state(tmp_path: Path) -> None:
    path = tmp_path / "strategy.ckpt"
    path.write_bytes(strategy({"a": ([2], [[0]], 0, 0)}))
    with pytest.raises(ConfigError, match=r"does not say how adam_mean\.a is split"):
        load_strategy(path).place("adam_mean.a", (4,), 0)


def test_existing_files_stay(tmp_path: Path) -> None:
    save_strategy_files(tmp_path, SMALL, ParallelConfig(tp=2))
    with pytest.raises(CheckpointError, match="exists"):
        save_strategy_files(tmp_path, SMALL, ParallelConfig(tp=2))
    save_strategy_files(tmp_path, SMALL, ParallelConfig(tp=4), overwrite=True)
    assert load_strategy(tmp_path).world_size == 4


def test_a_file_for_each_rank_is_a_file_for_its_stage(tmp_path: Path) -> None:
    parallel = ParallelConfig(tp=2, pp=2)
    for rank in range(4):
        content = build_strategy(SMALL, parallel, parallel.coordinates(rank).pp)
        (tmp_path / f"ckpt_strategy_rank_{rank}.ckpt").write_bytes(content)
    assert load_strategy(tmp_path).world_size == 4


def strategy(layouts: Mapping[str, tuple[list[int], list[list[int]], int, int]]) -> bytes:
    """A file with these device matrices, tensor maps and optimiser shards."""
    result = ParallelStrategyMap(current_stage=0)
    for name, (matrix, maps, step, size) in layouts.items():
        item = result.parallel_layout_item.add(param_name=name)
        item.parallel_layouts.dev_matrix.add(dim=matrix)
        for entry in maps:
            item.parallel_layouts.tensor_map.add(dim=entry)
        item.parallel_layouts.field = 0
        item.parallel_layouts.opt_weight_shard_step = step
        item.parallel_layouts.opt_weight_shard_size = size
    content: bytes = result.SerializeToString()
    return content


def test_an_axis_split_by_two_axes_of_the_matrix_and_all_repeats_as_optimizer_shards(tmp_path: Path) -> None:
    path = tmp_path / "strategy.ckpt"
    path.write_bytes(strategy({"a": ([2, 3], [[0, 1], [-1]], 0, 0), "b": ([3, 2], [[0, -1]], 2, -1)}))
    layout = load_strategy(path)
    # "a": the inner axis of the matrix splits outermost; "b": tp ranks next to each other, then three optimiser shards.
    assert [layout.place("a", (12, 5), rank) for rank in (0, 1, 3)] == [
        (slice(0, 2), slice(0, 5)),
        (slice(4, 6), slice(0, 5)),
        (slice(2, 4), slice(0, 5)),
    ]
    starts = [(layout.place("b", (12, 5), rank) or (slice(0),))[0].start for rank in range(6)]
    assert starts == [0, 6, 2, 8, 4, 10]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty one"),
        (b"\xff" * 40, "no MindSpore strategy file"),
        (strategy({"1-a": ([2], [[0]], 0, 0)}), r"stages \[1\]; files of other stages are missing"),
        (strategy({"a": ([2], [[1]], 0, 0)}), "do not fit"),
        (strategy({"a": ([0], [[0]], 0, 0)}), "do not fit"),
        (strategy({"a": ([2**31 - 1, 2], [[0]], 0, 0)}), "do not fit"),
        (strategy({"a": ([2], [[0]], 1, 7)}), "optimizer shards of step 1 and size 7"),
        (strategy({"a": ([2], [[0]], 0, 0), "b": ([4], [[0]], 0, 0)}), r"stages of \[2, 4\] ranks"),
    ],
)
def test_damaged_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "strategy.ckpt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_strategy(path)


def test_files_that_are_not_there_or_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_strategy(tmp_path / "none.ckpt")
    with pytest.raises(ConfigError, match="holds no strategy files"):
        load_strategy(tmp_path)
    for tp in (2, 4):
        (tmp_path / f"{tp}.ckpt").write_bytes(build_strategy(SMALL, ParallelConfig(tp=tp), 0))
    with pytest.raises(ConfigError, match="describes stage 0 otherwise"):
        load_strategy(tmp_path)


def test_tensors_that_a_layout_does_not_know_or_cannot_split(tmp_path: Path) -> None:
    save_strategy_files(tmp_path, SMALL, ParallelConfig(tp=8))
    layout, table = load_strategy(tmp_path), TableLayout(SMALL, ParallelConfig(tp=8))
    with pytest.raises(ConfigError, match=r"does not say how model\.x is split"):
        layout.place("model.x", (8, 8), 0)
    with pytest.raises(ConfigError, match=r"has no row for adam_mean\.model\.x"):
        table.place("adam_mean.model.x", (8, 8), 0)
    name = "model.layers.0.feed_forward.w1.weight"
    with pytest.raises(ConfigError, match="in \\(8, 1\\) parts, its shape is \\(12, 32\\)"):
        layout.place(name, (12, 32), 0)
    with pytest.raises(ConfigError, match="its config says \\(48, 32\\)"):
        table.place(name, (12, 32), 0)
    assert math.prod(layout.full_shape(name, (6, 32))) == 48 * 32


def test_without_mindspore_the_json_form_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mindspore.train", None)  # what an import then raises: ModuleNotFoundError
    parallel = ParallelConfig(tp=2)
    with pytest.raises(ConfigError, match=r"needs MindSpore .*; install mindspore, or use the JSON form"):
        save_strategy_files(tmp_path, SMALL, parallel)
    assert list(tmp_path.iterdir()) == []
    (path,) = save_strategy_files(tmp_path, SMALL, parallel, suffix=".json")
    assert load_strategy(path).world_size == 2
