"""The layout table: shards tile every parameter exactly once, for any mesh, up to 405B on 512 ranks."""

from __future__ import annotations

from collections import defaultdict
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama31_core.checkpoint.shapes import parameter_shapes
from llama31_core.config import ModelConfig
from llama31_core.errors import ConfigError
from llama31_core.parallel.layout import LAYOUT, Slices, describe, plan_shards, split_axes
from llama31_core.parallel.mesh import AXES, ParallelConfig
from llama31_core.parallel.mindspore_layout import mindspore_layout

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


def covers_once(shape: tuple[int, ...], pieces: list[Slices]) -> bool:
    """Whether pieces of a grid cover it and do not overlap: their sizes add up, and no two meet."""
    if sum(prod(part.stop - part.start for part in piece) for piece in pieces) != prod(shape):
        return False
    boxes = [[(part.start, part.stop) for part in piece] for piece in pieces]
    return not any(
        all(a[0] < b[1] and b[0] < a[1] for a, b in zip(one, other, strict=True))
        for i, one in enumerate(boxes)
        for other in boxes[:i]
    )


def check_tiling(config: ModelConfig, parallel: ParallelConfig) -> None:
    parts: dict[str, set[tuple[tuple[int, int], ...]]] = defaultdict(set)
    owners: dict[tuple[str, tuple[tuple[int, int], ...]], set[int]] = defaultdict(set)
    states: dict[str, set[tuple[tuple[int, int], ...]]] = defaultdict(set)
    for rank in range(parallel.world_size):
        at = parallel.coordinates(rank)
        for name, shard in plan_shards(config, parallel, rank).items():
            box = tuple((part.start, part.stop) for part in shard.slices)
            parts[name].add(box)
            if (at.dp, at.cp) == (0, 0):
                owners[name, box].add(at.tp)
                assert len(owners[name, box]) <= max(shard.copies, parallel.tp if prod(shard.parts) == 1 else 1)
            states[name].add(tuple((part.start, part.stop) for part in shard.optimizer_slices))
    shapes = parameter_shapes(config)
    assert set(parts) == set(shapes)
    for name, shape in shapes.items():
        for pieces in (parts[name], states[name]):
            assert covers_once(shape, [tuple(slice(*bounds) for bounds in box) for box in pieces]), name


def check_shapes(config: ModelConfig, parallel: ParallelConfig) -> None:
    """Equal parts on every rank, of whole heads."""
    for rank in range(parallel.world_size):
        shapes = {name: shard.shape for name, shard in plan_shards(config, parallel, rank).items()}
        for kind, axis, width in (("attention.wq", 0, config.dim), ("feed_forward.w2", 1, config.ffn_dim)):
            assert {shape[axis] for name, shape in shapes.items() if kind in name} == {width // parallel.tp}
        heads = {shape[0] // config.head_dim for name, shape in shapes.items() if "attention.wk" in name}
        assert heads == {max(1, config.n_kv_heads // parallel.tp)}


@settings(max_examples=150, deadline=None)
@given(meshes, st.booleans())
def test_shards_and_optimizer_state_tile_every_parameter(parallel: ParallelConfig, tied: bool) -> None:
    check_tiling(SMALL.model_copy(update={"tie_word_embeddings": tied}), parallel)


def test_405b_over_512_ranks_tiles() -> None:
    config = ModelConfig.preset("llama3.1-405b")
    parallel = ParallelConfig(dp=4, tp=8, pp=16, shard_optimizer=True)
    assert parallel.world_size == 512
    check_tiling(config, parallel)
    check_shapes(config, parallel)
    biggest = max(
        sum(prod(shard.shape) for shard in plan_shards(config, parallel, rank).values()) for rank in range(512)
    )
    assert biggest < 1.1 * config.num_parameters / (8 * 16)  # the ends have embedding or head, the rest is even


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("llama3.1-8b", ParallelConfig(dp=8, shard_optimizer=True)),
        ("llama3.1-8b", ParallelConfig(dp=2, cp=2, tp=2, sequence_parallel=True)),
        ("llama3.1-70b", ParallelConfig(tp=8, pp=8, sequence_parallel=True)),
        ("llama3.1-70b", ParallelConfig(dp=2, tp=16, pp=2, shard_optimizer=True, vocab_parallel=False)),
    ],
)
def test_published_sizes_tile(name: str, parallel: ParallelConfig) -> None:
    config = ModelConfig.preset(name)
    check_tiling(config, parallel)
    check_shapes(config, parallel)


@settings(max_examples=100, deadline=None)
@given(meshes)
def test_ranks_coordinates_and_groups_agree(parallel: ParallelConfig) -> None:
    for rank in range(parallel.world_size):
        at = parallel.coordinates(rank)
        assert parallel.rank(at) == rank
        for axis in AXES:
            group = parallel.group(axis, rank)
            assert group[getattr(at, axis)] == rank
            assert group == parallel.group(axis, group[0])
            assert len(set(group)) == getattr(parallel, axis)


def test_key_value_heads_are_whole_and_copied_beyond_their_number() -> None:
    parallel = ParallelConfig(tp=8)
    name = "model.layers.0.attention.wk.weight"
    shards = [plan_shards(SMALL, parallel, rank)[name] for rank in range(8)]
    assert [shard.slices[0] for shard in shards] == [slice(0, 4)] * 4 + [slice(4, 8)] * 4
    assert {shard.copies for shard in shards} == {4}


def test_every_parameter_has_a_row_of_its_width() -> None:
    for name, shape in parameter_shapes(SMALL).items():
        assert len(split_axes(name)) == len(shape)
    assert len(LAYOUT) == 12


def test_stages_follow_the_offset() -> None:
    parallel = ParallelConfig(pp=2, offset=(-1, 2))
    assert parallel.stage_layers(SMALL) == [(0,), (1, 2, 3, 4)]
    assert ParallelConfig(pp=2).stage_layers(SMALL) == [(0, 1, 2), (3, 4)]


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (ParallelConfig(tp=3), r"tp=3 does not fit n_heads=8.*nearest that do are \[1, 2, 4\]"),
        (ParallelConfig(tp=16), r"tp=16 does not fit"),
        (ParallelConfig(pp=6), r"pp=6 x interleave=1 makes 6 parts, the model has \d layers; every stage needs one"),
        (ParallelConfig(pp=2, offset=(0, 0)), r"offset must sum up to 1"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(parallel: ParallelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_shards(SMALL, parallel, 0)


def test_the_number_of_ranks_must_fit() -> None:
    with pytest.raises(ConfigError, match="is 4 ranks, 8 are there"):
        ParallelConfig(dp=2, tp=2).check(SMALL, world_size=8)
    with pytest.raises(ConfigError, match="rank is 4, allowed is 0 to 3"):
        ParallelConfig(dp=2, tp=2).coordinates(4)


def test_describe_shows_what_a_rank_holds() -> None:
    text = describe(ModelConfig.preset("llama3.1-70b"), ParallelConfig(tp=16, pp=8))
    assert "128 ranks" in text
    assert "128 x 8192" in text
    assert "(2 copies)" in text
    assert "70-79" in text
    assert "hidden dp, cp, -" in text
    assert "hidden dp, cp and tp, -" in describe(SMALL, ParallelConfig(tp=2, sequence_parallel=True))


def test_layouts_are_mindspores_too() -> None:
    parallel = ParallelConfig(dp=2, tp=4, pp=2, sequence_parallel=True)
    split = {
        "model.layers.0.attention.wq.weight": ((1, 0), -1),
        "model.layers.0.attention.wk.weight": (1, -1),
        "model.layers.0.feed_forward.w2.weight": (-1, (1, 0)),
        "model.norm_out.weight": (-1,),
        "hidden": (3, (2, 1, 0), -1),
        "key_value": (3, 2, 1, -1),
    }
    for name, tensor_map in split.items():
        layout = mindspore_layout(name, SMALL, parallel, stage=1).to_dict()
        assert layout["device_matrix"] == (2, 1, 2, 2)
        assert layout["tensor_map"] == tensor_map, name
        assert layout["rank_list"] == list(range(8, 16))
