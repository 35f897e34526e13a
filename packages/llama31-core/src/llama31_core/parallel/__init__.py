"""How a model is spread over devices: the mesh, and one table that says which parameter is split where. Pure Python."""

from llama31_core.parallel.layout import ParameterShard, plan_shards
from llama31_core.parallel.mesh import Coordinates, ParallelConfig

__all__ = ["Coordinates", "ParallelConfig", "ParameterShard", "plan_shards"]
