"""Schedules from measured change: numpy only.

``change[s, k]`` is L1_rel of eq. 6 between step s-1 and step s of block k, in denoising order;
``change[0]`` is 0 by definition, there is no step before.
"""

from __future__ import annotations

import numpy as np

from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import Schedule


def threshold(change: np.ndarray, delta: float) -> Schedule:
    """Eq. 7: reuse a block while its accumulated change stays within ``delta``.

    A block computed at step a is reused at steps a+1, a+2, ... as long as the sum of
    ``change[a+1..s]`` is at most ``delta``; the first step at which the sum exceeds it recomputes
    the block and the sum starts again.

    A larger ``delta`` recomputes no more often, at any prefix of the steps; but not at a subset of
    them: where one recompute falls moves all later ones.

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
