"""One transformer layer forward and backward as two graphs, which serve every layer of a model in turn.

The forward graph gives, beside its output, what the backward graph needs; that takes gradients part by part, so that
the products of the forward pass are not computed again unless `recompute` says so. The parts are the model's cells,
whatever class they have: layers split over ranks bring their collectives with them, adapters their own weights.

Shapes: B sequences, T tokens, E = dim, H query heads, K key-value heads, D width of a head, F = ffn_dim.
"""

from __future__ import annotations

from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from llama31_core.model.transformer import TransformerBlock
from llama31_core.run_config.training import RecomputePolicy

# What is computed again in the backward pass, beside norms, rotations, attention scores and SwiGLU, which always are:
# nothing; gate and up, over half of what is kept; or the whole layer from its input.
Recompute = RecomputePolicy
NUM_KEPT: dict[Recompute, int] = {"none": 7, "select": 5, "full": 0}


class BlockForward(nn.Cell):  # type: ignore[misc]
    """x (B, T, E) to y (B, T, E), and what is kept for the backward pass."""

    def __init__(self, block: TransformerBlock, recompute: Recompute) -> None:
        super().__init__(auto_prefix=False)
        self.block = block
        self._recompute = recompute

    def construct(
        self, x_BTE: Tensor, positions_BT: Tensor, cos_BT1D: Tensor, sin_BT1D: Tensor, *context: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output and kept activations; with full recomputation just the input is needed, which the caller has."""
        q, k, v = self.project(x_BTE, cos_BT1D, sin_BT1D)
        mixed_BTE = self.mix(q, k, v, positions_BT, *context)
        h_BTE = x_BTE + self.gather(mixed_BTE)
        gate_BTF, up_BTF = self.widen(h_BTE)
        y_BTE = h_BTE + self.narrow(gate_BTF, up_BTF)
        if self._recompute == "full":
            return y_BTE, ()
        if self._recompute == "select":
            return y_BTE, (q, k, v, mixed_BTE, h_BTE)
        return y_BTE, (q, k, v, mixed_BTE, h_BTE, gate_BTF, up_BTF)

    def project(self, x_BTE: Tensor, cos_BT1D: Tensor, sin_BT1D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, D), keys and values (B, T, K, D) of a layer's input, turned."""
        attention = self.block.attention
        normed = self.block.attention_norm(x_BTE)
        heads = (cos_BT1D.shape[0], cos_BT1D.shape[1], -1, attention.head_dim)
        q_BTHD = attention._turn(attention.wq(normed).reshape(heads), cos_BT1D, sin_BT1D)
        k_BTKD = attention._turn(attention.wk(normed).reshape(heads), cos_BT1D, sin_BT1D)
        return q_BTHD, k_BTKD, attention.wv(normed).reshape(heads)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, positions_BT: Tensor, *context: Tensor) -> Tensor:
        """Attention."""
        return self.block.attention.core(q, k, v, positions_BT, *context)

    def gather(self, mixed_BTE: Tensor) -> Tensor:
        """The attention's output projection."""
        return self.block.attention.wo(mixed_BTE)

    def widen(self, h_BTE: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up (B, T, F)."""
        normed = self.block.ffn_norm(h_BTE)
        return self.block.feed_forward.w1(normed), self.block.feed_forward.w3(normed)

    def narrow(self, gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
        """SwiGLU and the projection back."""
        return self.block.feed_forward.w2(self.block.feed_forward._swiglu(gate_BTF, up_BTF))


class BlockBackward(nn.Cell):  # type: ignore[misc]
    """dy (B, T, E) to dx (B, T, E) and the gradients of `self.trained`, in that order."""

    def __init__(self, forward: BlockForward, recompute: Recompute) -> None:
        super().__init__(auto_prefix=False)
        self.forward_part = forward
        self._recompute = recompute
        self._num_kept = NUM_KEPT[recompute]
        block, attention, ffn = forward.block, forward.block.attention, forward.block.feed_forward
        self._has_gradients = hasattr(attention.core, "gradients")
        parts = (
            [block.attention_norm, attention.wq, attention.wk, attention.wv],
            [attention.wo],
            [block.ffn_norm, ffn.w1, ffn.w3],
            [ffn.w2],
        )
        trained = [[p for cell in cells for p in cell.trainable_params()] for cells in parts]
        self.trained: list[Parameter] = [parameter for part in trained for parameter in part]
        self._project, self._gather, self._widen, self._narrow = map(_gradient, trained)
        self._mix = ops.GradOperation(get_all=True, sens_param=True)
        self._weights = [ParameterTuple(part) for part in trained]
        self._project_weights, self._gather_weights, self._widen_weights, self._narrow_weights = self._weights
        self._flags = tuple(bool(part) for part in trained)

    def construct(
        self,
        dy_BTE: Tensor,
        x_BTE: Tensor,
        positions_BT: Tensor,
        cos_BT1D: Tensor,
        sin_BT1D: Tensor,
        *kept_and_context: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Gradients of the layer's input and of its trained weights.

        What the forward graph kept and the attention's context come one by one: a tuple would be taken as a constant.
        """
        part = self.forward_part
        kept, context = kept_and_context[: self._num_kept], kept_and_context[self._num_kept :]
        if self._recompute == "full":
            q, k, v = part.project(x_BTE, cos_BT1D, sin_BT1D)
            mixed_BTE = part.mix(q, k, v, positions_BT, *context)
            h_BTE = x_BTE + part.gather(mixed_BTE)
        else:
            q, k, v, mixed_BTE, h_BTE = kept[:5]
        gate_BTF, up_BTF = kept[5:7] if self._recompute == "none" else part.widen(h_BTE)
        d_wide, d_narrow_weights = self._narrow_gradient(gate_BTF, up_BTF, dy_BTE)
        d_h, d_widen_weights = self._widen_gradient(h_BTE, d_wide)
        d_h = d_h + dy_BTE
        d_mixed, d_gather_weights = self._gather_gradient(mixed_BTE, d_h)
        if self._has_gradients:
            d_qkv = part.block.attention.core.gradients(q, k, v, mixed_BTE, d_mixed, positions_BT, *context)
        else:
            d_qkv = self._mix(part.mix)(q, k, v, positions_BT, *context, d_mixed)[:3]
        d_x, d_project_weights = self._project_gradient(x_BTE, cos_BT1D, sin_BT1D, d_qkv)
        return d_x + d_h, d_project_weights + d_gather_weights + d_widen_weights + d_narrow_weights

    def _narrow_gradient(self, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        if self._flags[3]:
            d_inputs, d_weights = self._narrow(self.forward_part.narrow, self._narrow_weights)(gate, up, dy)
            return d_inputs, d_weights
        return self._narrow(self.forward_part.narrow)(gate, up, dy), ()

    def _widen_gradient(self, h: Tensor, d_wide: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self._flags[2]:
            d_inputs, d_weights = self._widen(self.forward_part.widen, self._widen_weights)(h, d_wide)
            return d_inputs[0], d_weights
        return self._widen(self.forward_part.widen)(h, d_wide)[0], ()

    def _gather_gradient(self, mixed: Tensor, d_h: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self._flags[1]:
            d_inputs, d_weights = self._gather(self.forward_part.gather, self._gather_weights)(mixed, d_h)
            return d_inputs[0], d_weights
        return self._gather(self.forward_part.gather)(mixed, d_h)[0], ()

    def _project_gradient(
        self, x: Tensor, cos: Tensor, sin: Tensor, d_qkv: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self._flags[0]:
            d_inputs, d_weights = self._project(self.forward_part.project, self._project_weights)(x, cos, sin, d_qkv)
            return d_inputs[0], d_weights
        return self._project(self.forward_part.project)(x, cos, sin, d_qkv)[0], ()


def _gradient(trained: list[Parameter]) -> ops.GradOperation:
    """Gradients of a part's inputs, and of its weights if any are trained."""
    return ops.GradOperation(get_all=True, get_by_list=bool(trained), sens_param=True)
