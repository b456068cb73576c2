"""The slow stages of an evaluation: time, draw, decode, measure; what they make is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from blockcache.export import Observer
from blockcache.export.observer import unobserved
from blockcache.runtime import Bundle, Preset
from blockcache.tools.evaluation import distances, timing
from blockcache.tools.evaluation.contest import Contestant, Group
from blockcache.tools.evaluation.distances import SetDistances
from blockcache.tools.evaluation.options import EvaluationOptions
from blockcache.tools.evaluation.pictures import Drawn, Gallery
from blockcache.tools.evaluation.quality import Captions, Judge
from blockcache.tools.evaluation.resampling import Resampled, random_halves
from blockcache.tools.evaluation.sampling import Drawings, Workers
from blockcache.tools.evaluation.subject import Subject


@dataclass(frozen=True)
class Reference:
    """What sets of pictures are compared with; empty where latents alone are compared."""

    sets: SetDistances | None = None
    captions: Captions | None = None
    floor: Mapping[str, Sequence[float]] = field(default_factory=dict)  # real against real


@dataclass(frozen=True)
class Judged:
    """The measured presets of a group: by preset name, then by metric key."""

    measured: Mapping[str, Mapping[str, Resampled]]
    against: Reference


class Stages:
    """One bundle on one subject; everything slow is kept under ``work`` and read back."""

    def __init__(
        self,
        bundle: Bundle,
        subject: Subject,
        options: EvaluationOptions,
        work: Path,
        observer: Observer = unobserved,
        workers: Workers | None = None,
    ) -> None:
        self._bundle = bundle
        self._subject = subject
        self._options = options
        self._work = work
        self._observer = observer
        self._drawings = Drawings(bundle, subject, options.draw, work / "latents", workers)
        # The same prompts from other noise, to compare sets with where there are no real pictures.
        draw = options.draw
        again = replace(draw, seed=draw.seed + draw.images)
        self._independent = Drawings(bundle, subject, again, work / "latents", workers)
        self._gallery = (
            None
            if subject.decode is None
            else Gallery(subject.decode, subject.decoder, work / "pictures")
        )
        self._halves = random_halves(options.draw.images, options.resamples, options.draw.seed)

    def check(self) -> None:
        """Raise MissingExtraError where pictures cannot be looked at."""
        if self._gallery is not None:
            self._gallery.check()

    def time(self, contestants: Sequence[Contestant]) -> timing.Seconds:
        """Seconds per call, all presets taking turns; {} where timing is off."""
        if not self._options.timing.rounds:
            return {}
        return timing.measure(
            contestants,
            self._drawings,
            self._subject,
            self._options.timing,
            self._work,
            lambda done, total: self._observer("timing", done, total),
        )

    def draw(self, presets: Sequence[Preset]) -> dict[str, np.ndarray]:
        """Latents by preset name."""
        return self._draw(self._drawings, presets, "images drawn")

    def _draw(
        self, drawings: Drawings, presets: Sequence[Preset], stage: str
    ) -> dict[str, np.ndarray]:
        missing = {preset.name: drawings.missing(preset) for preset in presets}
        total, before, latents = sum(missing.values()), 0, {}
        for preset in presets:
            observe = _Offset(self._observer, stage, before, total)
            latents[preset.name] = drawings.draw(preset, observe)
            before += missing[preset.name]
        return latents

    def decode(self, latents: Mapping[str, np.ndarray]) -> dict[str, Drawn]:
        """Pictures and features by preset name; {} where there is no decoder."""
        if self._gallery is None:
            return {}
        return self._decode(self._gallery, latents, "pictures, features")

    def _decode(
        self, gallery: Gallery, latents: Mapping[str, np.ndarray], stage: str
    ) -> dict[str, Drawn]:
        images = self._options.draw.images
        drawn: dict[str, Drawn] = {}
        for place, (name, values) in enumerate(latents.items()):
            observe = _Offset(self._observer, stage, place * images, len(latents) * images)
            drawn[name] = gallery.of(values, observe)
            observe(images)
        return drawn

    def judge(
        self, groups: Sequence[Group], latents: Mapping[str, np.ndarray], drawn: Mapping[str, Drawn]
    ) -> list[Judged]:
        """The quality of every group's presets."""
        real = self._real_features() if drawn else None
        shared = None if real is None else self._real_reference(real)
        total, done, found = sum(len(group.contestants) for group in groups), 0, []
        for group in groups:
            yardstick = group.yardstick.name
            against = shared or self._drawn_reference(group, drawn)
            judge = Judge(
                self._halves,
                latents[yardstick],
                drawn.get(yardstick),
                against.sets,
                against.captions,
            )
            measured = {}
            for contestant in group.contestants:
                self._observer("quality", done, total)
                own = group.own_uncached(contestant) if group.converged else None
                measured[contestant.name] = judge.measure(
                    latents[contestant.name],
                    drawn.get(contestant.name),
                    None if own is None else latents[own.name],
                )
                done += 1
            found.append(Judged(measured, against))
        self._observer("quality", total, total)
        return found

    def _real_features(self) -> np.ndarray | None:
        real = self._subject.real
        if real is None or self._gallery is None:
            return None
        total = len(real.pictures)
        return self._gallery.real(
            real, lambda done: self._observer("features of real pictures", done, total)
        )

    def _real_reference(self, features: np.ndarray) -> Reference:
        assert self._subject.real is not None
        captions = Captions(self._subject.real, features)
        return Reference(SetDistances(features), captions, self._floor(features))

    def _drawn_reference(self, group: Group, drawn: Mapping[str, Drawn]) -> Reference:
        """The converged run's own pictures; else the uncached run's, from other noise."""
        if self._gallery is None:
            return Reference()
        if group.converged is not None:
            return Reference(SetDistances(drawn[group.converged.name].features))
        preset = group.reference.preset
        stage = f"{preset.name} from other noise"
        latents = self._draw(self._independent, [preset], stage)
        found = self._decode(self._gallery, latents, f"{stage}: features")
        return Reference(SetDistances(found[preset.name].features))

    def _floor(self, features: np.ndarray) -> dict[str, list[float]]:
        draw = self._options.draw
        return distances.floor(features, draw.images, draw.seed)


class _Offset:
    """Reports one part of a stage as progress of the whole stage."""

    def __init__(self, observer: Observer, stage: str, before: int, total: int) -> None:
        self._observer, self._stage = observer, stage
        self._before, self._total = before, total

    def __call__(self, done: int) -> None:
        self._observer(self._stage, self._before + done, self._total)
