"""`SamplingParams` as text: the flags of commands, `/set` in a chat, the keys of JSON records, all from one table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llama31_core.errors import RequestError
from llama31_core.inference.sampling_params import SamplingParams
from llama31_core.validation import did_you_mean


def _optional(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text.lower() == "none" else kind(text)


def _ids(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part.strip())


def _words(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(_ids(word) for word in text.split(";") if word.strip())


def _biases(text: str) -> dict[int, float]:
    pairs = (part.split("=") for part in text.split(",") if part.strip())
    return {int(token): float(bias) for token, bias in pairs}


def _bool(text: str) -> bool:
    try:
        return {"true": True, "false": False}[text.lower()]
    except KeyError:
        raise ValueError(text) from None


def _bool_or_never(text: str) -> bool | str:
    return "never" if text == "never" else _bool(text)


@dataclass(frozen=True)
class _Option:
    """How one parameter is written and read."""

    parse: Callable[[str], Any]
    form: str
    text: str


OPTIONS = {
    "max_tokens": _Option(_optional(int), "N", "tokens to generate at most; none: as many as the context holds"),
    "min_tokens": _Option(int, "N", "the end is held back so long"),
    "temperature": _Option(float, "T", "0 for greedy"),
    "top_k": _Option(int, "K", "sample among the k most likely tokens; 0: all"),
    "top_p": _Option(float, "P", "sample among the likeliest tokens up to p; 1: all"),
    "min_p": _Option(float, "P", "leave out tokens less likely than this share of the likeliest one"),
    "typical_p": _Option(float, "P", "sample among the tokens nearest to the expected surprise, up to p"),
    "repetition_penalty": _Option(float, "X", "divides the logits of tokens that were there; 1: none"),
    "presence_penalty": _Option(float, "X", "taken from the logits of tokens of the answer so far"),
    "frequency_penalty": _Option(float, "X", "the same, as often as they are there"),
    "logit_bias": _Option(_biases, "ID=X,…", "added to the logits of these ids"),
    "bad_words_ids": _Option(_words, "ID,…;…", "sequences of ids that are never completed"),
    "stop_token_ids": _Option(_ids, "ID,…", "ids that end the answer, beside the model's own"),
    "ignore_eos": _Option(_bool, "True|False", "the model's own end does not end the answer"),
    "use_prefix_cache": _Option(_bool, "True|False", "share what prompts begin with alike"),
    "seed": _Option(_optional(int), "N", "makes sampling repeatable"),
    "n": _Option(int, "N", "answers to each prompt"),
    "logprobs": _Option(_optional(int), "N", "report log-probabilities of each token and the n likeliest ones"),
    "prompt_logprobs": _Option(_optional(int), "N", "the same of the prompt's tokens"),
    "num_beams": _Option(int, "N", "beam search of so many beams"),
    "length_penalty": _Option(float, "X", "exponent of the length that a beam's score is divided by"),
    "early_stopping": _Option(_bool_or_never, "True|False|never", "when a beam search ends"),
}


def add_sampling_options(parser: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> None:
    """Give a command a flag for every parameter; `defaults` are those that differ from SamplingParams'."""
    group = parser.add_argument_group("sampling", "what these are in full is in the package's README")
    for name, option in OPTIONS.items():
        own = defaults.get(name, getattr(SamplingParams, name, None))
        shown = f" ({own})" if isinstance(own, int | float) and own is not False else ""
        bare: dict[str, Any] = {"nargs": "?", "const": True} if option.parse is _bool else {}
        group.add_argument(
            f"--{name}",
            type=_argument(option),
            metavar=option.form.replace("%", "%%"),
            default=argparse.SUPPRESS,
            help=option.text + shown,
            **bare,
        )
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; repeatable")


def given_options(arguments: argparse.Namespace, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a command line over the command's defaults."""
    return dict(defaults) | {name: getattr(arguments, name) for name in OPTIONS if hasattr(arguments, name)}


def parse_option(name: str, text: str) -> Any:
    """The value that a text gives a parameter.

    Raises:
        RequestError: no such parameter, or a text that is no value of it.
    """
    _check_name(name)
    option = OPTIONS[name]
    try:
        return option.parse(text)
    except ValueError:
        raise RequestError(f"{name} is {text!r}, expected {option.form} ({option.text})") from None


def params_from_json(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    """The parameters of a record: its own over the command's.

    Raises:
        RequestError: no such parameter, or a value outside its range.
    """
    for name in values:
        _check_name(name)
    own = dict(values)
    if isinstance(own.get("logit_bias"), dict):  # JSON's keys are strings
        own["logit_bias"] = {_as_int(key): bias for key, bias in own["logit_bias"].items()}
    return SamplingParams(**{**defaults, **own})


def _check_name(name: str) -> None:
    if name not in OPTIONS:
        raise RequestError(f"unknown sampling parameter {name!r}; {did_you_mean(name, OPTIONS)}")


def _as_int(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def _argument(option: _Option) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return option.parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not of the form {option.form}") from None

    return parse
