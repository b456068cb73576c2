"""Measures the change (eq. 6) of recomputed blocks while a request runs, on the engines' device.

A block's last two outputs lie in two buffers that are written in turn, so that nothing is copied:
a measurement is one reduction over both, behind the step's other work. Results stay on the device
until the request is done.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from blockcache.runtime.devices.device import Device, StepFunction
from blockcache.runtime.devices.tensor import Tensor


def previous_steps(recompute: np.ndarray) -> np.ndarray:
    """The step at which the output before was computed, int64 [S, K]; -1 where there is none.

    Examples:
        >>> previous_steps(np.array([[True], [False], [True], [True]])).ravel().tolist()
        [-1, 0, 0, 2]
    """
    steps = np.where(recompute, np.arange(len(recompute))[:, None], -1)
    latest = np.maximum.accumulate(steps, axis=0)
    return np.concatenate([np.full_like(latest[:1], -1), latest[:-1]])


class ChangeMeter:
    """One run's measurements, bound to its buffers."""

    def __init__(
        self,
        device: Device,
        images: int,
        compared: np.ndarray,
        outputs: Callable[[int, int], tuple[Tensor, Tensor]],
    ) -> None:
        """Bind what is compared.

        Args:
            device: where the outputs lie.
            images: N.
            compared: bool [S, K], where a block's new output is compared with the one before.
            outputs: gives the two outputs to compare, by step and block.
        """
        self._device, self._compared = device, compared
        steps, blocks = compared.shape
        memory = device.allocate(4 * images * compared.size)
        self._result = device.tensor(memory, 0, (steps, blocks, images), "float32")
        self._launches: list[list[Callable[[], None]]] = [[] for _ in range(steps)]
        for step, k in np.argwhere(compared).tolist():
            place = 4 * images * (step * blocks + k)
            target = device.tensor(memory, place, (images,), "float32")
            self._launches[step].append(device.change(target, *outputs(step, k)))

    def after(self, solver: StepFunction) -> StepFunction:
        """The solver's step, then the step's measurements."""
        steps = self._launches

        def solve_and_measure(step: int) -> None:
            solver(step)
            for launch in steps[step]:
                launch()

        return solve_and_measure

    def read(self) -> np.ndarray:
        """The change of a finished run, float32 [S, K, images]; NaN where none is compared.

        An output with NaN or infinity counts as an infinite change.
        """
        change = self._device.download(self._result)
        change[~np.isfinite(change)] = np.inf
        change[~self._compared] = np.nan
        return change
