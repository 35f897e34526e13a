"""Which tensors a configuration has, and whether a checkpoint is just that: config in, shapes or one error out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llama31_core.checkpoint.names import EMBEDDING, LM_HEAD, NORM_OUT
from llama31_core.checkpoint.reader import Weights
from llama31_core.config import ModelConfig
from llama31_core.errors import CheckpointError

Shape = tuple[int, ...]
_MAX_LISTED = 10


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Canonical name -> shape of every weight, in the order in which checkpoints are written.

    Linear weights are (out_features, in_features). A tied model has no `lm_head.weight`.
    """
    dim, ffn_dim = config.dim, config.ffn_dim
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, dim)}
    for layer in range(config.n_layers):
        block: dict[str, Shape] = {
            "attention.wq": (q_dim, dim),
            "attention.wk": (kv_dim, dim),
            "attention.wv": (kv_dim, dim),
            "attention.wo": (dim, q_dim),
            "feed_forward.w1": (ffn_dim, dim),
            "feed_forward.w2": (dim, ffn_dim),
            "feed_forward.w3": (ffn_dim, dim),
            "attention_norm": (dim,),
            "ffn_norm": (dim,),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    shapes[NORM_OUT] = (dim,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, dim)
    return shapes


def check_weights(weights: Weights, config: ModelConfig) -> None:
    """Check that `weights` has exactly the tensors of `config`, in their shapes and in a weight dtype.

    Raises:
        CheckpointError: one sentence with the first ten missing, unexpected and misshapen tensors of each kind; or it
            is quantised, which what calls this does not take.
    """
    if config.quantization is not None:
        raise CheckpointError(
            f"{weights.source} is quantised to {config.quantization.bits} bits, which predict, chat and serve take, in "
            f"one process; for anything else take the checkpoint it was made of, or llama31-ckpt convert --dtype bf16"
        )
    expected = parameter_shapes(config)
    found = {name: weights.shape(name) for name in weights.names()}
    report_differences(str(weights.source), found, expected)
    bad = [f"{n} is {weights.dtype(n)}" for n in found if weights.dtype(n) not in ("float32", "bfloat16", "float16")]
    if bad:
        raise CheckpointError(f"{weights.source}: {_listing(bad)}; weights are float32, bfloat16 or float16")


def report_differences(source: str, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Raise the CheckpointError that says how `found` differs from `expected`, if it does."""
    problems = []
    missing = [f"{name} {expected[name]}" for name in expected if name not in found]
    unexpected = [f"{name} {found[name]}" for name in found if name not in expected]
    misshapen = [
        f"{name} is {found[name]}, expected {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    for label, entries in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)):
        if entries:
            problems.append(f"{len(entries)} {label} ({_listing(entries)})")
    if problems:
        raise CheckpointError(f"{source} does not fit its config, tensors: {', '.join(problems)}")


def _listing(entries: Sequence[str]) -> str:
    more = len(entries) - _MAX_LISTED
    return "; ".join(entries[:_MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")
