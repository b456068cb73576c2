"""What a denoising run did: per step and segment, whether it ran and for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from blockcache.runtime.plan import Segment


@dataclass
class RunRecord:
    """Filled in while a run goes on; times are host clock, in nanoseconds."""

    segments: tuple[Segment, ...]  # of the loop, in running order
    steps: range  # the steps that were executed
    ran: np.ndarray = field(init=False)  # bool [S, segments]
    segment_ns: np.ndarray = field(init=False)  # int64 [S, segments], 0 where it did not run
    prompt_ns: int = 0  # the prompt segment, once
    total_ns: int = 0  # the loop, from the first launch to the last solver step
    change: np.ndarray | None = None
    """With a drift monitor: eq. 6 of recomputed blocks, float32 [S, K, N], NaN elsewhere."""

    def __post_init__(self) -> None:
        shape = (self.steps.stop, len(self.segments))
        self.ran = np.zeros(shape, np.bool_)
        self.segment_ns = np.zeros(shape, np.int64)

    def launched(self, launches: Sequence[Sequence[tuple[int, object]]]) -> None:
        """Note what CUDA graphs ran; the host's clock sees launches only, so it times none."""
        for step in self.steps:
            self.ran[step, [index for index, _ in launches[step]]] = True
        self.segment_ns[:] = 0

    @property
    def computed_fraction(self) -> float:
        """Share of the blocks' FLOPs that was computed in the executed steps."""
        flops = np.array([s.flops if s.role == "block" else 0 for s in self.segments], np.float64)
        executed = self.ran[self.steps.start :]
        return float((executed * flops).sum() / max(flops.sum() * len(self.steps), 1.0))

    @property
    def engines_ms(self) -> float:
        """Time inside engines, in milliseconds."""
        return float(self.segment_ns.sum()) / 1e6

    @property
    def total_ms(self) -> float:
        """Time of the whole loop, in milliseconds."""
        return self.total_ns / 1e6

    def summary(self) -> dict[str, float | int]:
        """The figures people ask for first."""
        return {
            "steps": len(self.steps),
            "total_ms": round(self.total_ms, 3),
            "engines_ms": round(self.engines_ms, 3),
            "prompt_ms": round(self.prompt_ns / 1e6, 3),
            "computed_fraction": round(self.computed_fraction, 4),
            "launches": int(self.ran.sum()),
        }

    def mean_ms(self) -> dict[str, float]:
        """Mean time per launch of every segment that ran, in milliseconds."""
        counts = self.ran.sum(axis=0)
        totals = self.segment_ns.sum(axis=0) / 1e6
        return {
            segment.name: float(total / count)
            for segment, total, count in zip(self.segments, totals, counts, strict=True)
            if count
        }
