"""A YAML file and `section.key=value` overrides in, a typed `RunConfig` or `PredictConfig` out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from llama31_core.errors import ConfigError
from llama31_core.run_config.dead_keys import PREDICT_DEAD_KEYS, TRAINING_DEAD_KEYS
from llama31_core.run_config.run import AnyRunConfig, PredictConfig, RunConfig
from llama31_core.validation import did_you_mean, first_problem

_LOG = logging.getLogger(__name__)
_MISSING = object()
_Run = TypeVar("_Run", bound=AnyRunConfig)


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file that trains and put `section.key=value` overrides over it; the values are parsed as YAML.

    Raises:
        ConfigError: no such file, not YAML, an unknown key (the nearest known one is named), a value that does not fit.
    """
    return _validated(RunConfig, _read(path, overrides), TRAINING_DEAD_KEYS, str(path))


def load_predict_config(path: str | Path, overrides: Sequence[str] = ()) -> PredictConfig:
    """The same for a YAML file that predicts."""
    return _validated(PredictConfig, _read(path, overrides), PREDICT_DEAD_KEYS, str(path))


def load_any_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig | PredictConfig:
    """The same for a YAML file of either kind: `run_mode` says which."""
    values = _read(path, overrides)
    if values.get("run_mode") == "predict":
        return _validated(PredictConfig, values, PREDICT_DEAD_KEYS, str(path))
    return _validated(RunConfig, values, TRAINING_DEAD_KEYS, str(path))


def _read(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    source = str(path)
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{source} does not exist; give a YAML file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{source} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source} holds {type(values).__name__}, expected sections with keys")
    for override in overrides:
        _override(values, override)
    return values


def _validated(kind: type[_Run], values: dict[str, Any], dead_keys: Mapping[str, str], source: str) -> _Run:
    _drop_dead_keys(values, dead_keys, source)
    for dotted, known in _unknown_keys(values, kind):
        raise ConfigError(f"{source}: unknown key {dotted!r}; {did_you_mean(dotted.rpartition('.')[2], known)}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {first_problem(error)}") from error


def _override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    *sections, key = dotted.split(".")
    for name in sections:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {name!r} is a value and has no keys in it")
    try:
        values[key] = yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML") from error


def _drop_dead_keys(values: dict[str, Any], dead_keys: Mapping[str, str], source: str) -> None:
    found = []
    for dotted, reason in dead_keys.items():
        *sections, key = dotted.split(".")
        holder: Any = values
        for name in sections:
            holder = _inner(holder, name)
        if _inner(holder, key, _MISSING) is _MISSING:
            continue
        if isinstance(holder, dict):
            del holder[key]
        else:
            holder[:] = [element for element in holder if _type_of(element) != key]
        found.append(f"{dotted} ({reason})")
    if found:
        _LOG.warning("%s: %d keys have no effect here: %s", source, len(found), "; ".join(found))


def _inner(holder: Any, name: str, default: Any = None) -> Any:
    """What a section has under a key, or a list has of a `type`."""
    if isinstance(holder, dict):
        return holder.get(name, default)
    elements = holder if isinstance(holder, list) else ()
    return next((element for element in elements if _type_of(element) == name), default)


def _type_of(element: Any) -> Any:
    return element.get("type") if isinstance(element, dict) else None


def _unknown_keys(values: Mapping[str, Any], section: type[BaseModel], at: str = "") -> Iterator[tuple[str, list[str]]]:
    """Dotted names of keys that no section has, each with the names that its section has."""
    fields = {field.alias or name: field for name, field in section.model_fields.items()}
    for key, value in values.items():
        if key not in fields:
            yield f"{at}{key}", list(fields)
            continue
        kind = fields[key].annotation
        inner = next((t for t in (kind, *get_args(kind)) if isinstance(t, type) and issubclass(t, BaseModel)), None)
        if inner is not None and isinstance(value, Mapping):
            yield from _unknown_keys(value, inner, f"{at}{key}.")
