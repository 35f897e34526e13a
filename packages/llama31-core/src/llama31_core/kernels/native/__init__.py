"""C++ kernels for a CPU, for inference and for training.

Inference: the whole model is one function, with bfloat16, float32 or quantised weights and float32 activations.
Training: products, attention, norms and the like with their gradients, float32. `library` compiles them;
`inference.native_llama` and `training.native_*` run them. The portable kernels are their oracle.
"""

from llama31_core.kernels.native.library import NativeKernelsError, load_library

__all__ = ["NativeKernelsError", "load_library"]
