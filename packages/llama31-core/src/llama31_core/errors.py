"""The errors this package raises: one sentence with what, where, what was got, what is allowed and what to change."""

from __future__ import annotations


class Llama31Error(Exception):
    """Base of every error that is about the caller's input or environment."""


class ConfigError(Llama31Error):
    """A configuration key or value that is unknown, missing, of a wrong type or contradictory."""


class AgreedError(ConfigError):
    """What keeps the ranks of a mesh from beginning, known to all of them alike: rank 0 tells it."""


class CheckpointError(Llama31Error):
    """A checkpoint that is missing, damaged or of another shape than its configuration."""


class RequestError(Llama31Error):
    """A request that the engine refuses before any work starts."""


class SamplingError(Llama31Error):
    """Logits from which no token can be drawn; it ends the request."""


class DatasetError(Llama31Error):
    """Training data that is missing, damaged or made for another model."""


class RankLostError(Llama31Error):
    """Another rank of the job has ended."""
