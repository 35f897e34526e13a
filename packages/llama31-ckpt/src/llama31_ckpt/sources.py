"""What is to be converted: a path in; its weights, architecture and the files that go along out.

The format is told by content. Each format's own reading lives in its module; here they come down to one `Source`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llama31_ckpt.gguf_format import MAGIC
from llama31_ckpt.hub import local_checkpoint
from llama31_ckpt.meta_format import is_meta_directory, open_meta
from llama31_ckpt.shard_source import is_sharded, open_shards
from llama31_ckpt.torch_format import Joined, TorchWeights, load_tensors
from llama31_core.checkpoint import Weights, canonical_name, open_weights
from llama31_core.checkpoint.files import find_weights, read_index
from llama31_core.checkpoint.manifest import manifest_beside, read_manifest
from llama31_core.checkpoint.names import is_ignorable
from llama31_core.checkpoint.quantized import DequantizedWeights
from llama31_core.checkpoint.stored import OpenFile
from llama31_core.config import ModelConfig
from llama31_core.errors import CheckpointError
from llama31_core.parallel.layout import Layout

# Files of a model directory that describe its tokenizer and its ways of generating, copied as they are.
SIDECAR_NAMES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_TORCH_NAMES = ("pytorch_model.bin.index.json", "pytorch_model.bin")


def _nothing_to_close() -> None:
    pass


@dataclass
class Source:
    """A checkpoint opened for conversion.

    Attributes:
        path: as the user named it.
        format: `gguf`, `safetensors`, `ckpt`, `meta`, `torch` or `ranks`, for the manifest.
        weights: its tensors under canonical names.
        found_config: its architecture, None if nothing beside the weights tells it.
        ignored: entries that are no weights.
        states: those of them that `weights` can read: optimiser and loop state.
        sidecars: files to copy into a model directory.
        build_files: makes the files to write into a model directory, name -> content.
        adapter: a LoRA adapter that was merged into `weights`.
        notes: what the user should know of what was not converted.
    """

    path: Path
    format: str
    weights: Weights
    found_config: ModelConfig | None
    close: Callable[[], None] = _nothing_to_close
    ignored: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    sidecars: tuple[Path, ...] = ()
    build_files: Callable[[], Mapping[str, bytes]] = dict
    notes: tuple[str, ...] = ()
    adapter: Path | None = None

    @property
    def config(self) -> ModelConfig:
        """The architecture.

        Raises:
            CheckpointError: it is not known.
        """
        if self.found_config is None:
            raise CheckpointError(f"{self.path} has no config.json beside the weights; give one with --config")
        return self.found_config

    def describe(self) -> dict[str, Any]:
        """The manifest's `source`."""
        adapter = {} if self.adapter is None else {"adapter": self.adapter.absolute().name}
        return {"format": self.format, "name": self.path.absolute().name, **adapter}

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files and directories that it is read from."""
        return (self.path,) if self.adapter is None else (self.path, self.adapter)


def open_source(path: Path, *, config_path: Path | None = None, layout: Layout | None = None) -> Source:
    """Open whatever checkpoint is at `path`.

    Args:
        path: a directory or a weights file; `org/name` of the Hugging Face Hub if there is no such path.
        config_path: a `config.json` or a directory with one, where the checkpoint has none beside it.
        layout: of a checkpoint over ranks that has no manifests of ours.

    Raises:
        CheckpointError: nothing there, damaged, or an unknown format.
        ConfigError: a config that describes no Llama.
    """
    path = local_checkpoint(path)
    if is_sharded(path):
        return _open_ranks(path, config_path, layout)
    if is_meta_directory(path):
        return _open_meta(path)
    gguf_path = _find_gguf(path)
    if gguf_path is not None:
        return _open_gguf(gguf_path)
    torch_path = _find_torch(path)
    if torch_path is not None:
        return _open_torch(path, torch_path, config_path)
    return _open_model_directory(path, config_path)


def _find_gguf(path: Path) -> Path | None:
    if path.is_file():
        with path.open("rb") as file:
            return path if file.read(len(MAGIC)) == MAGIC or path.suffix == ".gguf" else None
    found = sorted(path.glob("*.gguf"))
    if not found or any(path.glob("*.safetensors")):
        return None
    if len(found) > 1:
        raise CheckpointError(f"{path} holds {len(found)} .gguf files; name one of them")
    return found[0]


def _find_torch(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix in (".bin", ".pt", ".pth") or path.name == _TORCH_NAMES[0] else None
    if any(path.glob("*.safetensors")):
        return None
    return next((path / name for name in _TORCH_NAMES if (path / name).is_file()), None)


def _open_gguf(path: Path) -> Source:
    # Here and not above: the gguf library takes its time to load, and most checkpoints are of other formats.
    from llama31_ckpt.gguf_format.architecture import read_config
    from llama31_ckpt.gguf_format.header import read_header
    from llama31_ckpt.gguf_format.tokenizer import build_tokenizer_files, unsupported_vocabulary
    from llama31_ckpt.gguf_format.weights import GgufWeights

    file = OpenFile(path)
    header = read_header(file)
    config = read_config(file, header)
    weights = GgufWeights(file, header, config.head_dim)
    source = Source(path, "gguf", weights, config, file.close, weights.ignored)
    missing = unsupported_vocabulary(header)
    if missing is None:
        source.build_files = partial(build_tokenizer_files, header, config.max_seq_len)
    else:
        source.notes = (missing,)
    return source


def _open_meta(path: Path) -> Source:
    weights, config, ignored = open_meta(path)
    return Source(path, "meta", weights, config, ignored=ignored, sidecars=_find_sidecars(path))


def _open_torch(path: Path, torch_path: Path, config_path: Path | None) -> Source:
    directory = torch_path.parent
    config = _read_config(torch_path, config_path)
    names = [torch_path.name]
    if torch_path.suffix == ".json":
        names = sorted(set(read_index(torch_path).values()))
    tensors: dict[str, Joined] = {}
    ignored = []
    for name in names:
        for stored, tensor in load_tensors(directory / name).items():
            canonical = canonical_name(stored, "hf") or stored
            if canonical in tensors:
                raise CheckpointError(f"{path}: tensor {canonical!r} is there twice")
            if is_ignorable(stored):
                ignored.append(stored)
            else:
                tensors[canonical] = Joined((tensor,))
    weights = TorchWeights(path, tensors)
    return Source(
        path, "torch", weights, config, ignored=tuple(ignored), sidecars=_find_sidecars(directory, config_path)
    )


def _open_model_directory(path: Path, config_path: Path | None) -> Source:
    weights_path = find_weights(path)
    directory = weights_path.parent
    config = _read_config(weights_path, config_path)
    reader = open_weights(path)
    kind = "ckpt" if weights_path.suffix == ".ckpt" else "safetensors"
    sidecars = _find_sidecars(directory, config_path)
    source = Source(path, kind, reader, config, reader.close, reader.ignored, reader.states, sidecars)
    if config is not None and config.quantization is not None:
        source.weights = DequantizedWeights(reader, config)
        source.found_config = config.model_copy(update={"quantization": None})
        source.notes = (f"{path} has matrices of {config.quantization.bits} bits, read as float32",)
    return source


def _open_ranks(path: Path, config_path: Path | None, layout: Layout | None) -> Source:
    weights = open_shards(path, layout)
    config = None
    if config_path is not None or (path / "config.json").is_file():
        config = ModelConfig.from_pretrained(_directory_of(config_path or path))
    sidecars = _find_sidecars(path, config_path)
    return Source(path, "ranks", weights, config, weights.close, weights.states, weights.states, sidecars)


def _read_config(weights_path: Path, config_path: Path | None) -> ModelConfig | None:
    """The config the user names, or that of the file's own manifest, or the config.json beside it."""
    if config_path is not None:
        return ModelConfig.from_pretrained(_directory_of(config_path))
    manifest_path = manifest_beside(weights_path)
    if manifest_path.is_file():
        config = read_manifest(manifest_path).get("config")
        if isinstance(config, dict):
            return ModelConfig.from_hf(config, source=str(manifest_path))
    if not (weights_path.parent / "config.json").is_file():
        return None
    return ModelConfig.from_pretrained(weights_path.parent)


def _directory_of(path: Path) -> Path:
    return path.parent if path.is_file() else path


def _find_sidecars(directory: Path, config_path: Path | None = None) -> tuple[Path, ...]:
    """The sidecars beside the weights, or those beside the config if there are none."""
    places = [directory] if config_path is None else [directory, _directory_of(config_path)]
    for place in places:
        found = tuple(place / name for name in SIDECAR_NAMES if (place / name).is_file())
        if found:
            return found
    return ()
