"""What restricts a completion token by token: tokens so far in, the tokens that may follow out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt


class LogitsMask(Protocol):
    """Follows one completion. The engine asks before each draw and tells each drawn token that does not end it."""

    def allowed(self) -> npt.NDArray[np.bool_]:
        """The tokens (V,) that may come next; that which ends the completion is among them when it may end."""

    def accept(self, token: int) -> None:
        """Go on by a token that was allowed."""

    @property
    def terminated(self) -> bool:
        """Whether nothing may follow any more: the completion ends without a stop token."""


# Makes a mask at its beginning, for each completion of a request.
LogitsMaskFactory = Callable[[], LogitsMask]
