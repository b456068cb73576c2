"""Schedules as other cachers make them, so that they can be compared in one run.

They are given on blockcache's blocks, the spatial transformers; what a method does besides
(DeepCache also skips ResBlocks below its branch) is not imitated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from blockcache.export.choose.schedule import check_change
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import Schedule


def fixed_interval(steps: int, blocks: int, interval: int) -> Schedule:
    """Every block at every ``interval``-th step."""
    return Schedule(np.repeat(_every(steps, interval)[:, None], blocks, axis=1))


def deepcache(steps: int, paths: Sequence[str], interval: int) -> Schedule:
    """DeepCache (Ma et al., CVPR 2024), branch 0: deep blocks at every ``interval``-th step.

    The blocks at the highest resolution, first down and last up stage, always run. Down and up
    stages are taken to mirror each other, as in every Stable Diffusion: where the first down stage
    has no block (SDXL), the last up stage has none either. ControlNets are no part of it and
    always run.

    Args:
        steps: S.
        paths: module path of every block, such as "down_blocks.0.attentions.1".
        interval: its cache interval N.
    """
    stages = [path.split(".")[:2] for path in paths]
    down = [int(stage[1]) for stage in stages if stage[0] == "down_blocks"]
    up = [int(stage[1]) for stage in stages if stage[0] == "up_blocks"]
    last = max(up, default=0) + min(down, default=0)
    shallow = [
        stage in (["down_blocks", "0"], ["up_blocks", str(last)]) or stage[0] == "controlnet"
        for stage in stages
    ]
    return Schedule(_every(steps, interval)[:, None] | np.array(shallow))


def smoothcache(change: np.ndarray, alpha: float, lookahead: int = 3) -> Schedule:
    """SmoothCache (Liu et al., 2024): one decision for all blocks of a kind.

    All blocks are reused while their mean accumulated change is below ``alpha``, for at most
    ``lookahead`` steps.

    Args:
        change: float [S, K], eq. 6.
        alpha: the error threshold, not negative.
        lookahead: most steps in a row that reuse.
    """
    mean = check_change(change).mean(axis=1)
    if not alpha >= 0 or lookahead < 0:
        raise ConfigError(
            f"Expected alpha and lookahead of 0 or more, got {alpha} and {lookahead}."
        )
    rows = np.zeros(len(mean), np.bool_)
    accumulated, age = 0.0, 0
    for step, value in enumerate(mean):
        accumulated, age = accumulated + value, age + 1
        if step == 0 or age > lookahead or accumulated >= alpha:
            rows[step], accumulated, age = True, 0.0, 0
    return Schedule(np.repeat(rows[:, None], change.shape[1], axis=1))


def read_table(path: Path, steps: int, blocks: int) -> Schedule:
    """A table of one's own: JSON, S rows of K zeros and ones, 1 where a block is recomputed."""
    if not path.is_file():
        raise ConfigError(f"Expected a schedule at {path}, found no such file.")
    try:
        table = np.array(json.loads(path.read_text()))
    except ValueError as error:
        raise ConfigError(
            f"Expected JSON, S rows of K zeros and ones, in {path}: {error}."
        ) from error
    if table.shape != (steps, blocks) or not np.isin(table, (0, 1)).all():
        raise ConfigError(
            f"Expected {steps} rows (steps) of {blocks} zeros and ones (blocks) in {path}, got "
            f"{table.dtype} values of shape {table.shape}."
        )
    return Schedule(table.astype(np.bool_))


def _every(steps: int, interval: int) -> np.ndarray:
    if interval < 1:
        raise ConfigError(f"Expected an interval of 1 or more steps, got {interval}.")
    marks: np.ndarray = np.arange(steps) % interval == 0
    return marks
