"""Loss scaling (Micikevicius et al. 2018, section 3.2): small gradients of half-precision products stay above zero."""

from __future__ import annotations

from dataclasses import dataclass

_MAX = 2.0**24


@dataclass
class LossScale:
    """A factor that halves (or falls by `factor`) when gradients overflow and rises after `window` steps without.

    A `factor` of 1 keeps the value as it is.
    """

    value: float = 1.0
    factor: float = 1.0
    window: int = 1000
    num_good_steps: int = 0

    def update(self, *, is_overflow: bool) -> None:
        """Take note of a step."""
        if is_overflow:
            self.value = max(1.0, self.value / self.factor)
            self.num_good_steps = 0
            return
        self.num_good_steps += 1
        if self.num_good_steps == self.window:
            self.value = min(_MAX, self.value * self.factor)
            self.num_good_steps = 0
