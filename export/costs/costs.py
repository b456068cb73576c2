"""What one image costs by a schedule, in milliseconds or in GFLOP.

Milliseconds come from ``timings`` (measured) or ``roofline`` (predicted). Where neither is at hand,
counted arithmetic says in what proportion segments cost, which is enough for a speed-up::

    costs = counted(bundle.segments)
    costs.speedup(preset.schedule)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import LOOP_ROLES, Schedule, Segment

Unit: TypeAlias = Literal["ms", "GFLOP"]
UNITS: tuple[Unit, ...] = ("ms", "GFLOP")

COUNTED = "FLOPs"
"""The source of costs that nobody measured or predicted."""

_TRUNK = tuple(role for role in LOOP_ROLES if role != "block")


@dataclass(frozen=True)
class Costs:
    """One image pays for the prompt once, for the trunk at every step, and for each block it runs.

    Raises:
        ConfigError: a unit that is none.
    """

    blocks: np.ndarray  # float64 [K], one run of each block
    trunk: float  # everything else of one step
    prompt: float  # once per image
    unit: Unit = "ms"
    source: str = ""  # who says so: ``COUNTED``, or device and engine library: "a100, roofline"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ConfigError(f"Expected costs in one of {UNITS}, got {self.unit!r}.")

    @classmethod
    def of_segments(
        cls, segments: Sequence[Segment], cost: Mapping[str, float], unit: Unit, source: str
    ) -> Costs:
        """Summed up by role; ``cost`` names one run of every segment of the loop."""
        blocks = sorted((s for s in segments if s.block is not None), key=lambda s: s.block or 0)
        return cls(
            blocks=np.array([cost[s.name] for s in blocks], np.float64),
            trunk=float(sum(cost[s.name] for s in segments if s.role in _TRUNK)),
            prompt=float(sum(cost.get(s.name, 0.0) for s in segments if s.role == "prompt")),
            unit=unit,
            source=source,
        )

    @property
    def every_block(self) -> float:
        """One run of every block."""
        return float(self.blocks.sum())

    def image(self, schedule: Schedule) -> float:
        """One denoising loop by a schedule, and its prompt segment."""
        runs = schedule.recompute.sum(axis=0)
        return float(self.prompt + schedule.steps * self.trunk + (runs * self.blocks).sum())

    def uncached(self, steps: int) -> float:
        """The same with every block at every step."""
        return self.prompt + steps * self.trunk + steps * self.every_block

    def least(self, steps: int) -> float:
        """The same with every block at step 0 alone: block caching cannot do with less."""
        return self.prompt + steps * self.trunk + self.every_block

    def largest_speedup(self, steps: int) -> float:
        """The most that block caching can give."""
        return self.uncached(steps) / self.least(steps)

    def speedup(self, schedule: Schedule, replaced_steps: int | None = None) -> float:
        """Over the uncached run of ``replaced_steps`` steps, by default of as many."""
        return self.uncached(replaced_steps or schedule.steps) / self.image(schedule)


def counted(segments: Sequence[Segment]) -> Costs:
    """GFLOP of a bundle's segments, at the model's default sizes."""
    gflop = {segment.name: segment.flops / 1e9 for segment in segments}
    return Costs.of_segments(segments, gflop, "GFLOP", COUNTED)
