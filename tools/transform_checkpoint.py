"""MindFormers' `transform_checkpoint.py` under its old flags: a checkpoint of one parallel layout in, of another out.

    transform_checkpoint.py --src_checkpoint SRC --src_strategy A.ckpt --dst_checkpoint_dir DST --dst_strategy B.ckpt

A strategy is a file, or a directory with one for each stage or rank; without one the checkpoint is whole. The result
is `DST/rank_N/<prefix>N.ckpt`. `llama31-ckpt shard`, `merge` and `reshard` do the same from a mesh, without strategies.

To share the work out, start the script `transform_process_num` times with `--world_size` and the `--rank_id` of every
`world_size / transform_process_num`-th rank, as `transform_checkpoint.sh` does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from llama31_ckpt.distribute import ShardOptions, distribute, distribute_rank
from llama31_ckpt.interrupts import ended_like_ctrl_c
from llama31_ckpt.shard_commands import report
from llama31_ckpt.sources import open_source
from llama31_core.checkpoint import MANIFEST_NAME
from llama31_core.checkpoint.sharded import rank_directories
from llama31_core.errors import ConfigError, Llama31Error
from llama31_core.parallel.layout import Layout, WholeLayout
from llama31_core.parallel.strategy_file import StrategyLayout, load_strategy


def _as_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def _as_strategy(text: str) -> Path | None:
    return None if text in ("", "None") else Path(text)  # scripts pass the word where there is none


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="transform_checkpoint.py", description="Convert a checkpoint from one parallel layout to another."
    )
    parser.add_argument(
        "--src_checkpoint", type=Path, required=True, help="directory of rank_N directories, or a whole checkpoint"
    )
    parser.add_argument("--dst_checkpoint_dir", type=Path, required=True, help="where rank_N directories are made")
    parser.add_argument("--src_strategy", type=_as_strategy, help="strategy file(s) of the source; None: it is whole")
    parser.add_argument("--dst_strategy", type=_as_strategy, help="strategy file(s) wanted; None: whole")
    parser.add_argument("--prefix", default="checkpoint_", help="a file is rank_N/<prefix>N.ckpt")
    parser.add_argument("--rank_id", type=int, default=0, help="the first rank this process writes, if several do")
    parser.add_argument("--world_size", type=int, help="ranks of the destination, to be checked")
    parser.add_argument("--transform_process_num", type=int, default=1, help="processes that share the ranks out")
    parser.add_argument(
        "--transform_by_rank", type=_as_bool, nargs="?", const=True, default=False, help="finish rank after rank"
    )
    return parser


def _source_layout(path: Path, strategy: Path | None) -> Layout | None:
    """None where our manifests say it, or where the source is no directory of ranks."""
    if strategy is not None:
        return load_strategy(strategy)
    ranks = rank_directories(path)
    return WholeLayout() if ranks and not all((path / MANIFEST_NAME).is_file() for path in ranks.values()) else None


def own_ranks(world_size: int, rank_id: int, process_num: int) -> range:
    """The ranks that the process with `rank_id` writes.

    Raises:
        ConfigError: the processes do not share the ranks out evenly, or the rank is none of them.
    """
    if process_num < 1 or world_size % process_num:
        raise ConfigError(f"transform_process_num is {process_num}, it must divide the {world_size} ranks")
    share = world_size // process_num
    if not 0 <= rank_id < world_size or rank_id % share:
        allowed = ", ".join(str(rank) for rank in range(0, world_size, share))
        raise ConfigError(f"rank_id is {rank_id}; {process_num} processes over {world_size} ranks have {allowed}")
    return range(rank_id, rank_id + share)


def run(arguments: argparse.Namespace) -> None:
    """Do the conversion, or this process's share of it.

    Raises:
        Llama31Error: what does not fit; see `distribute`.
    """
    target: Layout = WholeLayout() if arguments.dst_strategy is None else load_strategy(arguments.dst_strategy)
    if arguments.world_size is not None and arguments.world_size != target.world_size:
        raise ConfigError(f"world_size is {arguments.world_size}, dst_strategy describes {target.world_size} ranks")
    ranks = own_ranks(target.world_size, arguments.rank_id, arguments.transform_process_num)
    qkv_concat = isinstance(target, StrategyLayout) and target.qkv_concat
    options = ShardOptions("ckpt", arguments.prefix, qkv_concat=qkv_concat)
    layout = _source_layout(arguments.src_checkpoint, arguments.src_strategy)
    with closing(open_source(arguments.src_checkpoint, layout=layout)) as source:
        if len(ranks) == target.world_size and not arguments.transform_by_rank:
            report(distribute(source, arguments.dst_checkpoint_dir, target, options), f"{target.world_size} ranks")
            return
        for rank in ranks:
            report(distribute_rank(source, arguments.dst_checkpoint_dir, target, rank, options), "1 rank")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the conversion and return its exit code: 0, 1 for an error, 130 if interrupted."""
    arguments = build_parser().parse_args(argv)
    try:
        with ended_like_ctrl_c():
            run(arguments)
    except Llama31Error as error:
        print(f"transform_checkpoint.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("transform_checkpoint.py: error: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
