"""A model over the processes of a launcher: rank 0 serves, the others compute what it says."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from llama31_core import Engine
from llama31_core.inference.engine_plan import EnginePlan
from llama31_core.parallel.launch import find_rank
from llama31_core.parallel.mesh import ParallelConfig
from llama31_serve.server.core_engine import CoreEngine

SOURCE = "--tensor_parallel"


def is_leader(tensor_parallel: int) -> bool:
    """Whether this process is the one that serves.

    Raises:
        ConfigError: no launcher started it, or not as many processes.
    """
    if os.environ.get("MS_ROLE") == "MS_SCHED":  # it only brings the ranks together
        return False
    return find_rank(ParallelConfig(tp=tensor_parallel), SOURCE) == 0


def follow(plan: EnginePlan, weights: Path, tensor_parallel: int) -> None:
    """Be another rank until rank 0 says farewell, or is gone. It drains: a signal to stop is its affair alone."""
    from llama31_core.inference.parallel_runner import Follower, join

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    joined = join(plan, ParallelConfig(tp=tensor_parallel), weights, SOURCE)
    assert isinstance(joined, Follower)
    joined.follow()


def load_leading_engine(
    plan: EnginePlan, weights: Path, tensor_parallel: int, on_lost: Callable[[str], None]
) -> CoreEngine:
    """The engine of rank 0. `on_lost(problem)` is called, in another thread, when a rank has ended: the engine is no
    more, and a step that runs may never come to its end."""
    from llama31_core.inference.parallel_runner import LeadingRunner, join

    joined = join(plan, ParallelConfig(tp=tensor_parallel), weights, SOURCE, lambda rank: on_lost(f"{rank} has ended"))
    assert isinstance(joined, LeadingRunner)
    return CoreEngine(Engine(plan.config, joined, plan.options), joined.close)
