"""The operations a Llama model is made of, behind one small interface, and which set of them a model is built with.

`portable` is written with MindSpore operators that every device has; it is also the oracle for any other set. `ascend`
calls fused operators. Cells ask `active()` once, when they are built, and keep what they got. Both sets hold their
caches in a shape of their own (`cache_shape`), and take the same arguments otherwise.
"""

from llama31_core.kernels.portable import dequantize, linear
from llama31_core.kernels.registry import KernelSet, active, use

__all__ = ["KernelSet", "active", "dequantize", "linear", "use"]
