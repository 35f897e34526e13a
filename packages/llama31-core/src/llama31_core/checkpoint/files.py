"""Finding the tensor files of a checkpoint: a path in, its opened files and the tensors in them out."""

from __future__ import annotations

from pathlib import Path

from llama31_core.checkpoint.ckpt_format import is_ckpt, parse_ckpt
from llama31_core.checkpoint.json_files import read_json_object
from llama31_core.checkpoint.safetensors_format import is_safetensors, parse_safetensors
from llama31_core.checkpoint.stored import OpenFile, StoredTensor, TensorFiles
from llama31_core.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def open_tensor_files(path: Path) -> TensorFiles:
    """Open a tensor file, an index of shards, or a directory that holds either.

    Raises:
        CheckpointError: nothing there, several candidates, or damaged files.
    """
    target = find_weights(path)
    if target.name.endswith(".index.json"):
        return _open_shards(path, target)
    file = OpenFile(target)
    return TensorFiles(path, _parse(file), [file])


def find_weights(path: Path) -> Path:
    """The file to open for `path`: itself, or the index or single weights file of a directory."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.is_file():
        return path
    for name in (INDEX_NAME, SINGLE_NAME):
        if (path / name).is_file():
            return path / name
    for pattern in ("*.index.json", "*.safetensors", "*.ckpt"):
        found = sorted(file for file in path.glob(pattern) if file.is_file())
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found[:3])
            raise CheckpointError(f"{path} holds {len(found)} {pattern} files ({names}, …); name one of them")
    raise CheckpointError(f"{path} holds no {SINGLE_NAME}, {INDEX_NAME} or .ckpt; convert it with llama31-ckpt convert")


def _parse(file: OpenFile) -> dict[str, StoredTensor]:
    if file.size_bytes == 0:
        raise CheckpointError(f"{file.path} is empty")
    # By name where the name says it, so that a damaged file is called damaged and not unknown.
    if file.path.suffix == ".safetensors" or is_safetensors(file):
        return parse_safetensors(file)[0]
    start = file.read(0, min(4, file.size_bytes))
    if start == b"GGUF" or start[:2] in (b"PK", b"\x80\x02"):
        kind = "a GGUF" if start == b"GGUF" else "a PyTorch"
        raise CheckpointError(f"{file.path} is {kind} file; convert it with llama31-ckpt convert")
    if file.path.suffix == ".ckpt" or is_ckpt(file):
        return parse_ckpt(file)
    raise CheckpointError(f"{file.path} is neither safetensors nor a MindSpore .ckpt")


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index file: tensor name -> file name beside the index.

    Raises:
        CheckpointError: no valid index, or a file name that leaves its directory.
    """
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name or file_name in ("", ".", ".."):
            raise CheckpointError(f"{path}: tensor {name!r} is said to be in {file_name!r}, expected a plain file name")
    return weight_map


def _open_shards(source: Path, index: Path) -> TensorFiles:
    weight_map = read_index(index)
    tensors: dict[str, StoredTensor] = {}
    files = []
    for file_name in sorted(set(weight_map.values())):
        shard = index.parent / file_name
        if not shard.is_file():
            raise CheckpointError(f"{index} names {file_name}, which is not there; get the missing shard")
        file = OpenFile(shard)
        files.append(file)
        for name, tensor in _parse(file).items():
            if name in tensors:
                raise CheckpointError(f"tensor {name!r} is in both {tensors[name].path.name} and {file_name}")
            if weight_map.get(name) != file_name:
                raise CheckpointError(f"{index} says {name!r} is in {weight_map.get(name)}, it is in {file_name}")
            tensors[name] = tensor
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        listed = ", ".join(absent[:10])
        raise CheckpointError(f"{index} names {len(absent)} tensors that its shards do not hold: {listed}")
    return TensorFiles(source, tensors, files)
