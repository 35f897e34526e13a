"""The frequencies of rotary position embedding: a configuration in, radians per position out."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from llama31_core.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> npt.NDArray[np.float32]:
    """Radians per position of each pair of a head, shape (head_dim / 2,).

    Su et al. 2021, equation 15, with Llama 3.1's scaling (`apply_scaling` in Meta's llama-models
    `models/llama3/model.py`): long wavelengths are stretched by `factor`, short ones stay, those between are blended.

    The reference implementations round to float32 after every operation, and at position 131,071 one unit in the last
    place of a frequency is an angle of up to 0.008. So the same roundings are made here. The power is rounded once,
    from float64: NumPy's float32 power is some units off.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    powers = np.power(config.rope_theta, exponents.astype(np.float64)).astype(np.float32)
    frequencies: npt.NDArray[np.float32] = np.float32(1.0) / powers
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    factor, context = np.float32(scaling.factor), np.float32(scaling.original_max_seq_len)
    one = np.float32(1.0)  # torch divides a number by a tensor as the number times the reciprocal
    wavelengths = one / frequencies * np.float32(2 * math.pi)
    blend = (one / wavelengths * context - low) / (high - low)  # 0: a long wavelength, 1: a short one
    blended = (one - blend) * frequencies / factor + blend * frequencies
    is_long, is_short = wavelengths > context / low, wavelengths < context / high
    return np.where(is_long, frequencies / factor, np.where(is_short, frequencies, blended)).astype(np.float32)
