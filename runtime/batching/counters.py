"""How requests ended, counted; and what a continuous batch counts, for dashboards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from blockcache.runtime.errors import Cancelled, DeadlineError


@dataclass
class RequestTally:
    """How many requests came, and how they ended. Its owner guards it by a lock."""

    submitted: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0  # past their deadline

    @property
    def pending(self) -> int:
        """Requests that have not ended."""
        return self.submitted - self.finished - self.failed - self.cancelled - self.expired

    def end(self, error: BaseException | None) -> None:
        """Count the end of a request: with a result, or with an error."""
        if error is None:
            self.finished += 1
        elif isinstance(error, Cancelled):
            self.cancelled += 1
        elif isinstance(error, DeadlineError):
            self.expired += 1
        else:
            self.failed += 1


@dataclass(frozen=True, kw_only=True)
class BatchCounters:
    """A moment's figures; all but the first two only rise.

    ``submitted = waiting + active + finished + failed + cancelled + expired``.
    """

    waiting: int  # for a slot
    active: int  # in slots
    submitted: int
    finished: int
    failed: int
    cancelled: int
    expired: int  # past their deadline
    ticks: int
    steps: int  # image steps: what the same requests would have taken one by one
    launches: int
    launches_saved: int  # one by one it would have been so many more
    launches_of_images: Mapping[int, int]  # by how many images shared the launch
    waiting_seconds: float  # summed over requests that got a slot
    denoising_seconds: float  # summed over requests that finished
    engine_seconds: float  # of ticks: inside the engine library,
    copy_seconds: float  # bringing rows together and back,
    solver_seconds: float  # in the solver

    @property
    def images_a_launch(self) -> float:
        """The mean batch of a launch; 0 before the first."""
        return (self.launches + self.launches_saved) / self.launches if self.launches else 0.0

    def to_json(self) -> dict[str, object]:
        """By name, as values that JSON has."""
        shared = {str(images): count for images, count in self.launches_of_images.items()}
        return {**asdict(self), "launches_of_images": shared}
