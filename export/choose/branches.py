"""Schedules over nested branches: at each step, how deep into the U-Net to go.

A cut d lies before a concatenation of the up path; its *branch* is everything below it. A step that
reuses cut d runs the stages above the cut on kept output T_d, and skips the rest: cut 0 skips most.
The branches are nested, so one number a step says it all: the cut that is reused, or D for none. A
step that reuses cut d computes the outputs of all shallower cuts anew. A step that reuses none
computes the outputs of all cuts.

The search keeps, step by step, the best partial schedules of every cost (a beam). A partial
schedule is judged by its loss so far; of several that will reuse the same outputs later, the one
that has lost the least survives. Small problems are solved exactly; where everything can still be
tried and the beam has to choose, a test holds how close it comes.
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
EXACT = 2048
"""As long as there are no more partial schedules than this, all are kept: the plan is the best."""
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
    check_reach(problem.steps, problem.costs, spend)
    state, plans = _search(problem, spend)
    return np.asarray(plans[np.lexsort((state.cost, state.loss))[0]])


def check_reach(steps: int, costs: np.ndarray, spend: float) -> None:
    """Raise ConfigError where no schedule over branches is as cheap as ``spend``.

    Args:
        steps: S.
        costs: float64 [D + 1], as of a ``BranchProblem``.
        spend: what all steps together may cost.
    """
    full = steps * float(costs[-1])
    if spend >= full:
        return
    free = np.zeros((len(costs) - 1, steps, steps, steps))
    state, _ = _search(BranchProblem(costs, free, np.ones(steps)), full)
    least = float(state.cost.min())
    if spend < least * (1 - 1e-9):
        most = math.floor(1000 * full / least) / 1000
        raise ConfigError(
            f"A speed-up of {full / spend:.4g} is out of reach with {steps} steps: an output "
            f"stands in for at most {MOST_IN_A_ROW} steps. Expected at most {most:g}."
        )


def _search(problem: BranchProblem, spend: float) -> tuple[_State, np.ndarray]:
    """The schedules that the beam ends with, and their plans int [B, S]."""
    S, D = problem.steps, problem.cuts
    state, plans = _State.start(D), np.zeros((1, 0), int)
    for step in range(S):
        choices = np.array([D]) if step == 0 else np.arange(D + 1)
        parents = np.repeat(np.arange(len(plans)), len(choices))
        depths = np.tile(choices, len(plans))
        grown = state.take(parents).after(problem, step, depths)
        rest = (S - 1 - step) * problem.costs[0]
        kept = np.flatnonzero(np.isfinite(grown.loss) & (grown.cost + rest <= spend * (1 + 1e-9)))
        kept = kept[_survivors(grown.take(kept), spend)]
        state = grown.take(kept)
        plans = np.concatenate([plans[parents[kept]], depths[kept, None]], axis=1)
    return state, plans


def _survivors(state: _State, spend: float) -> np.ndarray:
    """Rows worth going on with: the best of every class of cost, one for every future."""
    if len(state.loss) <= EXACT:
        return np.arange(len(state.loss))
    bucket = np.minimum((state.cost / spend * BUCKETS).astype(int), BUCKETS - 1)
    order = np.lexsort((state.cost, state.loss, bucket))
    futures = np.concatenate([bucket[:, None], state.last, state.before], axis=1)[order]
    _, first = np.unique(futures, axis=0, return_index=True)
    order = order[np.sort(first)]
    ranks = np.arange(len(order)) - np.searchsorted(bucket[order], bucket[order])
    return np.asarray(order[ranks < WIDTH])
