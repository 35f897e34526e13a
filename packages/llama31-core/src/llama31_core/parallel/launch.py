"""A process becomes a rank: what msrun put into the environment in, a joined mesh out."""

from __future__ import annotations

import os
import re

from llama31_core.errors import ConfigError
from llama31_core.parallel.mesh import ParallelConfig


def find_rank(parallel: ParallelConfig, source: str) -> int:
    """This process's rank among those that a launcher started, before anything is loaded.

    Raises:
        ConfigError: no launcher started it, or another number of ranks than the mesh has.
    """
    there, rank = os.environ.get("MS_WORKER_NUM"), os.environ.get("RANK_ID")
    if there is None or rank is None:
        raise ConfigError(
            f"{source}: use_parallel makes {parallel.world_size} ranks, and no launcher started this one; start it "
            f'with tools/msrun_launcher.sh "llama31-core …" {parallel.world_size}, or set use_parallel=False'
        )
    if int(there) != parallel.world_size:
        rest = parallel.world_size // parallel.dp
        fits = f"; with the other sizes as they are, data_parallel={int(there) // rest} would fit"
        raise ConfigError(
            f"{source}: parallel_config makes {parallel.world_size} ranks (data_parallel={parallel.dp} x "
            f"model_parallel={parallel.tp} x pipeline_stage={parallel.pp} x context_parallel={parallel.cp}), "
            f"{there} were started{fits if int(there) % rest == 0 else ''}"
        )
    return int(rank)


def join_mesh() -> None:
    """Meet the other ranks; returns when all are there.

    Raises:
        ConfigError: they did not come, or the port is not to be had; on the scheduler also that a rank is gone.
    """
    import mindspore as ms
    from mindspore.communication import init

    ms.set_context(mode=ms.GRAPH_MODE)
    is_cpu = ms.get_context("device_target") == "CPU"
    os.environ.setdefault("MS_CPU_COMM_OP_TIMEOUT", "1800")  # seconds; else a rank that compiles is given up after 30
    try:
        init("mccl" if is_cpu else "hccl")
    except RuntimeError as error:
        gone = re.search(r"worker (\d+) is the first one timed out", str(error))
        if gone:
            raise ConfigError(
                f"rank {gone[1]} was not heard of for too long; its log, worker_{gone[1]}.log on its node, says why"
            ) from error
        place = f"{os.environ.get('MS_SCHED_HOST')}:{os.environ.get('MS_SCHED_PORT')}"
        told = [line for line in str(error).splitlines() if line.strip() and not line.startswith("-")]
        raise ConfigError(
            f"the ranks did not meet at {place} ({told[0].strip() if told else 'no reason given'}); see that all were "
            "started and that the port is free, and look at scheduler.log"
        ) from error
    if os.environ.get("MS_ROLE") == "MS_SCHED":  # it only brings the ranks together
        raise SystemExit(0)
