"""Llama: token ids and positions in, hidden states and logits out.

Cells are named so that parameters have MindFormers' names: `model.layers.0.attention.wq.weight`, `lm_head.weight`.
Shapes: B sequences, T tokens of each, E = dim, V = vocab_size.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn

from llama31_core.config import ModelConfig
from llama31_core.model.attention import Attention, AttentionCore
from llama31_core.model.feedforward import FeedForward
from llama31_core.model.layers import Layers
from llama31_core.model.rope import RotaryEmbedding


class TransformerBlock(nn.Cell):  # type: ignore[misc]
    """One layer: attention and feed-forward, each on the normed input and added to the residual stream."""

    def __init__(self, config: ModelConfig, core: AttentionCore, layers: Layers) -> None:
        super().__init__()
        self.attention_norm = layers.norm(config.dim, config.norm_eps)
        self.attention = Attention(config, core, layers)
        self.ffn_norm = layers.norm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config, layers)

    def construct(
        self, x_BTE: Tensor, positions_BT: Tensor, cos_BT1D: Tensor, sin_BT1D: Tensor, *context: Tensor
    ) -> Tensor:
        """The residual stream after this layer."""
        h_BTE = x_BTE + self.attention(self.attention_norm(x_BTE), positions_BT, cos_BT1D, sin_BT1D, *context)
        return h_BTE + self.feed_forward(self.ffn_norm(h_BTE))


class Transformer(nn.Cell):  # type: ignore[misc]
    """Embedding, the layers and the last norm."""

    def __init__(self, config: ModelConfig, core: AttentionCore, layers: Layers, compute_dtype: ms.Type) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        self.tok_embeddings = layers.embedding(config.vocab_size, config.dim)
        self.rope = RotaryEmbedding(config)
        self.layers = nn.CellList([TransformerBlock(config, core, layers) for _ in range(config.n_layers)])
        self.norm_out = layers.norm(config.dim, config.norm_eps)

    def construct(self, tokens_BT: Tensor, positions_BT: Tensor, *context: Tensor) -> Tensor:
        """Hidden states (B, T, E)."""
        x_BTE = self.tok_embeddings(tokens_BT).astype(self.compute_dtype)
        cos_BT1D, sin_BT1D = self.rope(positions_BT)
        for layer in self.layers:
            x_BTE = layer(x_BTE, positions_BT, cos_BT1D, sin_BT1D, *context)
        return self.norm_out(x_BTE)


class Llama(nn.Cell):  # type: ignore[misc]
    """The language model.

    Args:
        config: the architecture.
        core: builds each layer's attention: `CausalAttention` for whole sequences, or `PagedAttention` over a cache.
            What follows `positions` in a call (`*context`) is handed to it.
        layers: builds the layers that hold weights; whole ones in float32 if None.
        compute_dtype: of the residual stream and of every product; norms, rotations, softmax and logits are float32.
    """

    def __init__(
        self,
        config: ModelConfig,
        core: AttentionCore,
        layers: Layers | None = None,
        compute_dtype: ms.Type = ms.float32,
    ) -> None:
        super().__init__()
        layers = layers or Layers()
        self.config = config
        self.model = Transformer(config, core, layers, compute_dtype)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else layers.linear("lm_head", config.dim, config.vocab_size)

    def construct(self, tokens_BT: Tensor, positions_BT: Tensor, *context: Tensor) -> Tensor:
        """Logits (B, T, V) of every token."""
        return self.logits(self.model(tokens_BT, positions_BT, *context))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V), float32, of hidden states (..., E)."""
        if self.lm_head is None:
            return self.model.tok_embeddings.project(hidden).astype(ms.float32)
        return self.lm_head(hidden).astype(ms.float32)
