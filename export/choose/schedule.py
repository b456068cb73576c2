"""Schedules from measurements: the threshold of eq. 7, and the best one under a budget.

``change[s, k]`` is L1_rel of eq. 6 between step s-1 and step s of block k, in denoising order;
``change[0]`` is 0 by definition, there is no step before. ``loss[k, s, a]`` is what the image loses
when block k reuses its output of step a at step s. numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import Schedule


def threshold(change: np.ndarray, delta: float) -> Schedule:
    """Eq. 7: reuse a block while its accumulated change stays within ``delta``.

    A block computed at step a is reused at steps a+1, a+2, ... as long as the sum of
    ``change[a+1..s]`` is at most ``delta``; the first step at which the sum exceeds it recomputes
    the block and the sum starts again.

    With a larger ``delta``, no block is recomputed more often up to any step. But the recomputes do
    not fall on a subset of the same steps: where one moves, all later ones move.

    Args:
        change: float [S, K], finite, not negative.
        delta: the threshold, not negative (paper: 0.5).
    """
    change = check_change(change)
    if not delta >= 0:
        raise ConfigError(f"Expected a threshold delta of 0 or more, got {delta}.")
    recompute = np.zeros(change.shape, np.bool_)
    recompute[0] = True
    accumulated = np.zeros(change.shape[1])
    for step in range(1, change.shape[0]):
        accumulated += change[step]
        recompute[step] = accumulated > delta
        accumulated[recompute[step]] = 0.0
    return Schedule(recompute)


def threshold_within(change: np.ndarray, cost: np.ndarray, spend: float) -> Schedule:
    """The threshold's schedule with the smallest delta that costs no more than ``spend``.

    Recomputes fall with delta, so bisection finds it.

    Args:
        change: float [S, K], finite, not negative.
        cost: float [K], what one run of a block costs.
        spend: what all runs of all blocks may cost, at least ``cost.sum()``.
    """
    low, high = 0.0, float(check_change(change).sum()) + 1.0
    for _ in range(60):
        middle = (low + high) / 2
        within = (threshold(change, middle).recompute * cost).sum() <= spend * (1 + 1e-12)
        low, high = (low, middle) if within else (middle, high)
    return threshold(change, high)


def budget(change: np.ndarray, cost: np.ndarray, spend: float) -> Schedule:
    """The schedule with the least total accumulated change among those that cost no more.

    A threshold's schedule is one of the candidates at its own cost, so this one never accumulates
    more.

    Args:
        change: float [S, K], finite, not negative.
        cost: as of ``least_loss``, which also raises the errors.
        spend: as of ``least_loss``.
    """
    return least_loss(np.stack([_in_use(column) for column in check_change(change).T]), cost, spend)


def least_loss(loss: np.ndarray, cost: np.ndarray, spend: float) -> Schedule:
    """The schedule with the least total loss among those that cost no more.

    For one block and r recomputes the best steps are a shortest path through the steps, or through
    pairs of steps where the loss depends on the last two; a knapsack over the blocks' curves then
    shares out the budget. That is exact up to ``MOST_POINTS`` combinations of cost and loss, and
    beyond, to their resolution of the budget.

    Args:
        loss: float [K, S, S], ``loss[k, s, a]`` of the output of step a in use at step s > a; or
            [K, S, S, S], ``loss[k, s, a, b]`` with that of step b <= a computed before it, b = a
            where there is none. Finite and not negative, also in entries that stand for no
            reuse: 0 will do there.
        cost: float [K], what one run of a block costs (FLOPs, milliseconds), more than 0.
        spend: what all runs of all blocks may cost, in the same unit.

    Raises:
        ConfigError: the budget does not even pay for step 0, which recomputes every block; or a
            cost or loss is out of range.
    """
    loss, cost = np.asarray(loss, np.float64), np.asarray(cost, np.float64)
    if loss.ndim not in (3, 4) or len(set(loss.shape[1:])) != 1 or not loss.size:
        raise ConfigError(f"Expected loss[K, S, S] or loss[K, S, S, S], got {loss.shape}.")
    if cost.shape != loss.shape[:1] or not (cost > 0).all():
        raise ConfigError(
            f"Expected a cost above 0 for each of {len(loss)} blocks, got {cost.tolist()}."
        )
    if not ((loss >= 0) & np.isfinite(loss)).all():
        raise ConfigError(
            "Expected finite losses of 0 or more. Measure sensitivity and residuals again."
        )
    allowed = spend * (1 + 1e-12)  # a sum of the same costs in another order is no overrun
    if not cost.sum() <= allowed:
        raise ConfigError(
            f"Expected a budget of at least {cost.sum():g}, one run of every block; got {spend:g}."
        )
    curves = [_curve(block) if block.ndim == 2 else _paired_curve(block) for block in loss]
    counts = _share_out([curve.loss for curve in curves], cost, allowed)
    chosen = [curve.recompute[count - 1] for curve, count in zip(curves, counts, strict=True)]
    return Schedule(np.stack(chosen, axis=1))


def total_loss(loss: np.ndarray, schedule: Schedule) -> float:
    """What an image loses by a schedule: the sum over its reuses.

    Args:
        loss: as of ``least_loss``.
        schedule: of as many steps and blocks.
    """
    total = 0.0
    for k, block in enumerate(loss):
        last = before = 0
        for step, fresh in enumerate(schedule.recompute[:, k]):
            if fresh:
                before, last = last, step
            else:
                total += block[step, last] if block.ndim == 2 else block[step, last, before]
    return float(total)


@dataclass(frozen=True)
class _Curve:
    """One block: the least loss for every number of recomputes, 1..S."""

    loss: np.ndarray  # float64 [S]
    recompute: np.ndarray  # bool [S, S]: row r - 1 is the schedule with r recomputes


def _curve(loss: np.ndarray) -> _Curve:
    """Shortest paths from step 0 to step S with 1..S edges; an edge is one cache lifetime."""
    steps = len(loss)
    lifetime = _lifetimes(loss.T)  # [a, next]
    least = np.full(steps + 1, np.inf)
    least[0] = 0.0
    totals, origins = [], []
    for _ in range(steps):
        paths = least[:steps, None] + lifetime
        origins.append(paths.argmin(axis=0))
        least = paths.min(axis=0)
        totals.append(least[steps])
    recompute = np.zeros((steps, steps), np.bool_)
    for row in range(steps):
        end = steps
        for origin in reversed(origins[: row + 1]):
            end = int(origin[end])
            recompute[row, end] = True
    return _Curve(np.array(totals), recompute)


def _paired_curve(loss: np.ndarray) -> _Curve:
    """The same where a lifetime's loss also depends on the recompute before it.

    Nodes are pairs (b, a) of the last two recomputes, and an edge leads to (a, next).
    """
    steps = len(loss)
    lifetime = _lifetimes(loss.transpose(2, 1, 0))  # [b, a, next]
    least = np.full((steps, steps), np.inf)
    least[0, 0] = 0.0
    totals, recompute = [], np.zeros((steps, steps), np.bool_)
    origins: list[np.ndarray] = []  # of (a, next): the best b
    for row in range(steps):
        paths = least[:, :, None] + lifetime
        origins.append(paths.argmin(axis=0))
        least = paths.min(axis=0)
        before, end = int(least[:, steps].argmin()), steps
        totals.append(least[before, steps])
        for origin in reversed(origins):
            recompute[row, before] = True
            before, end = int(origin[before, end]), before
        least = least[:, :steps]
    return _Curve(np.array(totals), recompute)


def _lifetimes(loss: np.ndarray) -> np.ndarray:
    """Total loss if a block runs at step a and next at step n: [..., a, s] to [..., a, n].

    n goes to S, which is the end; infinite for n <= a.
    """
    steps = loss.shape[-1]
    a, n = np.indices((steps, steps + 1))
    total = np.zeros((*loss.shape[:-1], steps + 1))
    np.cumsum(np.where(n[:, :-1] > a[:, :-1], loss, 0.0), axis=-1, out=total[..., 1:])
    return np.where(n > a, total, np.inf)


def _in_use(change: np.ndarray) -> np.ndarray:
    """Accumulated change of one block, float64 [s, a]: between the output of step a and step s."""
    steps = len(change)
    table = np.zeros((steps, steps))
    for a in range(steps):
        table[a + 1 :, a] = np.cumsum(change[a + 1 :])
    return table


MOST_POINTS = 1 << 13
"""Points kept on the frontier of cost and loss; beyond, neighbours are merged."""


def _share_out(curves: list[np.ndarray], cost: np.ndarray, allowed: float) -> np.ndarray:
    """Recomputes of each block, 1..S: the knapsack over all blocks' curves. int [K].

    Block after block, every combination is tried and the dominated ones are dropped: what is left
    is the frontier of cost against loss. It stays exact up to ``MOST_POINTS``.
    """
    spent, total = np.zeros(1), np.zeros(1)
    counts = np.zeros((1, 0), np.int64)
    reserve = np.append(np.cumsum(cost[::-1])[::-1], 0.0)  # step 0 of the blocks to come
    for k, curve in enumerate(curves):
        runs = np.arange(1, len(curve) + 1)
        new_spent = (spent[:, None] + cost[k] * runs).ravel()
        new_total = (total[:, None] + curve).ravel()
        kept = np.flatnonzero(new_spent + reserve[k + 1] <= allowed)
        kept = kept[_frontier(new_spent[kept], new_total[kept], allowed)]
        rows, columns = np.divmod(kept, len(curve))
        counts = np.column_stack([counts[rows], runs[columns]])
        spent, total = new_spent[kept], new_total[kept]
    result: np.ndarray = counts[total.argmin()]
    return result


def _frontier(spent: np.ndarray, total: np.ndarray, allowed: float) -> np.ndarray:
    """Indices of the points that no cheaper point beats, in the order of their cost."""
    order = np.lexsort((total, spent))
    best = np.minimum.accumulate(total[order])
    kept = order[np.append(True, best[1:] < best[:-1])]
    if len(kept) > MOST_POINTS:  # of the points that cost nearly the same, the best
        place = np.floor(spent[kept] * (MOST_POINTS / allowed))
        kept = kept[np.append(place[1:] != place[:-1], True)]
    result: np.ndarray = kept
    return result


def accumulated_change(change: np.ndarray, schedule: Schedule) -> np.ndarray:
    """Per step and block, the change between the output in use and a fresh one: float64 [S, K]."""
    change = check_change(change)
    total = np.zeros(change.shape)
    for step in range(1, change.shape[0]):
        carried = total[step - 1] + change[step]
        total[step] = np.where(schedule.recompute[step], 0.0, carried)
    return total


def check_change(change: np.ndarray) -> np.ndarray:
    """``change`` as float64, or ConfigError where it is not a table of finite changes."""
    table = np.asarray(change, np.float64)
    if table.ndim != 2 or 0 in table.shape or not np.isfinite(table).all() or (table < 0).any():
        raise ConfigError(
            f"Expected change[steps, blocks] of finite numbers, 0 or more; got shape "
            f"{table.shape}. Profile the model again."
        )
    return table
