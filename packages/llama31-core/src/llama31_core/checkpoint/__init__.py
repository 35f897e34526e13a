"""Checkpoints on disk: the name table, shapes, reading (whole or in part) and writing. Imports without MindSpore."""

from llama31_core.checkpoint.dtypes import DType, cast, dtype_of
from llama31_core.checkpoint.manifest import MANIFEST_NAME, describe_file, read_manifest, write_manifest
from llama31_core.checkpoint.names import NAME_TABLE, canonical_name, rotary_heads, spell
from llama31_core.checkpoint.reader import Weights, WeightsReader, open_weights
from llama31_core.checkpoint.shapes import check_weights, parameter_shapes
from llama31_core.checkpoint.sharded import ShardedWeights, open_for_rank, open_sharded, read_rank
from llama31_core.checkpoint.staging import staged_directory, staged_file
from llama31_core.checkpoint.writer import WrittenFile, save_weights

__all__ = [
    "MANIFEST_NAME",
    "NAME_TABLE",
    "DType",
    "ShardedWeights",
    "Weights",
    "WeightsReader",
    "WrittenFile",
    "canonical_name",
    "cast",
    "check_weights",
    "describe_file",
    "dtype_of",
    "open_for_rank",
    "open_sharded",
    "open_weights",
    "parameter_shapes",
    "read_manifest",
    "read_rank",
    "rotary_heads",
    "save_weights",
    "spell",
    "staged_directory",
    "staged_file",
    "write_manifest",
]
