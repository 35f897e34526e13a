"""Whether a run trains on anything: steps and their labels in, a warning or the end of the run out."""

from __future__ import annotations

import logging

from llama31_core.errors import DatasetError
from llama31_core.training.batch import IGNORED_LABEL

_LOG = logging.getLogger(__name__)


class LabelWatch:
    """Counts steps that train on nothing.

    Args:
        source: the data, as messages call it.
        patience: steps of one pass over the data, or of the run if that is shorter.
    """

    def __init__(self, source: str, patience: int) -> None:
        self._source, self._patience = source, patience
        self._num_empty, self._has_labels = 0, False

    def see(self, step: int, num_labels: int) -> None:
        """Take note of a step.

        Raises:
            DatasetError: no step had a label until now, over all data or the whole run.
        """
        if num_labels:
            self._has_labels = True
            return
        self._num_empty += 1
        _LOG.warning("step %d: no label of the batch is trained on; the step is left out", step)
        if not self._has_labels and self._num_empty >= self._patience:
            raise DatasetError(
                f"{self._source}: no token of the records of {self._num_empty} steps is trained on (every label is "
                f"{IGNORED_LABEL}); preprocess again, with a longer sequence if answers were cut off"
            )
