"""The order of an evaluation, once: time, draw, decode, measure, report, picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np

from blockcache.runtime import Bundle
from blockcache.runtime.bundle import write_text
from blockcache.tools.bench.latency import machine_facts
from blockcache.tools.evaluation import distances, figures, timing
from blockcache.tools.evaluation.contest import Entrant, Group, make_groups
from blockcache.tools.evaluation.distances import SetDistances
from blockcache.tools.evaluation.markdown import markdown
from blockcache.tools.evaluation.options import EvaluationOptions
from blockcache.tools.evaluation.pictures import Drawn, Gallery
from blockcache.tools.evaluation.quality import Captions, Judge, relative_distance
from blockcache.tools.evaluation.report import (
    GroupReport,
    Report,
    group_report,
    spread_over_images,
)
from blockcache.tools.evaluation.resampling import Measured, random_halves
from blockcache.tools.evaluation.sampling import Drawings
from blockcache.tools.evaluation.subject import Subject

WORK = "work"


class Observer(Protocol):
    """Hears how far an evaluation is."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` units of ``stage`` are finished."""


class Evaluation:
    """One bundle on one subject; everything slow is kept under ``work`` and read back."""

    def __init__(
        self,
        bundle: Bundle,
        subject: Subject,
        options: EvaluationOptions,
        work: Path,
        observer: Observer = lambda stage, done, total: None,
    ) -> None:
        self._bundle = bundle
        self._subject = subject
        self._options = options
        self._work = work
        self._observer = observer
        self._drawings = Drawings(bundle, subject, options.draw, work / "latents")
        # The same prompts from other noise, to compare sets with where there are no real pictures.
        draw = options.draw
        again = replace(draw, seed=draw.seed + draw.images)
        self._independent = Drawings(bundle, subject, again, work / "latents")
        self._gallery = (
            None
            if subject.decode is None
            else Gallery(subject.decode, subject.decoder, work / "pictures")
        )
        if self._gallery is not None:
            self._gallery.check()
        self._halves = random_halves(options.draw.images, options.resamples, options.draw.seed)

    def time(self, entrants: Sequence[Entrant]) -> timing.Seconds:
        """Seconds per call, all presets taking turns; {} where timing is off."""
        if not self._options.timing.rounds:
            return {}
        return timing.measure(
            entrants,
            self._drawings,
            self._subject,
            self._options.timing,
            self._work,
            lambda done, total: self._observer("timing", done, total),
        )

    def draw(self, entrants: Sequence[Entrant]) -> dict[str, np.ndarray]:
        """Latents by preset name."""
        return self._draw(self._drawings, entrants, "images drawn")

    def _draw(
        self, drawings: Drawings, entrants: Sequence[Entrant], stage: str
    ) -> dict[str, np.ndarray]:
        missing = {entrant.name: drawings.missing(entrant.preset) for entrant in entrants}
        total, before, latents = sum(missing.values()), 0, {}
        for entrant in entrants:
            observe = _Offset(self._observer, stage, before, total)
            latents[entrant.name] = drawings.draw(entrant.preset, observe)
            before += missing[entrant.name]
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
    ) -> list[_Judged]:
        """The quality of every group's presets."""
        real = self._real_features() if drawn else None
        shared = None if real is None else self._real_reference(real)
        total, done, found = sum(len(group.entrants) for group in groups), 0, []
        for group in groups:
            reference = group.reference.name
            against = shared or self._drawn_reference(group.reference)
            judge = Judge(
                self._halves,
                latents[reference],
                drawn.get(reference),
                against.sets,
                against.captions,
            )
            measured = {}
            for entrant in group.entrants:
                self._observer("quality", done, total)
                measured[entrant.name] = judge.measure(
                    latents[entrant.name], drawn.get(entrant.name)
                )
                done += 1
            found.append(_Judged(measured, against))
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

    def _real_reference(self, features: np.ndarray) -> _Reference:
        assert self._subject.real is not None
        captions = Captions(self._subject.real, features)
        return _Reference(SetDistances(features), captions, self._floor(features))

    def _drawn_reference(self, entrant: Entrant) -> _Reference:
        """The uncached run on the same prompts, from other noise."""
        if self._gallery is None:
            return _Reference(None, None, {})
        stage = f"{entrant.name} from other noise"
        latents = self._draw(self._independent, [entrant], stage)
        features = self._decode(self._gallery, latents, f"{stage}: features")[entrant.name].features
        return _Reference(SetDistances(features), None, {})

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


class _Reference:
    """What sets of pictures are compared with."""

    def __init__(
        self, sets: SetDistances | None, captions: Captions | None, floor: dict[str, list[float]]
    ) -> None:
        self.sets = sets
        self.captions = captions
        self.floor = floor


class _Judged:
    """The measured presets of a group."""

    def __init__(self, measured: dict[str, dict[str, Measured]], against: _Reference) -> None:
        self.measured = measured
        self.against = against


def measure_times(
    bundle: Bundle,
    subject: Subject,
    options: EvaluationOptions,
    work: Path,
    names: Sequence[str] = (),
    observer: Observer = lambda stage, done, total: None,
) -> timing.Seconds:
    """The timing alone: a later ``evaluate`` with the same presets and options reads it."""
    evaluation = Evaluation(bundle, subject, options, work, observer)
    return evaluation.time(_entrants(make_groups(bundle, names)))


def evaluate(
    bundle: Bundle,
    subject: Subject,
    options: EvaluationOptions,
    out: Path,
    names: Sequence[str] = (),
    observer: Observer = lambda stage, done, total: None,
    work: Path | None = None,
) -> Report:
    """Compare presets; writes evaluation.md, evaluation.json and the pictures into ``out``.

    Args:
        bundle: as compiled.
        subject: what to draw and what to judge it against.
        options: how many images, how to time.
        out: folder of the results.
        names: presets; default all. Uncached references are added.
        observer: progress.
        work: where drawn latents, pictures and features are kept; default ``out``/work.

    Raises:
        ConfigError, BundleError, MissingExtraError: before anything is drawn.
    """
    groups = make_groups(bundle, names)
    evaluation = Evaluation(bundle, subject, options, work or out / WORK, observer)
    entrants = _entrants(groups)
    seconds = evaluation.time(entrants)
    latents = evaluation.draw(entrants)
    drawn = evaluation.decode(latents)
    judged = evaluation.judge(groups, latents, drawn)
    reports = [
        _group(group, found, latents, seconds, options)
        for group, found in zip(groups, judged, strict=True)
    ]
    report = replace(_frame(bundle, subject, options, bool(drawn)), groups=reports)
    write_text(out / "evaluation.json", report.to_json())
    write_text(out / "evaluation.md", markdown(report))
    figures.draw(report, groups, subject, drawn, out)
    return report


def _entrants(groups: Sequence[Group]) -> list[Entrant]:
    """Every preset once: a run of fewer steps may stand in several groups."""
    return list({entrant.name: entrant for group in groups for entrant in group.entrants}.values())


def _group(
    group: Group,
    judged: _Judged,
    latents: Mapping[str, np.ndarray],
    seconds: timing.Seconds,
    options: EvaluationOptions,
) -> GroupReport:
    base = latents[group.reference.name]
    captions = judged.against.captions
    return group_report(
        group,
        judged.measured,
        {
            entrant.name: spread_over_images(relative_distance(latents[entrant.name], base))
            for entrant in group.entrants
        },
        seconds,
        options.timing.images,
        floor=judged.against.floor,
        ceiling={} if captions is None else captions.ceiling,
    )


def _frame(bundle: Bundle, subject: Subject, options: EvaluationOptions, decoded: bool) -> Report:
    reference = (
        f"{len(subject.real.pictures)} real pictures"
        if subject.real is not None
        else "pictures of the uncached run from other noise, there being no real ones"
    )
    return Report(
        bundle=bundle.folder.name,
        model=bundle.model.name,
        subject=subject.about,
        reference=reference if decoded else "",
        options=options,
        machine=machine_facts() | {"blockcache": version("blockcache")},
    )
