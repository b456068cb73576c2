"""Policies: what a preset's schedule is derived from, as people write it.

| text | policy |
|---|---|
| (none) | uncached: every block at every step |
| ``0.5`` or ``d0.5`` | threshold: delta of eq. 7 |
| ``t1.5`` | threshold, with the smallest delta that is 1.5 times as fast as uncached |
| ``x1.5`` | budget: 1.5 times as fast as uncached, with the least predicted loss |
| ``ms250`` | budget: one image in 250 milliseconds, with the least predicted loss |
| ``j1.5`` | as fast with fewer steps and a budget together, whatever lands nearest (joint.py) |
| ``c1.5`` | budget by accumulated change alone |
| ``every3`` | every block at every third step |
| ``deepcache3`` | DeepCache: deep blocks at every third step |
| ``smooth0.1`` | SmoothCache: one decision for all blocks, error threshold 0.1 |
| ``FILE.json`` | a table of one's own |
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blockcache.export.choose import peers
from blockcache.export.choose.schedule import budget, least_loss, threshold, threshold_within
from blockcache.export.costs.costs import Costs
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import Schedule

_PREFIXES = {
    "": "threshold",
    "d": "threshold",
    "t": "threshold-speedup",
    "x": "budget",
    "ms": "latency",
    "j": "joint",
    "c": "change-budget",
    "every": "interval",
    "deepcache": "deepcache",
    "smooth": "smoothcache",
}
KINDS = ("uncached", *dict.fromkeys(_PREFIXES.values()), "table")
_SPEEDUPS = ("threshold-speedup", "budget", "joint", "change-budget")
_WHOLE = ("interval", "deepcache")
_WEIGHTED = ("budget", "latency")
_MEASURED = ("threshold", "smoothcache", "latency", *_SPEEDUPS)


@dataclass(frozen=True)
class Measured:
    """What a policy may draw on."""

    steps: int
    paths: Sequence[str]  # of the blocks
    costs: Costs
    change: np.ndarray | None = None  # float [S, K], eq. 6
    sensitivity: np.ndarray | None = None  # float [S, K], see sensitivity.py
    residuals: np.ndarray | None = None  # float [K, S, S] or [K, S, S, S], see residuals.py


@dataclass(frozen=True)
class Policy:
    """How a schedule is made."""

    kind: str = "uncached"
    value: float = 0.0  # delta, speed-up, milliseconds, interval or alpha, by kind
    file: Path | None = None  # of a table

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"Expected a policy of {KINDS}, got {self.kind!r}.")
        if (self.kind == "table") != (self.file is not None):
            raise ConfigError(f"A table, and only a table, is read from a file; got {self}.")
        least = 1 if self.kind in (*_SPEEDUPS, *_WHOLE) else 0
        if self.timed and not 0 < self.value < math.inf:
            raise ConfigError(f"Expected a number of milliseconds above 0, got {self.value:g}.")
        if not least <= self.value < math.inf or (self.kind in _WHOLE and self.value % 1):
            raise ConfigError(
                f"Expected a {'whole ' * (self.kind in _WHOLE)}number of {least} or more for the "
                f"policy {self.kind!r}, got {self.value:g}."
            )

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Read one of the texts in this module's table."""
        if text.endswith(".json"):
            return cls("table", file=Path(text))
        match = re.fullmatch(r"([a-z]*)((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)", text, re.ASCII)
        if match is None or match.group(1) not in _PREFIXES:
            raise ConfigError(
                f"Expected a policy such as 0.5 (delta), x1.5 or j1.5 (speed-up), ms250 (latency), "
                f"every3, deepcache3, smooth0.1 or FILE.json, got {text!r}."
            )
        return cls(_PREFIXES[match.group(1)], float(match.group(2)))

    @property
    def text(self) -> str:
        """A short name, part of the preset's; "" for uncached."""
        if self.kind == "uncached":
            return ""
        if self.file is not None:
            return re.sub(r"[^A-Za-z0-9._-]", "-", self.file.stem)
        prefix = {kind: prefix for prefix, kind in _PREFIXES.items()}[self.kind]
        return f"{prefix}{self.value:g}".replace("+", "")

    @property
    def measured(self) -> bool:
        """Whether a profile is needed."""
        return self.kind in _MEASURED

    @property
    def joint(self) -> bool:
        """Whether the number of steps is chosen too."""
        return self.kind == "joint"

    @property
    def budgeted(self) -> bool:
        """Whether it predicts losses, or its candidates do."""
        return self.weighted or self.joint

    @property
    def weighted(self) -> bool:
        """Whether sensitivity and residuals are needed."""
        return self.kind in _WEIGHTED

    @property
    def priced(self) -> bool:
        """Whether it depends on what blocks cost."""
        return self.kind in ("latency", *_SPEEDUPS)

    @property
    def timed(self) -> bool:
        """Whether costs in milliseconds are needed."""
        return self.kind == "latency"

    def schedule(self, facts: Measured) -> Schedule:
        """The table of this policy; ``facts`` holds what ``measured`` and ``weighted`` ask for.

        Not of a joint one, which is the table of one of its candidates.
        """
        steps, blocks = facts.steps, len(facts.paths)
        if self.kind == "uncached":
            return Schedule.uncached(steps, blocks)
        if self.kind == "interval":
            return peers.fixed_interval(steps, blocks, int(self.value))
        if self.kind == "deepcache":
            return peers.deepcache(steps, facts.paths, int(self.value))
        if self.file is not None:
            return peers.read_table(self.file, steps, blocks)
        if self.weighted:
            assert facts.sensitivity is not None
            assert facts.residuals is not None
            afford = affordable_within if self.timed else affordable
            spend = afford(facts.costs, steps, self.value)
            loss = predicted_loss(facts.sensitivity, facts.residuals)
            return least_loss(loss, facts.costs.blocks, spend)
        assert facts.change is not None
        if self.kind == "threshold":
            return threshold(facts.change, self.value)
        if self.kind == "smoothcache":
            return peers.smoothcache(facts.change, self.value)
        spend = affordable(facts.costs, steps, self.value)
        if self.kind == "threshold-speedup":
            return threshold_within(facts.change, facts.costs.blocks, spend)
        assert self.kind == "change-budget"
        return budget(facts.change, facts.costs.blocks, spend)


UNCACHED = Policy()
"""Every block at every step."""


ROUNDING = 1e-9
"""A share of the whole that sums of the same costs in another order may differ by."""


def affordable(costs: Costs, steps: int, speedup: float) -> float:
    """What all runs of all blocks may cost, for an image ``speedup`` times as fast as uncached."""
    spend = steps * costs.every_block - costs.uncached(steps) * (1 - 1 / speedup)
    if not spend >= costs.every_block * (1 - ROUNDING):
        most = math.floor(1000 * costs.largest_speedup(steps)) / 1000
        raise ConfigError(
            f"A speed-up of {speedup:g} is out of reach: the trunk always runs, and every block at "
            f"step 0. Expected at most {most}."
        )
    return max(spend, costs.every_block)


def affordable_within(costs: Costs, steps: int, latency_ms: float) -> float:
    """What all runs of all blocks may cost, for an image in ``latency_ms``."""
    assert costs.unit == "ms"
    spend = latency_ms - costs.prompt - steps * costs.trunk
    if not spend >= costs.every_block:
        least = math.ceil(1000 * costs.least(steps)) / 1000
        raise ConfigError(
            f"{latency_ms:g} ms an image are out of reach: the trunk always runs, and every block "
            f"at step 0. Expected {least} ms or more, or fewer steps."
        )
    return min(spend, steps * costs.every_block)


def predicted_loss(sensitivity: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """What a reuse does to the image, relative L2 of the final latents: of the residuals' shape.

    The sensitivity is measured with the output of the step before as it is; the residual says how
    much larger or smaller the error is of the output in use, as it will be aligned.
    """
    axes = [1] * (residuals.ndim - 2)
    weight = sensitivity.T.astype(np.float64).reshape(*residuals.shape[:2], *axes)
    loss: np.ndarray = weight * residuals
    return loss
