"""A mean of few values with its 95 % interval, by Student's t. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit  # scipy.stats would take a second to load


@dataclass(frozen=True)
class Estimate:
    """Mean over n values, their standard deviation, and half the width of the mean's 95 % interval (NaN for one value).

    Of seeds in a report, of disjoint sets of images in an evaluation.
    """

    mean: float
    std: float
    half_width: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Estimate:
        """From the values, at least one: mean +- t(0.975, n - 1) * std / sqrt(n), std with n - 1."""
        array = np.array(list(values), dtype=float)
        n = len(array)
        std = float(array.std(ddof=1)) if n > 1 else math.nan
        return cls(float(array.mean()), std, float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n) if n > 1 else math.nan, n)

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width
