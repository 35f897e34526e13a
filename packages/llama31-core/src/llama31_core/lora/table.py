"""Which adapters are loaded and in which slot: directories and names in, slots of the stacked matrices out. No tensors.

Slot 0 is the base model alone. An adapter keeps its slot until it is unloaded, and cannot be unloaded
while a request uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llama31_core.checkpoint.names import split_layer
from llama31_core.checkpoint.shapes import parameter_shapes
from llama31_core.config import ModelConfig
from llama31_core.errors import CheckpointError, ConfigError, RequestError
from llama31_core.lora.adapter import Adapter, LowRank

# The projections that an adapter may change, as the layout table and `Layers.linear` call them.
MODULES = (
    "attention.wq", "attention.wk", "attention.wv", "attention.wo",
    "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
)  # fmt: skip
BASE_SLOT = 0


class AdapterStore(Protocol):
    """Keeps the matrices of every slot where they are computed with."""

    def write(self, slot: int, changes: Mapping[str, LowRank]) -> None:
        """Make these the changes of a slot; weights that are not named are not changed."""


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter that requests can ask for.

    Attributes:
        name: what requests call it.
        slot: where its matrices are, from 1.
        source: the directory it came from.
        digest: of its content: cached blocks of requests with different adapters are told apart by it.
    """

    name: str
    slot: int
    source: Path
    digest: bytes


class AdapterTable:
    """The adapters beside a model.

    Args:
        config: the model.
        store: where the matrices go; None if there is no place for any.
        max_loras: slots.
        max_lora_rank: the largest rank that a slot has room for.
    """

    def __init__(self, config: ModelConfig, store: AdapterStore | None, max_loras: int, max_lora_rank: int) -> None:
        self._config = config
        self._store = store
        self._max_rank = max_lora_rank
        self.max_loras = max_loras if store is not None else 0
        self._free = list(range(self.max_loras, BASE_SLOT, -1))
        self._loaded: dict[str, LoadedAdapter] = {}
        self._shapes = adaptable_shapes(config)

    @property
    def loaded(self) -> tuple[LoadedAdapter, ...]:
        """In the order of loading."""
        return tuple(self._loaded.values())

    def load(self, name: str, adapter: Adapter) -> LoadedAdapter:
        """Give an adapter a slot.

        Raises:
            ConfigError: the name is taken or empty, or all slots are.
            CheckpointError: it does not fit the model or the slots.
        """
        if not name:
            raise ConfigError("an adapter's name is empty; give one")
        if name in self._loaded:
            raise ConfigError(f"an adapter {name!r} is loaded, from {self._loaded[name].source}; unload it first")
        if self._store is None or not self._free:
            loaded = ", ".join(self._loaded) or "none"
            raise ConfigError(f"all {self.max_loras} slots are taken ({loaded}); unload one, or raise max_loras")
        check_fits(adapter, self._shapes, self._max_rank)
        self._store.write(self._free[-1], adapter.changes)
        loaded_adapter = LoadedAdapter(name, self._free.pop(), adapter.source, adapter.digest)
        self._loaded[name] = loaded_adapter
        return loaded_adapter

    def unload(self, name: str, is_used: Callable[[LoadedAdapter], bool]) -> None:
        """Free an adapter's slot.

        Raises:
            RequestError: there is none of that name, or a request is using it.
        """
        adapter = self.find(name)
        if is_used(adapter):
            raise RequestError(f"adapter {name!r} is used by a running request; wait for it, or abort it")
        assert self._store is not None  # where there is none, none is loaded
        self._store.write(adapter.slot, {})
        del self._loaded[name]
        self._free.append(adapter.slot)

    def find(self, name: str) -> LoadedAdapter:
        """The adapter of that name.

        Raises:
            RequestError: none is loaded under it.
        """
        adapter = self._loaded.get(name)
        if adapter is None:
            raise not_loaded(name, self._loaded)
        return adapter


def not_loaded(name: str, loaded: Iterable[str]) -> RequestError:
    """What is said of a request for an adapter that is not there."""
    return RequestError(
        f"adapter {name!r} is not loaded; loaded are {', '.join(map(repr, loaded)) or 'none'}; load it first"
    )


def adapter_slots_bytes(config: ModelConfig, max_loras: int, max_lora_rank: int, bytes_per_number: int = 4) -> int:
    """Memory of the slots' matrices."""
    width = max_loras * max_lora_rank * bytes_per_number
    return sum(width * (rows + columns) for rows, columns in adaptable_shapes(config).values()) if width else 0


def adaptable_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The weights that adapters may change, with their shapes (out_features, in_features)."""
    names = {f"model.layers.{{n}}.{module}.weight" for module in MODULES}
    return {name: shape for name, shape in parameter_shapes(config).items() if split_layer(name)[0] in names}


def check_fits(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], max_rank: int) -> None:
    """See that an adapter changes what the model has, within the rank.

    Raises:
        CheckpointError: it does not.
    """
    for name, change in adapter.changes.items():
        if name not in shapes:
            raise CheckpointError(
                f"{adapter.source} changes {name}; the projections of this model's layers alone can be changed at "
                f"inference, merge it with llama31-ckpt convert --lora"
            )
        if change.shape != shapes[name]:
            raise CheckpointError(
                f"{adapter.source} changes {name} as {change.shape}, in this model it is {shapes[name]}"
            )
        if change.rank > max_rank:
            raise CheckpointError(
                f"{adapter.source}: {name} has rank {change.rank}, allowed is {max_rank}; raise max_lora_rank"
            )
