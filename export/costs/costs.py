"""What one image costs by a schedule, in milliseconds or in GFLOP.

Milliseconds come from ``timings`` (measured) or ``roofline`` (predicted). Where neither is at hand,
counted arithmetic says in what proportion segments cost, which is enough for a speed-up::

    costs = counted(bundle.segments)
    costs.speedup(preset.schedule)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import LOOP_ROLES, Schedule, Segment, block_output_name
from blockcache.runtime.run_table import run_table

Unit: TypeAlias = Literal["ms", "GFLOP"]
UNITS: tuple[Unit, ...] = ("ms", "GFLOP")

COUNTED = "FLOPs"
"""The source of costs that nobody measured or predicted."""

_TRUNK = tuple(role for role in LOOP_ROLES if role != "block")


@dataclass(frozen=True)
class BranchCost:
    """What a step that reuses a branch does not pay for."""

    trunk: float  # of the trunk inside the branch
    inside: np.ndarray  # bool [K], the blocks inside


@dataclass(frozen=True)
class Costs:
    """One image pays for the prompt once, for the trunk at every step, and for each block it runs.

    A step that reuses a branch pays for nothing inside it. A schedule has the K blocks first, then
    the branches, the shallowest first.

    Raises:
        ConfigError: a unit that is none.
    """

    blocks: np.ndarray  # float64 [K], one run of each block
    trunk: float  # everything else of one step
    prompt: float  # once per image
    unit: Unit = "ms"
    source: str = ""  # who says so: ``COUNTED``, or device and engine library: "a100, roofline"
    branches: tuple[BranchCost, ...] = ()

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ConfigError(f"Expected costs in one of {UNITS}, got {self.unit!r}.")

    @classmethod
    def of_segments(
        cls, segments: Sequence[Segment], cost: Mapping[str, float], unit: Unit, source: str
    ) -> Costs:
        """Summed up by role; ``cost`` names one run of every segment of the loop."""
        loop = [segment for segment in segments if segment.role in LOOP_ROLES]
        blocks = sorted((s for s in loop if s.block is not None), key=lambda s: s.block or 0)
        return cls(
            blocks=np.array([cost[s.name] for s in blocks], np.float64),
            trunk=float(sum(cost[s.name] for s in segments if s.role in _TRUNK)),
            prompt=float(sum(cost.get(s.name, 0.0) for s in segments if s.role == "prompt")),
            unit=unit,
            source=source,
            branches=tuple(_branch_costs(loop, len(blocks), cost)),
        )

    @property
    def every_block(self) -> float:
        """One run of every block."""
        return float(self.blocks.sum())

    def image(self, schedule: Schedule) -> float:
        """One denoising loop by a schedule, and its prompt segment."""
        return float(self.prompt + self.steps(schedule).sum())

    def steps(self, schedule: Schedule) -> np.ndarray:
        """Every step by a schedule: float64 [S]."""
        runs, trunk = self._runs(schedule)
        return np.asarray(trunk + runs @ self.blocks)

    def blocks_share(self, schedule: Schedule) -> float:
        """What the blocks cost, as a share of all of them at every step."""
        runs, _ = self._runs(schedule)
        return float((runs @ self.blocks).sum() / (schedule.steps * self.every_block))

    def _runs(self, schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
        """The blocks that run, bool [S, K], and what the trunk costs at each step, float64 [S]."""
        blocks = len(self.blocks)
        runs = schedule.recompute[:, :blocks].copy()
        trunk = np.full(schedule.steps, self.trunk)
        settled = np.zeros(schedule.steps, np.bool_)
        # The shallowest branch that is reused holds all deeper ones.
        for branch, recompute in zip(self.branches, schedule.recompute[:, blocks:].T, strict=True):
            reused = ~recompute & ~settled
            runs[np.ix_(reused, branch.inside)] = False
            trunk[reused] -= branch.trunk
            settled |= reused
        return runs, trunk

    @property
    def by_cut(self) -> np.ndarray:
        """A step that reuses each branch, the shallowest first, then one that computes all."""
        kept = [float(self.blocks[~branch.inside].sum()) - branch.trunk for branch in self.branches]
        return self.trunk + np.array([*kept, self.every_block])

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


def _branch_costs(
    loop: Sequence[Segment], blocks: int, cost: Mapping[str, float]
) -> Iterator[BranchCost]:
    """What each branch of the loop holds, by a step that reuses it and nothing else."""
    written = {spec.name for segment in loop for spec in segment.outputs}
    count = next(k for k in itertools.count(blocks) if block_output_name(k) not in written)
    for branch in range(blocks, count):
        recompute = np.ones((2, count), np.bool_)
        recompute[1, branch] = False
        skipped = ~run_table(loop, Schedule(recompute))[1]
        held = [segment for segment, skips in zip(loop, skipped, strict=True) if skips]
        inside = np.zeros(blocks, np.bool_)
        inside[[segment.block for segment in held if segment.block is not None]] = True
        trunk = sum(cost[segment.name] for segment in held if segment.block is None)
        yield BranchCost(float(trunk), inside)


def counted(segments: Sequence[Segment]) -> Costs:
    """GFLOP of a bundle's segments, at the model's default sizes."""
    gflop = {segment.name: segment.flops / 1e9 for segment in segments}
    return Costs.of_segments(segments, gflop, "GFLOP", COUNTED)
