"""Median times of several ways to do the same work, which take turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, TypeAlias

Work: TypeAlias = Callable[[], object]
Row: TypeAlias = dict[str, Any]
"""A kernel at one shape: "kernel", "shape", and microseconds by name."""


def medians(works: dict[str, Work], time_us: Callable[[Work], float], runs: int) -> Row:
    """Median microseconds of each, by name; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for run in range(-3, runs):
        for name, work in works.items():
            taken = time_us(work)
            if run >= 0:
                times[name].append(taken)
    return {f"{name}_us": statistics.median(each) for name, each in times.items()}
