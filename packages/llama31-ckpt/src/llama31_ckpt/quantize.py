"""`llama31-ckpt quantize`: a checkpoint of any format in, a model directory with matrices of 8 or 4 bits out.

Weights are read, rounded and written one layer at a time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llama31_ckpt.calibration import INPUT_OF, Calibration, read_tokens
from llama31_ckpt.convert import TOOL, check_apart, check_room, write_sidecars
from llama31_ckpt.gptq import quantize_for_inputs
from llama31_ckpt.progress import item_bar
from llama31_ckpt.sources import Source, open_source
from llama31_core.checkpoint import check_weights, parameter_shapes, staged_directory, write_manifest
from llama31_core.checkpoint.dtypes import BY_NAME, Array
from llama31_core.checkpoint.files import SINGLE_NAME
from llama31_core.checkpoint.names import EMBEDDING, LM_HEAD, NORM_OUT
from llama31_core.checkpoint.quantized import (
    DequantizedWeights,
    bits_of,
    part_name,
    quantize,
    stored_bytes,
    stored_shapes,
)
from llama31_core.checkpoint.staging import check_destination
from llama31_core.checkpoint.writer import TensorSpec, write_safetensors
from llama31_core.config import ModelConfig, Quantization
from llama31_core.errors import CheckpointError

_SEQUENCE = 512  # tokens of a calibration text's piece
_NORMS = ("attention_norm", "ffn_norm")

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class QuantizeSummary:
    """What was written: bytes of it, and of the same tensors in bfloat16."""

    size_bytes: int
    bfloat16_bytes: int
    calibration_tokens: int


def quantize_checkpoint(
    source: Source,
    destination: Path,
    quantization: Quantization,
    *,
    tokens: npt.NDArray[np.int64] | None = None,
    overwrite: bool = False,
    on_tensor: Callable[[], object] = lambda: None,
) -> QuantizeSummary:
    """Write `source` with few bits.

    Args:
        source: from `open_source`.
        destination: model directory to make.
        quantization: bits and group size.
        tokens: (sequences, length) of a calibration text, to round for its inputs; None rounds to nearest.
        overwrite: replace an existing destination.
        on_tensor: called when one has been written.

    Raises:
        CheckpointError: it is quantised already, does not fit its config, or cannot be written; nothing is left.
        ConfigError: the architecture has matrices that cannot be cut so.
    """
    if isinstance(source.weights, DequantizedWeights):
        raise CheckpointError(f"{source.path} is quantised already; take the checkpoint it was made of")
    config = ModelConfig.build(str(source.path), **{**source.config.model_dump(), "quantization": quantization})
    check_apart(source.path, destination)
    check_destination(destination, overwrite=overwrite)
    check_weights(source.weights, source.config)
    check_room(destination, stored_bytes(config))
    specs = [
        TensorSpec(name, shape, BY_NAME[dtype or "float32"]) for name, (shape, dtype) in stored_shapes(config).items()
    ]
    made = _Quantizer(source, config, tokens).tensors()
    built = source.build_files()
    with staged_directory(destination, overwrite=overwrite) as part:

        def chunks(spec: TensorSpec) -> Iterator[Array]:
            name, array = next(made)
            assert name == spec.name
            yield array
            on_tensor()

        files = [write_safetensors(part / SINGLE_NAME, specs, chunks)]
        files += write_sidecars(source, {"config.json": _content(config), **built}, "float32", part)
        write_manifest(part, files, dtype="float32", source=source.describe(), tool=TOOL)
    return QuantizeSummary(stored_bytes(config), config.num_parameters * 2, 0 if tokens is None else tokens.size)


class _Quantizer:
    """Makes the tensors of a quantised checkpoint in the order of `stored_shapes`."""

    def __init__(self, source: Source, config: ModelConfig, tokens: npt.NDArray[np.int64] | None) -> None:
        assert config.quantization is not None
        self._source, self._config, self._quantization = source, config, config.quantization
        self._tokens = tokens

    def tensors(self) -> Iterator[tuple[str, Array]]:
        embedding = self._read(EMBEDDING)
        yield from self._rounded(EMBEDDING, embedding)
        calibration = None if self._tokens is None else Calibration(self._config, embedding[self._tokens])
        del embedding
        for layer in range(self._config.n_layers):
            yield from self._layer(f"model.layers.{layer}.", calibration)
        yield NORM_OUT, self._read(NORM_OUT)
        if not self._config.tie_word_embeddings:
            yield from self._rounded(LM_HEAD, self._read(LM_HEAD))

    def _layer(self, prefix: str, calibration: Calibration | None) -> Iterator[tuple[str, Array]]:
        if calibration is None:
            for name in INPUT_OF:
                yield from self._rounded(f"{prefix}{name}.weight", self._read(f"{prefix}{name}.weight"))
        else:
            layer = {name: self._read(f"{prefix}{name}.weight") for name in (*INPUT_OF, *_NORMS)}
            moments = calibration.observe(layer)
            for name, first in INPUT_OF.items():
                bits, group_size = self._quantization.bits, self._quantization.group_size
                rounded = quantize_for_inputs(layer[name], moments[first], bits, group_size)
                layer[name] = rounded.dequantize()
                for part, array in rounded.parts().items():
                    yield part_name(f"{prefix}{name}.weight", part), array
            calibration.advance(layer)  # the next layers make up for what the rounding of this one did
        for name in _NORMS:
            yield f"{prefix}{name}.weight", self._read(f"{prefix}{name}.weight")

    def _rounded(self, name: str, weights: Floats) -> Iterator[tuple[str, Array]]:
        matrix = quantize(weights, bits_of(name, self._quantization), self._quantization.group_size)
        for part, array in matrix.parts().items():
            yield part_name(name, part), array

    def _read(self, name: str) -> Floats:
        weights: Floats = self._source.weights.read_slice(name, ()).astype(np.float32, copy=False)
        if not np.isfinite(weights).all():
            raise CheckpointError(f"{self._source.path}: {name} has values that are no finite numbers")
        return weights


def _content(config: ModelConfig) -> bytes:
    return (json.dumps(config.to_hf(), indent=2) + "\n").encode()


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """Set up the command's options."""
    parser.add_argument("source", type=Path, help="checkpoint of any format, with its config")
    parser.add_argument("--output_path", type=Path, required=True, help="model directory to make")
    parser.add_argument("--bits", type=int, choices=(8, 4), required=True, help="of a weight; embedding and head: 8")
    parser.add_argument("--group", type=int, default=128, help="columns that share a scale, a multiple of 32 (128)")
    parser.add_argument(
        "--calibration", type=Path, help="text file like what the model will read: round for its inputs (GPTQ)"
    )
    parser.add_argument("--sequences", type=int, default=16, help=f"pieces of {_SEQUENCE} tokens to take of it (16)")
    parser.add_argument("--config", type=Path, help="config.json if the input has none beside it")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing destination")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    quantization = Quantization.build("--group", bits=arguments.bits, group_size=arguments.group)
    with closing(open_source(arguments.source, config_path=arguments.config)) as source:
        tokens = None
        if arguments.calibration is not None:
            if arguments.sequences < 1:
                raise CheckpointError(f"--sequences is {arguments.sequences}, expected 1 or more")
            length = min(_SEQUENCE, source.config.max_seq_len)
            tokens = read_tokens(arguments.calibration, source.path, arguments.sequences, length)
            if tokens.max() >= source.config.vocab_size:
                raise CheckpointError(
                    f"{source.path}: its tokenizer gives id {tokens.max()}, the model has {source.config.vocab_size}"
                )
        with item_bar(3 * len(parameter_shapes(source.config)), "quantize") as bar:
            summary = quantize_checkpoint(
                source,
                arguments.output_path,
                quantization,
                tokens=tokens,
                overwrite=arguments.overwrite,
                on_tensor=bar.update,
            )
    how = f"for the inputs of {summary.calibration_tokens:,} tokens" if summary.calibration_tokens else "to nearest"
    share = summary.size_bytes / summary.bfloat16_bytes
    print(
        f"{arguments.output_path}: {summary.size_bytes / 1e9:.2f} GB, {share:.2f} of bfloat16; "
        f"{arguments.bits} bits, groups of {arguments.group}, rounded {how}"
    )
