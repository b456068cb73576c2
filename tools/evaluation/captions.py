"""A caption score: is a picture recognised as what its caption says?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WITHIN_SHRINKAGE = 0.3  # share of the identity in the within-concept covariance


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
