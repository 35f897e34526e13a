"""C++ kernels for inference on a CPU: the model is one operator, bfloat16 or float32 weights, float32 activations.

`library` compiles them; `inference.native_llama` runs a model through them. The portable kernels are their oracle.
"""

from llama31_core.kernels.native.library import NativeKernelsError, load_library

__all__ = ["NativeKernelsError", "load_library"]
