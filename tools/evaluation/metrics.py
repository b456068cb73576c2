"""How good pictures are: distances between sets, a caption score, distances between pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

WITHIN_SHRINKAGE = 0.3  # share of the identity in the within-concept covariance


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Mean and covariance of a set's features."""

    mean: np.ndarray  # float64 [D]
    covariance: np.ndarray  # float64 [D, D]

    @classmethod
    def of(cls, features: np.ndarray) -> Statistics:
        """Statistics of float [N, D]."""
        wide = features.astype(np.float64)
        return cls(mean=wide.mean(0), covariance=np.cov(wide, rowvar=False))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) (Heusel et al., 2017)."""
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ b.covariance @ root)
    shift = a.mean - b.mean
    trace = np.trace(a.covariance) + np.trace(b.covariance)
    return float(shift @ shift + trace - 2 * np.sqrt(cross.clip(min=0)).sum())


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """KID: the unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al., 2018).

    Args:
        a: float [N, D].
        b: float [M, D].
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    within = _mean_off_diagonal(_kernel(a, a)) + _mean_off_diagonal(_kernel(b, b))
    return float(within - 2 * _kernel(a, b).mean())


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _mean_off_diagonal(matrix: np.ndarray) -> float:
    count = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / (count * (count - 1)))


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 pictures; infinite where they are equal."""
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Features of pictures with the style and concept each is meant to show."""

    features: np.ndarray  # float [N, D]
    styles: np.ndarray  # str [N]
    concepts: np.ndarray  # str [N]

    def keep(self, mask: np.ndarray) -> Labelled:
        """The chosen pictures."""
        return Labelled(
            features=self.features[mask], styles=self.styles[mask], concepts=self.concepts[mask]
        )


@dataclass(frozen=True, kw_only=True)
class CaptionScore:
    """How often a picture is recognised as what its caption says."""

    top1: float
    top5: float
    candidates: int  # concepts to choose from
    pictures: int


class CaptionProbe:
    """Names a picture by the nearest concept as *other* styles draw it.

    Real pictures give one prototype per concept, the mean over all styles but that of the picture
    in question, in a space where the differences between styles of one concept are whitened (as
    in linear discriminant analysis). A copied training picture therefore gets no credit for being
    a copy, and real pictures are scored by the same rule: that score is the ceiling.
    """

    def __init__(self, real: Labelled) -> None:
        self._styles = sorted(set(real.styles))
        names, counts = np.unique(real.concepts, return_counts=True)
        self.candidates = names[counts == len(self._styles)]
        if len(self.candidates) == 0:
            raise ValueError("expected concepts that every style draws, found none: add pictures")
        kept = real.keep(np.isin(real.concepts, self.candidates))
        self._center = kept.features.mean(0)
        self._whitening = _whitening(kept)
        self._prototypes = {s: self._prototype(kept.keep(kept.styles != s)) for s in self._styles}

    def _project(self, features: np.ndarray) -> np.ndarray:
        projected = (features - self._center) @ self._whitening
        return projected / np.linalg.norm(projected, axis=1, keepdims=True).clip(min=1e-12)

    def _prototype(self, real: Labelled) -> np.ndarray:
        projected = self._project(real.features)
        sums = np.zeros((len(self.candidates), projected.shape[1]))
        np.add.at(sums, np.searchsorted(self.candidates, real.concepts), projected)
        return sums / np.linalg.norm(sums, axis=1, keepdims=True).clip(min=1e-12)

    def score(self, pictures: Labelled) -> CaptionScore:
        """Top-1 and top-5 accuracy over the pictures whose concept is a candidate."""
        kept = pictures.keep(np.isin(pictures.concepts, self.candidates))
        ranks = np.empty(len(kept.concepts))
        for style in self._styles:
            mask = kept.styles == style
            similarity = self._project(kept.features[mask]) @ self._prototypes[style].T
            truth = np.searchsorted(self.candidates, kept.concepts[mask])
            own = np.take_along_axis(similarity, truth[:, None], axis=1)
            ranks[mask] = (similarity > own).sum(1)
        return CaptionScore(
            top1=float((ranks < 1).mean()),
            top5=float((ranks < 5).mean()),
            candidates=len(self.candidates),
            pictures=len(ranks),
        )


def _whitening(real: Labelled) -> np.ndarray:
    """Inverse root of the shrunken within-concept covariance: float64 [D, D]."""
    _, index, counts = np.unique(real.concepts, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), real.features.shape[1]))
    np.add.at(sums, index, real.features.astype(np.float64))
    within = np.cov(real.features - (sums / counts[:, None])[index], rowvar=False)
    scale = np.trace(within) / len(within)
    values, vectors = np.linalg.eigh(
        (1 - WITHIN_SHRINKAGE) * within + WITHIN_SHRINKAGE * scale * np.eye(len(within))
    )
    return (vectors / np.sqrt(values)) @ vectors.T
