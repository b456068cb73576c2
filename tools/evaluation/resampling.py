"""Spread of a figure, and of the difference of two, from random halves of the images.

Every figure is also computed on B random halves of the images, the same halves for all presets.
The standard deviation over halves is that of the whole around the truth (the delete-half jackknife:
a half drawn without replacement varies around the whole as the whole does, Shao & Wu 1989). We do
not bootstrap: a picture that is drawn twice would bias KID, which counts pairs, and lower the rank
in the Fréchet distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Z90 = 1.645
"""Standard deviations on either side of a normal variable's mean that hold 90 %."""


@dataclass(frozen=True)
class Resampled:
    """A figure of one preset and its values on the halves."""

    value: float
    halves: np.ndarray  # float64 [B]
    grain: float = 0.0
    """The smallest step of the figure, 1 / N for a share of images. It is added to the spread, as
    one more image with a different outcome (Agresti & Min 2005): two or three images that all fall
    on one side have next to no spread, and may be chance all the same."""


@dataclass(frozen=True)
class Interval:
    """A figure with the 90 % interval around it."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, measured: Resampled) -> Interval:
        """The value and 1.645 standard deviations of the halves on either side."""
        reach = Z90 * float(np.hypot(measured.halves.std(), measured.grain))
        return cls(measured.value, measured.value - reach, measured.value + reach)


def random_halves(count: int, resamples: int, seed: int) -> np.ndarray:
    """``resamples`` random halves of ``count`` images: int64 [B, count // 2], each sorted."""
    random = np.random.default_rng(seed)
    halves = [random.permutation(count)[: count // 2] for _ in range(resamples)]
    return np.sort(np.stack(halves), axis=1)


def resampled_mean(values: np.ndarray, halves: np.ndarray) -> Resampled:
    """The mean over images that have a value (float64 [N], NaN where one has none)."""
    return Resampled(_mean(values), np.array([_mean(values[half]) for half in halves]))


def resampled_share(hits: np.ndarray, halves: np.ndarray) -> Resampled:
    """The share of images that are hits (float64 [N]: 0, 1, or NaN where one does not count)."""
    mean = resampled_mean(hits, halves)
    return Resampled(mean.value, mean.halves, 1 / max(1, int(np.isfinite(hits).sum())))


def difference(a: Resampled, b: Resampled) -> Interval:
    """``a - b`` on the same images."""
    halves = a.halves - b.halves
    return Interval.of(Resampled(a.value - b.value, halves, max(a.grain, b.grain)))


def _mean(values: np.ndarray) -> float:
    """NaN where no image has a value."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else float("nan")
