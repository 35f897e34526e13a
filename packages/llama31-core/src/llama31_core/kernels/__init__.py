"""The operations a Llama model is made of, behind one small interface that is chosen by device.

`portable` is written with MindSpore operators that every device has; it is also the oracle for any other set.
"""

from llama31_core.kernels.portable import (
    apply_rope,
    causal_attention,
    linear,
    paged_attention,
    rms_norm,
    swiglu,
    write_cache,
)

__all__ = ["apply_rope", "causal_attention", "linear", "paged_attention", "rms_norm", "swiglu", "write_cache"]
