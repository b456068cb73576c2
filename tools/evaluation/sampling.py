"""Latents of every preset from the same noise, batch by batch; a batch is drawn once and kept.

Batches do not depend on each other: other processes may draw them (``ray_workers``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from blockcache.runtime import Bundle, BundleIntegrityError, Preset, Session
from blockcache.runtime.bundles.tensor_files import preset_bytes, read_tensors, write_tensors
from blockcache.runtime.engines.choice import make_backend
from blockcache.runtime.engines.engine import Backend
from blockcache.tools.evaluation.options import DrawOptions
from blockcache.tools.evaluation.subject import Subject


@dataclass(frozen=True, kw_only=True)
class DrawTask:
    """One batch to draw: all that its latents depend on, besides bundle and preset."""

    positive: Mapping[str, np.ndarray]  # conditions by name, [N, ...]
    negative: Mapping[str, np.ndarray]
    seeds: Sequence[int]  # N of them
    guidance_scale: float


class Workers(Protocol):
    """Processes that draw batches of one bundle."""

    def draw(self, preset: Preset, tasks: Iterable[DrawTask]) -> Iterator[tuple[int, np.ndarray]]:
        """The place of each task and its latents, as they are ready."""
        ...


def draw_batch(session: Session, task: DrawTask) -> np.ndarray:
    """Latents float32 [N, C, H, W] of a batch."""
    positive, negative = dict(task.positive), dict(task.negative)
    result = session.denoise(
        session.noise(task.seeds),
        positive.pop("encoder_hidden_states"),
        negative.pop("encoder_hidden_states", None),
        conditions=positive,
        negative_conditions=negative,
        guidance_scale=task.guidance_scale,
        seeds=task.seeds,
        check_finite=True,
    )
    return result.latents


class Drawings:
    """Draws latents with a bundle; what an earlier or interrupted run has drawn is read back."""

    def __init__(
        self,
        bundle: Bundle,
        subject: Subject,
        options: DrawOptions,
        folder: Path,
        workers: Workers | None = None,
    ) -> None:
        self._bundle = bundle
        self._subject = subject
        self._options = options
        self._folder = folder
        self._workers = workers  # None: this process draws
        self._backend: Backend | None = None
        self._model_key = _model_key(bundle)

    def missing(self, preset: Preset) -> int:
        """How many images of the preset are not drawn yet."""
        return sum(len(b) for b in self._batches() if not self._file(preset, b).is_file())

    def draw(self, preset: Preset, done: Callable[[int], None] = lambda images: None) -> np.ndarray:
        """Latents float32 [N, C, H, W]; ``done`` hears how many images were newly drawn."""
        batches = self._batches()
        paths = [self._file(preset, batch) for batch in batches]
        parts = [_read(path) for path in paths]
        missing = [place for place, latents in enumerate(parts) if latents is None]
        tasks = (self._task(preset, batches[place]) for place in missing)
        drawn = 0
        for which, latents in self._drawn(preset, tasks) if missing else ():
            place = missing[which]
            parts[place] = latents
            write_tensors(paths[place], {"latents": latents})
            drawn += len(batches[place])
            done(drawn)
        return np.concatenate([latents for latents in parts if latents is not None])

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

    def _task(self, preset: Preset, batch: range) -> DrawTask:
        positive, negative = self._subject.conditions(batch)
        return DrawTask(
            positive=positive,
            negative=negative,
            seeds=[self._options.seed + image for image in batch],
            guidance_scale=self.guidance(preset),
        )

    def _drawn(self, preset: Preset, tasks: Iterable[DrawTask]) -> Iterator[tuple[int, np.ndarray]]:
        if self._workers is not None:
            yield from self._workers.draw(preset, tasks)
            return
        session = self.open(preset)
        for which, task in enumerate(tasks):
            yield which, draw_batch(session, task)


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
