"""What stands between the products of a layer, by the native CPU kernels: norms, rotations, SwiGLU and cross-entropy.

Each is one pass over memory, forward and backward, where MindSpore's operators make three to ten. They are put into a
model that was built with other kernels, in which the same values come of the same cells; those remain the oracle.

Shapes: B sequences, T tokens, H heads, D width of a head, E = dim, C tokens of a chunk, V = vocab_size.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from llama31_core.kernels.native.operator import native_operator
from llama31_core.model import Llama
from llama31_core.model.norm import RMSNorm


def fuse_rows(template: Llama) -> None:
    """Let the native kernels compute a model's norms, rotations and SwiGLU; everything is float32."""
    swiglu, turn = _build_swiglu(), _build_turn()
    for _, cell in template.cells_and_names():
        if isinstance(cell, RMSNorm):
            cell._normalise = _Norm(cell.eps)
    for block in template.model.layers:
        block.attention._turn = turn
        block.feed_forward._swiglu = swiglu


def build_cross_entropy() -> ops.Custom:
    """logits (C, V), labels (C,) -> losses (C,) and their gradients by the logits (C, V); 0 for labels below 0."""
    return native_operator(
        "Llama31TrainCrossEntropy",
        [ms.float32, ms.int32],
        2,
        out_shape=lambda logits, labels: (labels, logits),
        out_dtype=lambda logits, labels: (logits, logits),
    )


class _Norm(nn.Cell):  # type: ignore[misc]
    """`x / rms(x) * weight`."""

    def __init__(self, eps: float) -> None:
        super().__init__(auto_prefix=False)
        self._eps = Tensor([eps], ms.float32)
        self._normalise = native_operator(
            "Llama31TrainNorm",
            [ms.float32] * 3,
            1,
            out_shape=lambda x, weight, eps: x,
            out_dtype=lambda x, weight, eps: x,
        )
        differentiate = native_operator(
            "Llama31TrainNormGrad",
            [ms.float32] * 4,
            2,
            out_shape=lambda x, weight, eps, d_out: (x, weight),
            out_dtype=lambda x, weight, eps, d_out: (x, weight),
        )

        def gradients(x: Tensor, weight: Tensor, eps: Tensor, out: Tensor, d_out: Tensor) -> tuple[Tensor, ...]:
            d_x, d_weight = differentiate(x, weight, eps, d_out)
            return d_x, d_weight, ops.zeros_like(eps)

        self._normalise.bprop = gradients

    def construct(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x (..., E), weight (E,)."""
        return self._normalise(x, weight, self._eps)


def _build_swiglu() -> ops.Custom:
    swiglu = native_operator(
        "Llama31TrainSwiGlu",
        [ms.float32] * 2,
        1,
        out_shape=lambda gate, up: gate,
        out_dtype=lambda gate, up: gate,
    )
    differentiate = native_operator(
        "Llama31TrainSwiGluGrad",
        [ms.float32] * 3,
        2,
        out_shape=lambda gate, up, d_out: (gate, up),
        out_dtype=lambda gate, up, d_out: (gate, up),
    )

    def gradients(gate: Tensor, up: Tensor, out: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
        d_gate, d_up = differentiate(gate, up, d_out)
        return d_gate, d_up

    swiglu.bprop = gradients
    return swiglu


def _build_turn() -> ops.Custom:
    """x (B, T, H, D), cosines and sines (B, T, 1, D), which have no gradients."""
    turn, turn_back = (
        native_operator(name, [ms.float32] * 3, 1, out_shape=lambda x, cos, sin: x, out_dtype=lambda x, cos, sin: x)
        for name in ("Llama31TrainTurn", "Llama31TrainTurnBack")
    )

    def gradients(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return turn_back(d_out, cos, sin), ops.zeros_like(cos), ops.zeros_like(sin)

    turn.bprop = gradients
    return turn
