"""Rounding that knows the inputs: a matrix and the second moments of what it is multiplied with in, numbers out.

Frantar et al. 2022 (GPTQ): columns are rounded one after the other, and what the rounding of one does to the output is
made up for in those not yet rounded. The columns with the largest inputs come first; scales and biases of the groups
are chosen before, so the order needs not be stored. Shapes: N = out_features, K = in_features.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llama31_core.checkpoint.quantized import (
    QuantizedMatrix,
    choose_ranges,
    from_numbers,
    round_to_numbers,
)

_DAMPING = 0.01  # of the mean second moment, added to all: few texts leave some directions without any input
_BLOCK = 128  # columns whose effect on the later ones is applied at once
_SHRINKS = (1, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a group's range, tried for the least error

Floats = npt.NDArray[np.float32]
Moments = npt.NDArray[np.float64]


def quantize_for_inputs(weights: Floats, moments: Moments, bits: int, group_size: int) -> QuantizedMatrix:
    """A matrix (N, K) rounded for inputs whose second moments, X^T X, are (K, K)."""
    importance = np.diag(moments).astype(np.float32)
    scales, biases = choose_ranges(weights, bits, group_size, importance, _SHRINKS)
    order = np.argsort(-importance, kind="stable")
    factor = _inverse_factor(moments[np.ix_(order, order)])
    # Everything with columns first: each is then together in memory.
    groups = order // group_size
    left, columns_scales, columns_biases = weights.T[order], scales.T[groups], biases.T[groups]
    numbers = np.empty(left.shape, np.int32)
    for start in range(0, len(order), _BLOCK):
        stop = min(start + _BLOCK, len(order))
        errors = np.empty((stop - start, len(weights)), np.float32)
        for at in range(start, stop):
            scale, bias = columns_scales[at], columns_biases[at]
            numbers[order[at]] = rounded = round_to_numbers(left[at], scale, bias, bits)
            error = (left[at] - (rounded * scale + bias)) / factor[at, at]
            left[at + 1 : stop] -= np.outer(factor[at, at + 1 : stop], error)
            errors[at - start] = error
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return from_numbers(numbers.T, scales, biases, bits, group_size)


def _inverse_factor(moments: Moments) -> Floats:
    """The upper factor U of the inverse, U^T U = (moments + damping)^-1: row i says how column i's error spreads."""
    silent = np.diag(moments) == 0
    damped = moments + np.eye(len(moments)) * max(_DAMPING * float(np.mean(np.diag(moments))), 1e-12)
    damped[silent, silent] = damped[silent, silent] + 1.0
    return np.asarray(np.linalg.cholesky(np.linalg.inv(damped)).T, np.float32)  # numpy's factor is the lower one
