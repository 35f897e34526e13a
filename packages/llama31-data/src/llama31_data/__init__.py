"""Instruction data to MindRecord for Llama 3.1 on MindSpore."""

from llama31_data.convert import convert_alpaca
from llama31_data.errors import DataError, RecordError
from llama31_data.loader import load_dataset
from llama31_data.manifest import Manifest, load_manifest
from llama31_data.options import PreprocessOptions
from llama31_data.pipeline import preprocess

__all__ = [
    "DataError",
    "Manifest",
    "PreprocessOptions",
    "RecordError",
    "convert_alpaca",
    "load_dataset",
    "load_manifest",
    "preprocess",
]
__version__ = "0.1.0"
