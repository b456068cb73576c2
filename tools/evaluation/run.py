"""An evaluation from a bundle to its report: the order of the stages, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from blockcache.export import Observer
from blockcache.export.observer import unobserved
from blockcache.runtime import Bundle, Preset
from blockcache.runtime.files import write_text
from blockcache.tools.evaluation import figures, timing
from blockcache.tools.evaluation.contest import Contestant, Group, make_groups
from blockcache.tools.evaluation.markdown import markdown
from blockcache.tools.evaluation.options import EvaluationOptions
from blockcache.tools.evaluation.quality import relative_distance
from blockcache.tools.evaluation.report import (
    GroupReport,
    Report,
    group_report,
    spread_over_images,
)
from blockcache.tools.evaluation.sampling import Workers
from blockcache.tools.evaluation.stages import Judged, Stages
from blockcache.tools.evaluation.subject import Subject
from blockcache.tools.report.machine import machine_facts
from blockcache.tools.sources.converged import converged_preset, has_converged_run

WORK = "work"


def measure_times(
    bundle: Bundle,
    subject: Subject,
    options: EvaluationOptions,
    work: Path,
    names: Sequence[str] = (),
    observer: Observer = unobserved,
    reference: str | None = None,
) -> timing.Seconds:
    """The timing alone: a later ``evaluate`` with the same presets and options reads it."""
    return Stages(bundle, subject, options, work, observer).time(
        _contestants(_groups(bundle, options, names, reference))
    )


def evaluate(
    bundle: Bundle,
    subject: Subject,
    options: EvaluationOptions,
    out: Path,
    names: Sequence[str] = (),
    observer: Observer = unobserved,
    work: Path | None = None,
    reference: str | None = None,
    workers: Workers | None = None,
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
        reference: an uncached preset that all are compared with; default the uncached run of
            each one's own step count.
        workers: draw in place of this process, which still times presets.

    Raises:
        ConfigError, BundleError, MissingExtraError: before anything is drawn.
    """
    groups = _groups(bundle, options, names, reference)
    stages = Stages(bundle, subject, options, work or out / WORK, observer, workers)
    stages.check()
    contestants = _contestants(groups)
    seconds = stages.time(contestants)
    latents = stages.draw(_drawn(groups))
    shown = {*(contestant.name for contestant in contestants), *(g.yardstick.name for g in groups)}
    drawn = stages.decode({name: latents[name] for name in latents if name in shown})
    judged = stages.judge(groups, latents, drawn)
    reports = [
        _group(group, found, latents, seconds, options)
        for group, found in zip(groups, judged, strict=True)
    ]
    report = replace(_frame(bundle, subject, options, bool(drawn)), groups=reports)
    write_text(out / "evaluation.json", report.to_json())
    write_text(out / "evaluation.md", markdown(report))
    figures.draw(report, groups, subject, drawn, out)
    return report


def _groups(
    bundle: Bundle, options: EvaluationOptions, names: Sequence[str], reference: str | None
) -> list[Group]:
    """Who competes with whom, and what they are held against."""
    converged = options.yardstick == "converged"
    groups = make_groups(bundle, names, reference, any_grid=converged)
    return [
        replace(group, converged=converged_preset(bundle, group.reference.preset))
        if converged and has_converged_run(group.reference.preset)
        else group
        for group in groups
    ]


def _drawn(groups: Sequence[Group]) -> list[Preset]:
    """Every preset to draw, once."""
    return list({preset.name: preset for group in groups for preset in group.drawn}.values())


def _contestants(groups: Sequence[Group]) -> list[Contestant]:
    """Every preset once: a run of fewer steps may stand in several groups."""
    return list(
        {
            contestant.name: contestant for group in groups for contestant in group.contestants
        }.values()
    )


def _group(
    group: Group,
    judged: Judged,
    latents: Mapping[str, np.ndarray],
    seconds: timing.Seconds,
    options: EvaluationOptions,
) -> GroupReport:
    base = latents[group.yardstick.name]
    captions = judged.against.captions
    return group_report(
        group,
        judged.measured,
        {
            contestant.name: spread_over_images(relative_distance(latents[contestant.name], base))
            for contestant in group.contestants
        },
        seconds,
        options.timing.images,
        floor=judged.against.floor,
        ceiling={} if captions is None else captions.ceiling,
    )


def _frame(bundle: Bundle, subject: Subject, options: EvaluationOptions, decoded: bool) -> Report:
    if subject.real is not None:
        reference = f"{len(subject.real.pictures)} real pictures"
    elif options.yardstick == "converged":
        reference = "the converged run's own pictures, there being no real ones"
    else:
        reference = "pictures of the uncached run from other noise, there being no real ones"
    return Report(
        bundle=bundle.folder.name,
        model=bundle.model.name,
        subject=subject.about,
        reference=reference if decoded else "",
        options=options,
        machine=machine_facts() | {"blockcache": version("blockcache")},
    )
