"""What a batch hands out: a future for each request, and what became of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class BatchedResult:
    """The result of one request of a continuous batch."""

    latents: np.ndarray  # float32 [1, C, H, W]
    steps: int  # that were executed
    launches: int  # of segments, that it took part in
    waiting_ms: float  # from submit until it got a slot
    denoising_ms: float  # from there to its last step

    def summary(self) -> dict[str, float | int]:
        """The figures people ask for first."""
        return {
            "steps": self.steps,
            "launches": self.launches,
            "waiting_ms": round(self.waiting_ms, 3),
            "denoising_ms": round(self.denoising_ms, 3),
        }


@dataclass(frozen=True)
class BatchProgress:
    """What a callback of a request gets after each of its steps."""

    step: int  # that has just finished, 0..S-1
    steps: int  # S
    timestep: float  # the scheduler's number for this step
    latents: np.ndarray  # float32 [1, C, H, W], a copy


class RequestFuture(Future[_Result]):
    """What is to come of a request: ``concurrent.futures.Future``, so that asyncio takes it.

    ``cancel`` also ends a request that runs already, before its next step; all others go on. Its
    ``result`` then raises ``Cancelled``.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        super().__init__()
        self._wake = wake
        self.cancel_requested = False

    def cancel(self) -> bool:
        """Ask for the end; False where there is a result already."""
        if self.done():
            return False
        self.cancel_requested = True
        self._wake()
        return True


class BatchFuture(RequestFuture[BatchedResult]):
    """The latents to come of a request; ``cancel`` also ends one that runs already."""
