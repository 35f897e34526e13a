"""The Llama architecture, readable top-down: transformer -> attention and feedforward -> norm and rope."""

from llama31_core.model.attention import CausalAttention, PagedAttention
from llama31_core.model.transformer import Llama

__all__ = ["CausalAttention", "Llama", "PagedAttention"]
