"""Fréchet distance and KID of a set of pictures, and of many halves of it, to a fixed reference.

The Fréchet distance (Heusel et al., 2017) of two sets with means a, b and covariances A, B is
|a - b|^2 + tr (A + B - 2 (A^1/2 B A^1/2)^1/2). With A the reference's covariance and F the centred
features of n pictures, tr (A^1/2 B A^1/2)^1/2 is the sum of the singular values of
F A^1/2 / (n - 1)^1/2. They follow from the eigenvalues of an n x n matrix, so a half costs little,
and the result is exact also where n < D.

KID (Binkowski et al., 2018) is the unbiased squared MMD under the kernel (x.y / D + 1)^3. It needs
the kernel of the pictures among themselves once.
"""

from __future__ import annotations

import numpy as np

from blockcache.tools.evaluation.resampling import Resampled

KID_UNIT = 1000  # KID is reported in thousandths
ROWS = 1024  # kernel rows held at a time
NO_HALVES = np.empty((0, 0), np.int64)
"""Where the distance of the whole set is wanted alone."""


class SetDistances:
    """Distances to one reference set, which is held fixed."""

    def __init__(self, reference: np.ndarray) -> None:
        """``reference``: features float [M, D]."""
        self._reference = reference.astype(np.float64)
        self._mean = self._reference.mean(0)
        covariance = np.cov(self._reference, rowvar=False)
        self._trace = float(np.trace(covariance))
        values, vectors = np.linalg.eigh(covariance)
        self._root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
        self._within = _mean_pair(self._reference)

    def frechet(self, features: np.ndarray, halves: np.ndarray = NO_HALVES) -> Resampled:
        """Fréchet distance of features [N, D] and of their halves, int [B, N // 2]."""
        centred = features.astype(np.float64) - self._mean
        projected = centred @ self._root
        squares = np.square(centred).sum(1)

        def distance(chosen: np.ndarray) -> float:
            count = len(chosen)
            shift = centred[chosen].mean(0)
            spread = (squares[chosen].sum() - count * shift @ shift) / (count - 1)
            cross = _sum_of_singular_values(projected[chosen]) / np.sqrt(count - 1)
            return float(shift @ shift + self._trace + spread - 2 * cross)

        whole = distance(np.arange(len(features)))
        return Resampled(whole, np.array([distance(half) for half in halves]))

    def kernel(self, features: np.ndarray, halves: np.ndarray = NO_HALVES) -> Resampled:
        """KID x 1000 of features [N, D] and of their halves, int [B, N // 2]."""
        wide = features.astype(np.float64)
        own = _kernel(wide, wide)
        np.fill_diagonal(own, 0)
        across = _mean_over(wide, self._reference)

        def distance(chosen: np.ndarray) -> float:
            pairs = len(chosen) * (len(chosen) - 1)
            within = float(own[np.ix_(chosen, chosen)].sum()) / pairs + self._within
            return KID_UNIT * (within - 2 * float(across[chosen].mean()))

        whole = distance(np.arange(len(features)))
        return Resampled(whole, np.array([distance(half) for half in halves]))


def _sum_of_singular_values(rows: np.ndarray) -> float:
    """Of the centred rows [n, D], through the smaller of the two Gram matrices."""
    centred = rows - rows.mean(0)
    gram = centred @ centred.T if len(rows) <= rows.shape[1] else centred.T @ centred
    return float(np.sqrt(np.linalg.eigvalsh(gram).clip(min=0)).sum())


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(x.y / D + 1)^3 (Binkowski et al., 2018)."""
    base = a @ b.T / a.shape[1] + 1
    return base * base * base


def _mean_over(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The kernel of every row of ``a`` with ``b``, averaged over ``b``: float64 [N]."""
    parts = [_kernel(a[start : start + ROWS], b).mean(1) for start in range(0, len(a), ROWS)]
    return np.concatenate(parts)


def _mean_pair(a: np.ndarray) -> float:
    """The mean kernel over all pairs of different rows."""
    diagonal = (np.square(a).sum(1) / a.shape[1] + 1) ** 3
    total = _mean_over(a, a).sum() * len(a) - diagonal.sum()
    return float(total / (len(a) * (len(a) - 1)))


def floor(features: np.ndarray, images: int, seed: int, repeats: int = 3) -> dict[str, list[float]]:
    """Real against real: ``images`` random pictures against the others (at most half of them).

    Returns:
        By metric key, the values of ``repeats`` draws.
    """
    random = np.random.default_rng(seed)
    count = min(images, len(features) // 2)
    found: dict[str, list[float]] = {"frechet": [], "kid": []}
    for _ in range(repeats):
        order = random.permutation(len(features))
        sets = SetDistances(features[order[count:]])
        found["frechet"].append(sets.frechet(features[order[:count]]).value)
        found["kid"].append(sets.kernel(features[order[:count]]).value)
    return found
