"""From differences with their intervals to words: better, worse, mixed or no finding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from blockcache.tools.evaluation.quality import BY_KEY, Metric
from blockcache.tools.evaluation.resampling import Interval, Resampled, difference

BETTER, WORSE, MIXED, NO_FINDING = "better", "worse", "mixed", "no finding"
JUDGED = ("frechet", "kid", "top1", "distance")
"""Metrics that the overall verdict rests on: one for each thing that can go wrong."""


@dataclass(frozen=True)
class Finding:
    """Whether one preset differs from another in one metric by more than the images' chance."""

    difference: Interval
    verdict: str

    @classmethod
    def of(cls, metric: Metric, subject: Resampled, other: Resampled) -> Finding:
        """A finding where the 90 % interval of the paired difference leaves out 0."""
        found = difference(subject, other)
        if found.low > 0:
            verdict = BETTER if metric.higher_is_better else WORSE
        elif found.high < 0:
            verdict = WORSE if metric.higher_is_better else BETTER
        else:
            verdict = NO_FINDING
        return cls(found, verdict)


def compare(
    subject: Mapping[str, Resampled],
    other: Mapping[str, Resampled],
    leave_out: tuple[str, ...] = (),
) -> dict[str, Finding]:
    """Findings in all metrics that both have, but for those in ``leave_out``."""
    keys = [key for key in subject if key in other and key not in leave_out]
    return {key: Finding.of(BY_KEY[key], subject[key], other[key]) for key in keys}


def overall(findings: Mapping[str, Finding]) -> str:
    """One word for all metrics; the Fréchet distance alone decides nothing.

    Better: at least one metric besides the Fréchet distance is, and none is worse. Mixed: some
    are better and some worse.
    """
    verdicts = {key: findings[key].verdict for key in JUDGED if key in findings}
    good = {key for key, verdict in verdicts.items() if verdict == BETTER}
    bad = {key for key, verdict in verdicts.items() if verdict == WORSE}
    if good and bad:
        return MIXED
    if good | bad <= {"frechet"}:
        return NO_FINDING
    return BETTER if good else WORSE
