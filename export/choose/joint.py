"""Steps, grid and branches chosen together: ``x2``, twice as fast as the nominal uncached run.

Each way to be faster has its own price. Fewer steps cost least while the grid is fine; reuse costs
least where steps lie close together, so a schedule that reuses much wants more steps than it
replaces, and a grid between the one that is best uncached (``auto``) and Karras'. So a joint policy
asks of many grids, at several numbers of steps, how far each would end from the converged run by
its best schedule over branches, and has the few best tried in earnest.

All predictions come from one converged run (``measure/converged.py``): what a grid's own steps do
wrong (``grid_search.py``), and what any later output of a branch is by two earlier ones. How an
error of a branch's output moves the image is measured on one grid, as a sensitivity, and carried
over to the others by the size of the solver's step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from blockcache.export.choose.branches import BranchProblem, plan_branches
from blockcache.export.choose.grid_search import StepCosts, shortest_path
from blockcache.export.choose.grids import AUTO, grid_of, named_grid
from blockcache.export.measure.residuals import Moments, errors_by_two
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import Schedule
from blockcache.runtime.solvers.grid import Grid
from blockcache.runtime.solvers.solver import SolverTables

BLENDS = (0.0, 0.3, 0.6, 1.0)
"""Shares of Karras' grid that are mixed into ``auto``, in the logarithm of the levels."""
COUNTS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.5, 2.8)
"""Numbers of steps to look at, in those that the speed-up pays for uncached."""
FITTED = 0.35
"""What is left of a grid's own error once the solver is fitted to it (0.31 to 0.41 on the demo
model in 6 to 10 steps)."""
SUMMED = 0.6
"""The sum of all reuses' losses is more than what they lose together: this share of it, about."""


@dataclass(frozen=True)
class BranchErrors:
    """What errors of the branches' outputs do to the image, at the M levels of a converged run."""

    moments: Sequence[Moments]  # of each branch's output at the levels
    weights: np.ndarray  # float64 [D, M], of an error of the output, by the solver's step

    @classmethod
    def measured(
        cls,
        moments: Sequence[Moments],
        sensitivity: np.ndarray,
        at: Sequence[int],
        step: np.ndarray,
    ) -> BranchErrors:
        """From a sensitivity on one grid.

        Args:
            moments: of each branch's output at the M levels.
            sensitivity: float [S, D], of the outputs of the step before in use, on that grid.
            at: the S levels that are nearest to the grid's.
            step: float64 [S], ``step_sizes`` of that grid.
        """
        levels = np.arange(len(moments[0].mean.T))
        weights = []
        for branch, own in zip(moments, sensitivity.T, strict=True):
            change = np.maximum(branch.at(at).changes(), 1e-30)
            found = np.maximum(own[1:] / (change[1:] * step[1:]), 1e-30)
            weights.append(np.exp(np.interp(levels, at[1:], np.log(found))))
        return cls(moments, np.stack(weights))

    def problem(self, at: Sequence[int], step: np.ndarray, costs: np.ndarray) -> BranchProblem:
        """What a plan over branches needs to know, on a grid at these levels."""
        size = step * self.weights[:, at]  # [D, S]
        losses = [
            own[:, None, None] * errors_by_two(branch.at(at).covariance)
            for branch, own in zip(self.moments, size, strict=True)
        ]
        return BranchProblem(costs, np.stack(losses), np.maximum(size[0], 1e-30))


def step_sizes(tables: SolverTables) -> np.ndarray:
    """How far an error of 1 of the model output moves the latents, by each step: float64 [S].

    A multistep solver corrects a part of it at the next steps, which read its data prediction.
    """
    rows = tables.rows_from(0).astype(np.float64)
    following = np.append(rows[1:, 2], 0.0) + np.append(rows[2:, 3], [0.0, 0.0])[: len(rows)]
    return np.asarray(np.maximum(np.abs(rows[:, 1] + following * rows[:, 5]), 1e-30))


@dataclass(frozen=True)
class Candidate:
    """A grid with a schedule over the branches."""

    grid: Grid
    schedule: Schedule  # of the D branches
    predicted: float  # distance to the converged run

    @property
    def depths(self) -> np.ndarray:
        """The cut that each step reuses, D for none: int [S]."""
        reused = ~self.schedule.recompute
        return np.where(reused.any(1), reused.argmax(1), self.schedule.blocks)

    @property
    def name(self) -> str:
        """For reports."""
        return f"{self.grid.name}-{self.grid.steps}"


def grids_to_try(
    wanted: str | None, counts: Iterable[int], costs: StepCosts, training: np.ndarray
) -> list[Grid]:
    """The grids that a joint policy looks at.

    Args:
        wanted: the name of the grid that the user asks for; None looks at all.
        counts: numbers of steps.
        costs: of steps between the fine levels.
        training: float64 [T], sigma / alpha of every training timestep, rising.
    """
    found = []
    for count in counts:
        if wanted not in (None, AUTO):
            found.append(named_grid(wanted, training, count))
            continue
        best, _ = shortest_path(costs, count)
        karras = np.asarray(named_grid("karras", training, count).sigmas)
        for share in BLENDS if wanted is None else BLENDS[:1]:
            levels = np.exp((1 - share) * np.log(best) + share * np.log(karras))
            name = {0.0: AUTO, 1.0: "karras"}.get(share, f"{AUTO}-karras{share:g}")
            found.append(grid_of(name, levels, training))
    return found


def step_counts(affordable: float, most: int) -> list[int]:
    """Numbers of steps to look at: from as many as are affordable uncached, to much reuse."""
    return sorted({min(most, max(1, math.floor(affordable * factor + 1e-9))) for factor in COUNTS})


@dataclass(frozen=True)
class Planner:
    """Finds schedules over branches for grids."""

    errors: BranchErrors
    costs: StepCosts  # of steps between the fine levels
    by_cut: np.ndarray  # float64 [D + 1], of a ``BranchProblem``
    spend: float  # what all steps may cost

    def best(self, grid: Grid, tables: SolverTables) -> Candidate | None:
        """A grid with its best schedule; None where no schedule is as cheap.

        Args:
            grid: the levels.
            tables: of the solver on them.
        """
        at = self._at(grid)
        if len(set(at)) < len(at):  # closer than the converged run's own levels
            return None
        try:
            depths = plan_branches(self._problem(grid, tables), self.spend)
        except ConfigError:
            return None
        return self._candidates(grid, tables, depths[None])[0]

    def neighbours(self, candidate: Candidate, tables: SolverTables) -> list[Candidate]:
        """As cheap ones that go to another depth at one step or two, the best predicted first."""
        depths = candidate.depths
        D, S = len(self.by_cut) - 1, len(depths)
        single = [(step, depth) for step in range(1, S) for depth in range(D + 1)]
        plans = np.repeat(depths[None], len(single) ** 2, axis=0)
        for row, moves in enumerate(itertools.product(single, repeat=2)):
            for step, depth in moves:
                plans[row, step] = depth
        plans = np.unique(plans, axis=0)
        cheap = self.by_cut[plans].sum(1) <= self.spend * (1 + 1e-9)
        plans = plans[cheap & (plans != depths).any(1)]
        if not len(plans):
            return []
        found = self._candidates(candidate.grid, tables, plans)
        return sorted(
            (other for other in found if math.isfinite(other.predicted)),
            key=lambda other: other.predicted,
        )

    def _at(self, grid: Grid) -> list[int]:
        return self.costs.nearest(np.asarray(grid.sigmas))

    def _problem(self, grid: Grid, tables: SolverTables) -> BranchProblem:
        return self.errors.problem(self._at(grid), step_sizes(tables), self.by_cut)

    def _candidates(self, grid: Grid, tables: SolverTables, plans: np.ndarray) -> list[Candidate]:
        """Of plans int [B, S]."""
        problem = self._problem(grid, tables)
        own = FITTED * self.costs.predicted(self._at(grid))
        return [
            Candidate(
                grid,
                Schedule(depths[:, None] != np.arange(problem.cuts)[None]),
                math.hypot(SUMMED * lost, own),
            )
            for depths, lost in zip(plans, problem.loss(plans).tolist(), strict=True)
        ]
