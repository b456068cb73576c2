"""What a device must offer: memory, and the few callables that the denoising loop needs.

A ``Device`` hands out memory once, when a program is bound. Everything it returns keeps its
address.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from blockcache.runtime.devices.device_view import DeviceView
from blockcache.runtime.devices.tensor import Tensor, Window
from blockcache.runtime.errors import InputError

StepFunction: TypeAlias = Callable[[int], None]
"""Called with the step number; touches bound memory only."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of one request."""

    scale: float
    rescale: float = 0.0  # phi of arXiv 2305.08891, section 3.4; 0: off
    image_scale: float = 1.0  # InstructPix2Pix's, of the image; at 1 the image is in both halves

    def __post_init__(self) -> None:
        if not 0 <= self.rescale <= 1:
            raise InputError(f"guidance_rescale: expected 0 (off) to 1, got {self.rescale}.")
        if self.image_scale < 1:
            raise InputError(
                f"image_guidance_scale: expected 1 (off) or more, got {self.image_scale}."
            )
        if self.rescale and self.image_scale != 1:
            raise InputError(
                f"guidance_rescale: expected 0 beside an image_guidance_scale, got {self.rescale}. "
                f"Leave one of them out."
            )

    @property
    def rows(self) -> int:
        """How often an image stands in the batch.

        Twice, the unconditional half first; or three times: without anything, with the image alone,
        with image and prompt.
        """
        return 2 if self.image_scale == 1 else 3


def modes_of(guidance: Guidance | None) -> tuple[int, bool]:
    """(rows an image, rescaled): what decides which kernels a step launches."""
    return (1, False) if guidance is None else (guidance.rows, guidance.rescale != 0)


class Device(Protocol):
    """Memory and data movement of one device."""

    @property
    def name(self) -> str:
        """``cpu`` or ``cuda``."""

    @property
    def index(self) -> int:
        """Of the GPU; 0 on the host."""

    def allocate(self, count: int) -> Any:
        """``count`` bytes of zeroed memory, aligned to 256 bytes, freed with the object."""

    def tensor(self, memory: Any, offset: int, shape: Sequence[int], dtype: str) -> Tensor:
        """A tensor at ``offset`` bytes into ``memory``."""

    def upload(self, target: Tensor, values: np.ndarray) -> None:
        """Copy (and convert) host values into a tensor of the same shape."""

    def copy_from(self, target: Tensor, pointer: int) -> None:
        """Copy a tensor of the same shape and dtype, which lies on this device at ``pointer``.

        What wrote it is done, or comes before on ``stream``.
        """

    def copy(self, target: Window, source: Window) -> None:
        """Copy one rectangle to another of the same planes, rows and dtype, inside the device."""

    def synchronize(self) -> None:
        """Wait until everything that was put on ``stream`` is done."""

    @property
    def stream(self) -> int:
        """The stream that everything of this device runs on; 0 on the host."""

    def download(self, source: Tensor) -> np.ndarray:
        """A host copy, float32 for floating dtypes; waits for pending work."""

    def row_loader(self, row: Tensor, table: Tensor) -> StepFunction:
        """A function that copies row ``step`` of ``table [S, R]`` into ``row [R]``."""

    def solver(
        self,
        coefficients: np.ndarray,
        guidance: Guidance | None,
        seeds: np.ndarray | None,
        latents: Tensor,
        past_x0: Tensor,
        model_output: Tensor,
        model_input: Tensor,
    ) -> StepFunction:
        """A function that does guidance and the solver update of ``step``, in place.

        Args:
            coefficients: float32 [S, 8], see ``SolverTables``.
            guidance: None without guidance.
            seeds: uint64 [N], one an image; None where no step adds noise.
            latents: float32 [N, C, H, W], read and written.
            past_x0: float32 [2, N, C, H, W], what the last two steps predicted. Step s reads both
                and writes its own to ``past_x0[s % 2]``.
            model_output: [2N, C, H, W], the unconditional half first; [3N, ...] with guidance by
                the image, see ``Guidance.rows``; or [N, ...] without.
            model_input: shaped alike; the next step's is written.
        """

    def model_input(self, scales: np.ndarray, latents: Tensor, model_input: Tensor) -> StepFunction:
        """A function that makes the model input after ``step`` anew: ``scales[step] * latents``.

        It is for latents that a caller has edited, also on a stream of its own. ``scales`` is
        float32 [S]; the shapes are those of ``solver``.
        """

    def change(self, target: Tensor, now: Tensor, before: Tensor) -> Callable[[], None]:
        """A function that puts eq. 6 per image into ``target``, float32 [images].

        ``now`` and ``before`` are [images, ...], or with guidance [2 * images, ...]: an image's
        two halves count together.
        """

    def view(self, tensor: Tensor) -> DeviceView | None:
        """A float32 tensor where it lies, for other libraries; None where the host sees it."""

    def session_lock(self) -> AbstractContextManager[object]:
        """What a session holds while it runs a request.

        It is one lock for all sessions on a stream: a graph must not capture the launches of
        another session. On the host each session has its own, so that they run side by side.
        """

    @property
    def scratch_generation(self) -> int:
        """Counts the moves of the activation memory that engines share."""

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record what ``enqueue`` launches, without running it; returns the replay.

        Raises:
            EngineError: the driver, or an engine of this device, cannot do it.
        """

    def times_ms(self, launches: Sequence[Callable[[], None]]) -> list[float]:
        """Run ``launches`` in turn; what each takes on the device, in milliseconds.

        All of them are put on the stream before anything is waited for. On a GPU that was idle the
        first ones contain the host's own time; the others do not, where the device takes longer
        than the host does to launch.
        """
