"""A budget of training time and the progress line that shows what is left of it."""

from __future__ import annotations

import math
import time

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PAUSE_S = 10.0  # a longer step was a pause (a stopped process, a sleeping machine)


class Budget:
    """Time of a training run; survives interruption through `spent_s`, ignores pauses."""

    def __init__(self, minutes: float, spent_s: float = 0.0) -> None:
        self.total_s = minutes * 60
        self.spent_s = spent_s  # seconds used, earlier runs included
        self._last = time.monotonic()

    def tick(self) -> None:
        """Count the time since the last tick; to be called after every step."""
        now = time.monotonic()
        self.spent_s += min(now - self._last, PAUSE_S)
        self._last = now

    @property
    def fraction(self) -> float:
        """How much is used, 0 to 1."""
        return min(1.0, self.spent_s / self.total_s) if self.total_s > 0 else 1.0


def learning_rate_factor(step: int, warmup_steps: int, fraction: float) -> float:
    """Linear warm-up in steps, then a cosine over the fraction of the budget."""
    return min(1.0, (step + 1) / warmup_steps) * (0.5 * (1 + math.cos(math.pi * fraction)) + 0.005)


def bar() -> Progress:
    """A rich progress bar that counts seconds of the budget."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
