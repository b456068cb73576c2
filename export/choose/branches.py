"""Schedules over nested branches: at each step, how deep into the U-Net to go.

A cut d lies before a concatenation of the up path; its *branch* is everything below it. A step that
reuses cut d runs the stages above the cut on kept output T_d, and skips the rest: cut 0 skips most.
The branches are nested, so that one number per step says it all: the cut that is reused, or D for
none. A step that reuses cut d computes the outputs of all shallower cuts anew, the step that
computes everything all of them.

The search keeps, step by step, the best partial schedules of every cost (a beam): a partial
schedule is judged by its loss so far, and two that will reuse the same outputs later are one
problem, of which the cheaper survives. On problems small enough to try everything it comes within
one per cent (a test holds that).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from blockcache.runtime.errors import ConfigError

BUCKETS = 48
"""Classes of cost that the beam keeps apart, so that thrifty starts survive costly ones."""
WIDTH = 256
"""Partial schedules that are kept in each of them."""
MOST_IN_A_ROW = 4
"""Steps for which an output may stand in, at most; nobody measured longer ones."""


@dataclass(frozen=True)
class BranchProblem:
    """What a plan over branches needs to know. S steps, D cuts, the shallowest first."""

    costs: np.ndarray  # float64 [D + 1], rising: of a step that reuses cut d; the last one: of all
    losses: np.ndarray  # float64 [D, S, S, S]: of a reuse [cut, step, last, before]
    gains: np.ndarray  # float64 [S], of an error of the model output at a step to the final latents

    def __post_init__(self) -> None:
        D, S = self.losses.shape[:2]
        if self.losses.shape != (D, S, S, S) or self.costs.shape != (D + 1,):
            raise ConfigError(
                f"Expected losses [D, S, S, S] and costs [D + 1], got {self.losses.shape} and "
                f"{self.costs.shape}."
            )
        if (np.diff(self.costs) < 0).any():
            raise ConfigError(f"Expected costs that rise with the depth, got {self.costs}.")

    @property
    def steps(self) -> int:
        """S."""
        return int(self.losses.shape[1])

    @property
    def cuts(self) -> int:
        """D."""
        return int(self.losses.shape[0])

    def cost(self, plans: np.ndarray) -> np.ndarray:
        """What plans cost: int [..., S] to float64 [...]."""
        return np.asarray(self.costs[plans].sum(-1))

    def loss(self, plans: np.ndarray) -> np.ndarray:
        """What plans lose, by prediction: int [B, S] to float64 [B].

        Infinite where an output stands in for too long. An output that was computed over a reused
        one carries that reuse's error along: where it stands in at a later step, the error counts
        once more, by the gain of that step.
        """
        state = _State.start(self.cuts).take(np.zeros(len(plans), int))
        for step in range(self.steps):
            state = state.after(self, step, plans[:, step])
        return state.loss


@dataclass(frozen=True)
class _State:
    """Partial schedules, side by side: B of them."""

    last: np.ndarray  # int [B, D], the step that computed each cut's output last
    before: np.ndarray  # int [B, D], the one before that
    stale: np.ndarray  # float64 [B, D], error of the last output by what was reused below it
    loss: np.ndarray  # float64 [B]
    cost: np.ndarray  # float64 [B]

    @classmethod
    def start(cls, cuts: int) -> _State:
        """Nothing has run."""
        none = np.full((1, cuts), -1)
        return cls(none, none, np.zeros((1, cuts)), np.zeros(1), np.zeros(1))

    def after(self, problem: BranchProblem, step: int, depths: np.ndarray) -> _State:
        """Every partial schedule, one step on, by the depth given to each."""
        D, rows = problem.cuts, np.arange(len(depths))
        reuses = depths < D
        cut = np.minimum(depths, D - 1)
        last, before = self.last[rows, cut], self.before[rows, cut]
        lost = problem.losses[cut, step, last, before]
        lost = lost + self.stale[rows, cut] * problem.gains[step]
        too_long = (last < 0) | (step - last > MOST_IN_A_ROW)
        lost = np.where(reuses, np.where(too_long, np.inf, lost), 0.0)
        fresh = np.arange(D)[None] < depths[:, None]
        error = lost / problem.gains[step]  # of the model output, at this step
        return _State(
            last=np.where(fresh, step, self.last),
            before=np.where(fresh, np.where(self.last < 0, step, self.last), self.before),
            stale=np.where(fresh, error[:, None], self.stale),
            loss=self.loss + lost,
            cost=self.cost + problem.costs[depths],
        )

    def take(self, rows: np.ndarray) -> _State:
        """Some of the partial schedules, or some of them several times."""
        return _State(
            self.last[rows], self.before[rows], self.stale[rows], self.loss[rows], self.cost[rows]
        )


def plan_branches(problem: BranchProblem, spend: float) -> np.ndarray:
    """The cut to reuse at each step, D for none: int [S], with the least predicted loss.

    Args:
        problem: costs and losses.
        spend: what all steps together may cost, in the unit of ``problem.costs``.

    Raises:
        ConfigError: no schedule is that cheap.
    """
    S, D = problem.steps, problem.cuts
    least = problem.costs[D] + (S - 1) * problem.costs[0]
    state = _State.start(D)
    history: list[tuple[np.ndarray, np.ndarray]] = []  # per step: parents and depths
    for step in range(S):
        choices = np.array([D]) if step == 0 else np.arange(D + 1)
        parents = np.repeat(np.arange(len(state.loss)), len(choices))
        depths = np.tile(choices, len(state.loss))
        grown = state.take(parents).after(problem, step, depths)
        rest = (S - 1 - step) * problem.costs[0]
        kept = np.flatnonzero(np.isfinite(grown.loss) & (grown.cost + rest <= spend * (1 + 1e-9)))
        if not len(kept):
            raise ConfigError(
                f"Expected to spend at least {_least(problem):.4g} on {S} steps ({least:.4g} if "
                f"outputs could stand in forever), got {spend:.4g}."
            )
        kept = kept[_survivors(grown.take(kept), spend)]
        state = grown.take(kept)
        history.append((parents[kept], depths[kept]))
    row = int(np.lexsort((state.cost, state.loss))[0])
    plan = []
    for parents, depths in reversed(history):
        plan.append(int(depths[row]))
        row = int(parents[row])
    return np.array(plan[::-1])


def _least(problem: BranchProblem) -> float:
    """The cost of the cheapest schedule: everything every few steps, cut 0 between."""
    full = math.ceil(problem.steps / (MOST_IN_A_ROW + 1))
    return float(full * problem.costs[-1] + (problem.steps - full) * problem.costs[0])


def _survivors(state: _State, spend: float) -> np.ndarray:
    """Rows worth going on with: the best of every class of cost, one for every future."""
    bucket = np.minimum((state.cost / spend * BUCKETS).astype(int), BUCKETS - 1)
    order = np.lexsort((state.cost, state.loss, bucket))
    futures = np.concatenate([bucket[:, None], state.last, state.before], axis=1)[order]
    _, first = np.unique(futures, axis=0, return_index=True)
    order = order[np.sort(first)]
    ranks = np.arange(len(order)) - np.searchsorted(bucket[order], bucket[order])
    return np.asarray(order[ranks < WIDTH])
