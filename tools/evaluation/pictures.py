"""Latents as pictures and as features; both are made once and kept beside the latents."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from blockcache.runtime import BundleIntegrityError
from blockcache.runtime.bundles.tensor_files import read_tensors, write_tensors
from blockcache.tools.evaluation.subject import RealPictures

if TYPE_CHECKING:
    from blockcache.tools.evaluation.features import Extractor

CHUNK = 64  # pictures in one file


@dataclass(frozen=True)
class Drawn:
    """The pictures of one preset."""

    pictures: np.ndarray  # uint8 [N, H, W, 3]
    features: np.ndarray  # float32 [N, D]


class Gallery:
    """Decodes latents and looks at pictures with the metrics' feature network."""

    def __init__(
        self, decode: Callable[[np.ndarray], np.ndarray], decoder: str, folder: Path
    ) -> None:
        """``decoder`` names the decoder's weights; ``folder`` is where results are kept."""
        self._decode = decode
        self._decoder = decoder
        self._folder = folder
        self._extractor: Extractor | None = None

    def check(self) -> None:
        """Raise MissingExtraError early where the feature network is not installed."""
        self._features()

    def of(self, latents: np.ndarray, done: Callable[[int], None] = lambda images: None) -> Drawn:
        """Pictures and features of latents [N, C, H, W]; ``done`` counts pictures made anew."""
        starts = range(0, len(latents), CHUNK)
        chunks = [latents[start : start + CHUNK] for start in starts]
        found = [self._read(chunk) for chunk in chunks]
        missing = [place for place, chunk in enumerate(found) if chunk is None]
        if missing:
            made = self._make([chunks[place] for place in missing], done)
            for place, chunk in zip(missing, made, strict=True):
                write_tensors(self._file(chunks[place]), chunk)
                found[place] = chunk
        whole = [chunk for chunk in found if chunk is not None]
        return Drawn(*(np.concatenate([chunk[name] for chunk in whole]) for name in _NAMES))

    def real(self, real: RealPictures, done: Callable[[int], None]) -> np.ndarray:
        """Features of the reference set, float32 [M, D], kept in its own folder."""
        from blockcache.tools.evaluation import features

        return features.cached(real.pictures, real.folder, self._features, done)

    def _make(
        self, chunks: list[np.ndarray], done: Callable[[int], None]
    ) -> list[dict[str, np.ndarray]]:
        """Decode all, then look at all: setting up the feature network costs seconds a call."""
        decoded = [self._decode(chunk) for chunk in chunks]
        pictures = np.concatenate(decoded)
        pooled = self._features().pooled(pictures.transpose(0, 3, 1, 2).copy(), done)
        ends = np.cumsum([len(chunk) for chunk in decoded])[:-1]
        return [
            {"pictures": chunk, "features": features}
            for chunk, features in zip(decoded, np.split(pooled, ends), strict=True)
        ]

    def _read(self, latents: np.ndarray) -> dict[str, np.ndarray] | None:
        """What is kept of these latents; None where nothing is, or it does not read back."""
        path = self._file(latents)
        try:
            return read_tensors(path) if path.is_file() else None
        except BundleIntegrityError:
            return None

    def _file(self, latents: np.ndarray) -> Path:
        return self._folder / f"{self._key(latents)}.safetensors"

    def _key(self, latents: np.ndarray) -> str:
        from blockcache.tools.evaluation import features

        content = hashlib.sha256(features.VERSION + self._decoder.encode())
        content.update(f"{latents.shape}".encode())
        content.update(np.ascontiguousarray(latents).tobytes())
        return content.hexdigest()[:32]

    def _features(self) -> Extractor:
        if self._extractor is None:
            from blockcache.tools.evaluation import features

            with contextlib.redirect_stdout(sys.stderr):  # the package prints; ours is JSON
                self._extractor = features.Extractor()
        return self._extractor


_NAMES = ("pictures", "features")
