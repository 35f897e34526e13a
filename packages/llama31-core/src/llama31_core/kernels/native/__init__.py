"""C++ kernels for a CPU: inference's whole model as one operator (bfloat16 or float32 weights, float32 activations), and
training's attention with its gradients (float32).

`library` compiles them; `inference.native_llama` and `training.native_attention` run them. The portable kernels are
their oracle.
"""

from llama31_core.kernels.native.library import NativeKernelsError, load_library

__all__ = ["NativeKernelsError", "load_library"]
