"""Latents of every preset from the same noise, batch by batch; a batch is drawn once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from blockcache.runtime import Bundle, BundleIntegrityError, Preset, Session
from blockcache.runtime.bundles.tensor_files import preset_bytes, read_tensors, write_tensors
from blockcache.runtime.engines.choice import make_backend
from blockcache.runtime.engines.engine import Backend
from blockcache.tools.evaluation.options import DrawOptions
from blockcache.tools.evaluation.subject import Subject


class Drawings:
    """Draws latents with a bundle; what an earlier or interrupted run has drawn is read back."""

    def __init__(
        self, bundle: Bundle, subject: Subject, options: DrawOptions, folder: Path
    ) -> None:
        self._bundle = bundle
        self._subject = subject
        self._options = options
        self._folder = folder
        self._backend: Backend | None = None
        self._model_key = _model_key(bundle)

    def missing(self, preset: Preset) -> int:
        """How many images of the preset are not drawn yet."""
        return sum(len(b) for b in self._batches() if not self._file(preset, b).is_file())

    def draw(self, preset: Preset, done: Callable[[int], None] = lambda images: None) -> np.ndarray:
        """Latents float32 [N, C, H, W]; ``done`` hears how many images were newly drawn."""
        session: Session | None = None
        parts, drawn = [], 0
        for batch in self._batches():
            path = self._file(preset, batch)
            latents = _read(path)
            if latents is None:
                session = session or Session(self._bundle, preset, self._engines())
                latents = self._denoise(session, batch)
                write_tensors(path, {"latents": latents})
                drawn += len(batch)
                done(drawn)
            parts.append(latents)
        return np.concatenate(parts)

    def guidance(self, preset: Preset) -> float:
        """The scale of classifier-free guidance that the preset is drawn with."""
        given = self._options.guidance
        return preset.guidance_scale if given is None else given

    def open(self, preset: Preset) -> Session:
        """A session on the same engines."""
        return Session(self._bundle, preset, self._engines())

    def key(self, preset: Preset) -> str:
        """What the preset's latents depend on, besides prompts and noise."""
        content = hashlib.sha256(preset_bytes(preset))
        facts = [dict(preset.solver), self.guidance(preset), self._model_key, self._options.backend]
        content.update(json.dumps(facts, sort_keys=True).encode())
        return f"{preset.name}-{content.hexdigest()[:16]}"

    def _engines(self) -> Backend:
        if self._backend is None:
            self._backend = make_backend(
                self._options.backend, threads=self._options.threads, bundle=self._bundle
            )
        return self._backend

    def _batches(self) -> list[range]:
        count, size = self._options.images, self._options.batch
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def _file(self, preset: Preset, batch: range) -> Path:
        seeds = f"{self._options.seed} {batch}"
        content = hashlib.sha256(seeds.encode())
        for side in self._subject.conditions(batch):
            for name, values in sorted(side.items()):
                content.update(f"{name} {values.shape}".encode())
                content.update(np.ascontiguousarray(values).tobytes())
        name = f"{batch.start:06d}-{content.hexdigest()[:16]}.safetensors"
        return self._folder / self.key(preset) / name

    def _denoise(self, session: Session, batch: range) -> np.ndarray:
        positive, negative = self._subject.conditions(batch)
        seeds = [self._options.seed + image for image in batch]
        result = session.denoise(
            session.noise(seeds),
            positive.pop("encoder_hidden_states"),
            negative.pop("encoder_hidden_states", None),
            conditions=positive,
            negative_conditions=negative,
            guidance_scale=self.guidance(session.preset),
            seeds=seeds,
            check_finite=True,
        )
        return result.latents


def _read(path: Path) -> np.ndarray | None:
    """A stored batch; None where there is none, or one that does not read back."""
    if not path.is_file():
        return None
    try:
        return read_tensors(path).get("latents")
    except BundleIntegrityError:
        return None


def _model_key(bundle: Bundle) -> str:
    """The segments' contents, as the manifest promises them."""
    segments = [
        f"{name} {entry.sha256}"
        for name, entry in sorted(bundle.manifest.files.items())
        if name.startswith("segments/")
    ]
    return hashlib.sha256("\n".join(segments).encode()).hexdigest()[:16]
