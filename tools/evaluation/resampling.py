"""Spread of a figure, and of the difference of two, from random halves of the images.

Every figure is also computed on B random halves of the images, the same halves for all presets.
How a half deviates from the mean of all halves has the spread that the whole has around the truth
(the delete-half jackknife: the variance of a half around the whole, drawn without replacement, is
that of the whole, Shao & Wu 1989). A bootstrap with replacement would do for means, but not here:
the copies of a picture count as pairs in KID and lower the rank in the Fréchet distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COVERAGE = 0.90


@dataclass(frozen=True)
class Measured:
    """A figure of one preset and its values on the halves."""

    value: float
    halves: np.ndarray  # float64 [B]


@dataclass(frozen=True)
class Interval:
    """A figure with the 90 % interval around it."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, measured: Measured) -> Interval:
        """The quantiles of the halves' deviations, set around the value."""
        deviations = measured.halves - measured.halves.mean()
        tail = (1 - COVERAGE) / 2
        low, high = np.quantile(deviations, [tail, 1 - tail])
        return cls(measured.value, measured.value + float(low), measured.value + float(high))


def random_halves(count: int, resamples: int, seed: int) -> np.ndarray:
    """``resamples`` random halves of ``count`` images: int64 [B, count // 2], each sorted."""
    random = np.random.default_rng(seed)
    halves = [random.permutation(count)[: count // 2] for _ in range(resamples)]
    return np.sort(np.stack(halves), axis=1)


def measured_mean(values: np.ndarray, halves: np.ndarray) -> Measured:
    """The mean over images that have a value (float64 [N], NaN where one has none)."""
    return Measured(_mean(values), np.array([_mean(values[half]) for half in halves]))


def difference(a: Measured, b: Measured) -> Interval:
    """``a - b`` on the same images."""
    return Interval.of(Measured(a.value - b.value, a.halves - b.halves))


def _mean(values: np.ndarray) -> float:
    """NaN where no image has a value."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else float("nan")
