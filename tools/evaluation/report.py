"""What an evaluation found, as data: every number of the table, and the table's JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from blockcache.tools.evaluation.contest import Contestant, Group, pairings
from blockcache.tools.evaluation.options import EvaluationOptions
from blockcache.tools.evaluation.resampling import Interval, Resampled
from blockcache.tools.evaluation.timing import Seconds, images_per_second, speedup
from blockcache.tools.evaluation.verdict import Finding, compare, overall
from blockcache.tools.report.spread import Spread

TO_YARDSTICK = ("distance", "psnr_db")
"""Metrics that compare with the yardstick: they say nothing about that run itself."""

OWN = ("own_distance",)
"""Distances to different runs cannot be compared with each other."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One preset. Fractions are of the group's uncached run."""

    preset: str
    method: str
    steps: int  # its own, not the uncached run's
    alignment: str  # "none" where outputs are reused as they are
    schedule: str  # the same for presets with the same schedule
    policy: Mapping[str, object]
    flops_fraction: float  # the whole U-Net
    blocks_fraction: float  # the blocks alone
    quality: Mapping[str, Interval]  # by metric key
    distance_std: float  # over images
    speedup_flops: float
    speedup_wall: Spread | None  # median and range over the timed rounds
    images_per_s: Spread | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One preset against another on the same images."""

    subject: str
    other: str
    against: str  # "uncached": the group's; "fewer steps", "unaligned", "threshold"
    flops_ratio: float  # subject : other
    findings: Mapping[str, Finding]
    verdict: str


@dataclass(frozen=True, kw_only=True)
class GroupReport:
    """An uncached run, the first row, and everything compared with it."""

    name: str
    yardstick: str  # the preset that distances are taken to: "converged", or the first row's
    floor: Mapping[str, Sequence[float]]  # real against real, repeated
    ceiling: Mapping[str, float]  # caption score of the real pictures
    rows: Sequence[Row]
    comparisons: Sequence[Comparison]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything."""

    bundle: str
    model: str
    subject: str
    reference: str  # what sets of pictures are compared with; "" where latents alone are
    options: EvaluationOptions
    machine: Mapping[str, str]
    groups: Sequence[GroupReport] = field(default_factory=tuple)

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self), indent=1, default=str, ensure_ascii=False) + "\n"


def group_report(
    group: Group,
    measured: Mapping[str, Mapping[str, Resampled]],
    distance_std: Mapping[str, float],
    seconds: Seconds,
    timed_images: int,
    *,
    floor: Mapping[str, Sequence[float]],
    ceiling: Mapping[str, float],
) -> GroupReport:
    """Assemble a group's table.

    Args:
        group: its presets.
        measured: by preset name, then by metric key.
        distance_std: by preset name.
        seconds: by preset name; empty where nothing was timed.
        timed_images: images in one timed call.
        floor: real against real.
        ceiling: caption score of real pictures.
    """
    rows = [
        _row(group, contestant, measured[contestant.name], distance_std[contestant.name], seconds,
             timed_images)
        for contestant in group.contestants
    ]  # fmt: skip
    comparisons = []
    for pairing in pairings(group):
        subject, other = pairing.subject, pairing.other
        findings = compare(
            measured[subject.name],
            measured[other.name],
            (*OWN, *TO_YARDSTICK) if other.name == group.yardstick.name else OWN,
        )
        comparisons.append(
            Comparison(
                subject=subject.name,
                other=other.name,
                against=pairing.against,
                flops_ratio=subject.flops / other.flops,
                findings=findings,
                verdict=overall(findings),
            )
        )
    return GroupReport(
        name=group.name,
        yardstick=group.yardstick.name,
        floor=floor,
        ceiling=ceiling,
        rows=rows,
        comparisons=comparisons,
    )


def spread_over_images(distances: np.ndarray) -> float:
    """Standard deviation of the distances of single images."""
    return float(np.std(distances, ddof=1))


def _row(
    group: Group,
    contestant: Contestant,
    measured: Mapping[str, Resampled],
    distance_std: float,
    seconds: Seconds,
    timed_images: int,
) -> Row:
    reference = group.reference
    own, base = seconds.get(contestant.name), seconds.get(reference.name)
    return Row(
        preset=contestant.name,
        method=contestant.method,
        steps=contestant.preset.schedule.steps,
        alignment=contestant.alignment,
        schedule=contestant.schedule,
        policy=contestant.preset.provenance.to_json(),
        flops_fraction=contestant.flops / reference.flops,
        blocks_fraction=contestant.block_flops / reference.block_flops,
        quality={key: Interval.of(value) for key, value in measured.items()},
        distance_std=distance_std,
        speedup_flops=reference.flops / contestant.flops,
        speedup_wall=speedup(base, own) if own and base else None,
        images_per_s=images_per_second(own, timed_images) if own else None,
    )
