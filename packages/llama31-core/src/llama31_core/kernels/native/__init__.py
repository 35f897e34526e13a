"""C++ kernels for a CPU, for inference and for training.

Inference: the whole model is one function, with bfloat16 or float32 weights and float32 activations. Training:
attention and its gradients, float32. `library` compiles them; `inference.native_llama` and
`training.native_attention` run them. The portable kernels are their oracle.
"""

from llama31_core.kernels.native.library import NativeKernelsError, load_library

__all__ = ["NativeKernelsError", "load_library"]
