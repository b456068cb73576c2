"""Ratios that blockcache promises: splitting costs nothing, and caching saves what it should."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from blockcache.export import Timings
from blockcache.runtime import RunRecord
from blockcache.tools.bench.contestants import Contestant
from blockcache.tools.report.spread import Spread

SPLIT_GOAL = 1.02  # at most, of the split model's time over the uncut model's
CACHED_GOAL = 1.03  # at most, of a cached run's time over that of the segments it ran


@dataclass(frozen=True)
class Promise:
    """A ratio that blockcache promises, or that was asked for."""

    engine: str
    name: str  # "split / whole", "cached / segments it ran", "split / split @folder"
    preset: str
    ratio: Spread
    goal: float | None


def promises(everyone: Sequence[Contestant], timings: Mapping[str, Timings]) -> Iterator[Promise]:
    """The ratios of everyone who can be compared.

    Args:
        everyone: the contestants, with the seconds of all rounds.
        timings: by engine, the median time of every segment.
    """
    others = {(o.engine, o.kind, o.base): o for o in everyone if o.kind != "cached"}
    for made in everyone:
        split = others.get((made.engine, "split", made.base))
        if made.kind == "split":
            yield from _of_split(made, others.get((made.library, "whole", made.base)))
            if made.other:
                yield from _beside(made, others.get((made.library, "split", made.base)))
        if made.kind == "cached" and split is not None:
            ran = _ran_seconds(split.records, made.records, timings[made.engine])
            ratio = Spread.of_ratio([record.total_ns / 1e9 for record in made.records], ran)
            name = "cached / segments it ran"
            yield Promise(made.engine, name, made.preset, ratio, CACHED_GOAL)


def _of_split(split: Contestant, whole: Contestant | None) -> Iterator[Promise]:
    """The split model over the uncut one; another bundle may have been cut in any way."""
    if whole is not None:
        ratio = Spread.of_ratio(split.seconds, whole.seconds)
        goal = None if split.other else SPLIT_GOAL
        yield Promise(split.engine, "split / whole", split.base, ratio, goal)


def _beside(other: Contestant, mine: Contestant | None) -> Iterator[Promise]:
    """This bundle's split model over the other bundle's."""
    if mine is not None:
        ratio = Spread.of_ratio(mine.seconds, other.seconds)
        yield Promise(mine.engine, f"split / split @{other.other}", mine.base, ratio, None)


def _ran_seconds(
    split: Sequence[RunRecord], cached: Sequence[RunRecord], timings: Timings
) -> list[float]:
    """Per round, the sum over the launches of a cached run of their time in the split run."""
    sums = []
    for full, part in zip(split, cached, strict=True):
        mean_ns = full.segment_ns.sum(axis=0) / np.maximum(full.ran.sum(axis=0), 1)
        if not mean_ns.any():  # replayed as CUDA graphs: nothing was timed one by one
            mean_ns = np.array([timings.segment_ms[s.name] * 1e6 for s in part.segments])
        sums.append(float((part.ran * mean_ns).sum() / 1e9))
    return sums
