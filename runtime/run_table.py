"""Which segments run at which step: those whose results somebody reads.

A schedule says which blocks and branches are computed anew. From the segments' inputs and outputs
follows the rest: a segment runs when another that runs reads what it writes. What is *kept* (a
block's output, a branch's output) is not asked for where the schedule reuses it, so nothing that
serves it alone runs either. A step that reuses a branch skips all blocks inside it, whatever the
schedule says of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import LOOP_ROLES, Schedule, Segment, block_output_name

MODEL_OUTPUT = "model_output"


def run_table(loop: Sequence[Segment], schedule: Schedule) -> np.ndarray:
    """The segments that run: bool [S, M].

    Args:
        loop: the M segments of the loop, in the order in which they run.
        schedule: what is computed anew.

    Raises:
        ConfigError: a step reads a kept output that no step before has computed.
    """
    kept = {block_output_name(k): k for k in range(schedule.blocks)}
    table = np.zeros((schedule.steps, len(loop)), np.bool_)
    there: set[str] = set()
    for step, recompute in enumerate(schedule.recompute):
        wanted = {MODEL_OUTPUT}
        reused: set[str] = set()
        for index in reversed(range(len(loop))):
            segment = loop[index]
            if wanted.isdisjoint(spec.name for spec in segment.outputs):
                continue
            table[step, index] = True
            for spec in segment.inputs:
                is_reused = spec.name in kept and not recompute[kept[spec.name]]
                (reused if is_reused else wanted).add(spec.name)
        missing = sorted(reused - there)
        if missing:
            raise ConfigError(
                f"The schedule reuses {missing[0]} at step {step}, but no step before has "
                f"computed it. Compute it there."
            )
        for index in np.flatnonzero(table[step]).tolist():
            there.update(spec.name for spec in loop[index].outputs if spec.name in kept)
    table.setflags(write=False)
    return table


def computed(loop: Sequence[Segment], table: np.ndarray, blocks: int) -> np.ndarray:
    """What is computed at each step, by a table of segments: bool [S, K]."""
    writers = {spec.name: index for index, segment in enumerate(loop) for spec in segment.outputs}
    return np.stack([table[:, writers[block_output_name(k)]] for k in range(blocks)], axis=1)


def flops_run(segments: Sequence[Segment], schedule: Schedule) -> np.ndarray:
    """FLOPs of one denoising loop, segment by segment: float64 [M].

    Args:
        segments: of a bundle; those outside the loop cost nothing here.
        schedule: what is computed anew.
    """
    loop = [segment for segment in segments if segment.role in LOOP_ROLES]
    runs = dict(zip((s.name for s in loop), run_table(loop, schedule).sum(axis=0), strict=True))
    return np.array([float(runs.get(s.name, 0)) * s.flops for s in segments], np.float64)


def blocks_share(segments: Sequence[Segment], schedule: Schedule) -> float:
    """Share of the blocks' FLOPs that one denoising loop computes."""
    blocks = np.array([segment.role == "block" for segment in segments], np.bool_)
    whole = schedule.steps * sum(s.flops for s in segments if s.role == "block")
    return float(flops_run(segments, schedule)[blocks].sum() / whole) if whole else 1.0
