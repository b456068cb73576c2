"""The quality of one preset's images: every metric with its values on the halves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from blockcache.tools.evaluation.captions import CaptionProbe, Labelled
from blockcache.tools.evaluation.distances import SetDistances
from blockcache.tools.evaluation.pictures import Drawn
from blockcache.tools.evaluation.resampling import Resampled, resampled_mean, resampled_share
from blockcache.tools.evaluation.subject import RealPictures

ROUNDING_MSE = 1 / 12  # of 8 bits: where pictures agree better, PSNR means nothing


@dataclass(frozen=True)
class Metric:
    """A column of the table."""

    key: str
    title: str
    higher_is_better: bool
    layout: str  # of a value


METRICS = (
    Metric("frechet", "Fréchet distance", False, "{:.1f}"),
    Metric("kid", "KID × 1000", False, "{:.2f}"),
    Metric("top1", "caption top-1", True, "{:.1%}"),
    Metric("top5", "caption top-5", True, "{:.1%}"),
    Metric("distance", "distance", False, "{:.4f}"),
    Metric("own_distance", "distance to own steps uncached", False, "{:.4f}"),
    Metric("psnr_db", "PSNR dB", True, "{:.1f}"),
)
BY_KEY = {metric.key: metric for metric in METRICS}


class Judge:
    """Measures presets of one group against one reference set and one yardstick."""

    def __init__(
        self,
        halves: np.ndarray,
        latents: np.ndarray,
        reference: Drawn | None,
        sets: SetDistances | None,
        captions: Captions | None = None,
    ) -> None:
        """The yardstick is given by its ``latents`` and, where decoded, ``reference``."""
        self._halves = halves
        self._latents = latents
        self._reference = reference
        self._sets = sets
        self._captions = captions

    def measure(
        self, latents: np.ndarray, drawn: Drawn | None, own: np.ndarray | None = None
    ) -> dict[str, Resampled]:
        """Every metric that applies, by key; ``own``: latents of the same steps, uncached."""
        found = {"distance": self._mean(relative_distance(latents, self._latents))}
        if own is not None:
            found["own_distance"] = self._mean(relative_distance(latents, own))
        if drawn is None:
            return found
        if self._sets is not None:
            found["frechet"] = self._sets.frechet(drawn.features, self._halves)
            found["kid"] = self._sets.kernel(drawn.features, self._halves)
        if self._captions is not None:
            top1, top5 = self._captions.hits(drawn.features)
            found["top1"] = resampled_share(top1, self._halves)
            found["top5"] = resampled_share(top5, self._halves)
        if self._reference is not None:
            psnr = picture_psnr_db(drawn.pictures, self._reference.pictures)
            found["psnr_db"] = self._mean(psnr)
        return found

    def _mean(self, values: np.ndarray) -> Resampled:
        return resampled_mean(values, self._halves)


class Captions:
    """Whether a picture is recognised as what its caption says, one by one."""

    def __init__(self, real: RealPictures, features: np.ndarray) -> None:
        """``features``: of the real pictures, [M, D]."""
        everything = Labelled(features=features, styles=real.styles, concepts=real.concepts)
        self._probe = CaptionProbe(everything)
        self._styles, self._concepts = real.styles[real.chosen], real.concepts[real.chosen]
        score = self._probe.score(everything)
        self.ceiling: Mapping[str, float] = {"top1": score.top1, "top5": score.top5}

    def hits(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Top-1 and top-5 of every picture: 0, 1, or NaN where the concept is no candidate."""
        found = np.full((2, len(features)), np.nan)
        for image in np.flatnonzero(np.isin(self._concepts, self._probe.candidates)):
            one = slice(image, image + 1)
            score = self._probe.score(
                Labelled(
                    features=features[one],
                    styles=self._styles[one],
                    concepts=self._concepts[one],
                )
            )
            found[:, image] = score.top1, score.top5
        return found[0], found[1]


def relative_distance(latents: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Relative L2 of every image's latents to those of a reference: float64 [N]."""
    count = len(latents)
    wide, base = (x.reshape(count, -1).astype(np.float64) for x in (latents, reference))
    return np.linalg.norm(wide - base, axis=1) / np.linalg.norm(base, axis=1)


def picture_psnr_db(pictures: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """PSNR of every picture, uint8 [N, H, W, 3] both; at most 58.9 dB, the rounding to 8 bits."""
    found = []
    for ours, theirs in zip(pictures, reference, strict=True):
        error = np.square(ours.astype(np.float64) - theirs.astype(np.float64)).mean()
        found.append(10 * np.log10(255**2 / max(float(error), ROUNDING_MSE)))
    return np.array(found)
