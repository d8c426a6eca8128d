"""A mean over the last values, for what is shown of a training."""

from __future__ import annotations

import math


class RunningMean:
    """An exponentially weighted mean that the first value does not outweigh.

    Values that are not finite, as of a step that was skipped, are left out.

    Args:
        keep: weight that all values before keep when one is added.
    """

    def __init__(self, keep: float) -> None:
        self.keep = keep
        self._sum = self._weight = 0.0

    def add(self, value: float) -> float:
        """Take one more value and return the mean; NaN as long as none was finite."""
        if math.isfinite(value):
            self._sum = self.keep * self._sum + (1 - self.keep) * value
            self._weight = self.keep * self._weight + (1 - self.keep)
        return self._sum / self._weight if self._weight else math.nan
