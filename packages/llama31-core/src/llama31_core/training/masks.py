"""Which key each query sees, as what is added to the scores: segment ids and places in, biases out. No tensors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

HIDDEN = -1e30  # finite, so that a row that sees nothing softmaxes to numbers
Places = npt.NDArray[np.int64]


def bias(segment_ids_BT: npt.NDArray[np.int32], queries: Places, keys: Places) -> npt.NDArray[np.float32]:
    """0 for a key that a query sees, else very negative, (B, queries, keys); of whole sequences' places.

    A token sees itself and what stands before it in its own segment.
    """
    is_later = keys[None, :] > queries[:, None]
    is_foreign = segment_ids_BT[:, queries][:, :, None] != segment_ids_BT[:, keys][:, None, :]
    return np.where(is_later[None] | is_foreign, np.float32(HIDDEN), np.float32(0))
