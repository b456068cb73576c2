"""A text encoder, decoder or encoder on its device: numpy arrays in, numpy arrays out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from blockcache.runtime.devices.tensor import Tensor
from blockcache.runtime.engines.engine import Backend, Engine, Launch
from blockcache.runtime.memory import aligned
from blockcache.runtime.plan import AXES, Segment, Sizes

SHAPES = 4
"""How many shapes a part keeps memory for; the one unused for longest is let go."""


class BoundPart:
    """One part with its engine, bound to memory of its own for every shape in use.

    Not thread-safe: the pipeline that owns it holds a lock.
    """

    def __init__(self, part: Segment, engine: Engine, backend: Backend) -> None:
        self.part = part
        self._engine, self._device = engine, backend.device
        self._axes = {axis for spec in part.inputs for dim in spec.dims for axis in dim.axes}
        self._bound: dict[Sizes, tuple[dict[str, Tensor], Launch]] = {}

    def __call__(self, sizes: Sizes, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once.

        Args:
            sizes: of the tensors; axes that the part does not have do not matter.
            inputs: by name, shaped as the part's inputs at ``sizes``.

        Returns:
            By name, on the host; float32 where the part writes floating point.

        Raises:
            EngineError: the engine library failed.
        """
        tensors, launch = self._at(sizes)
        with self._device.session_lock():
            for name, values in inputs.items():
                self._device.upload(tensors[name], values)
            launch()
            names = [spec.name for spec in self.part.outputs]
            return {name: self._device.download(tensors[name]) for name in names}

    def release(self) -> None:
        """Let go of all memory."""
        self._bound.clear()

    def _at(self, sizes: Sizes) -> tuple[dict[str, Tensor], Launch]:
        """Memory and launch for a shape, made on first use."""
        key = Sizes(**{axis: sizes.along(axis) if axis in self._axes else 1 for axis in AXES})
        bound = self._bound.pop(key, None)
        if bound is None:
            while len(self._bound) >= SHAPES:
                del self._bound[next(iter(self._bound))]  # before the new one takes its memory
            specs = (*self.part.inputs, *self.part.outputs)
            offsets = np.cumsum([0, *(aligned(spec.bytes(key)) for spec in specs)]).tolist()
            memory = self._device.allocate(offsets[-1])
            tensors = {
                spec.name: self._device.tensor(memory, offset, spec.shape(key), spec.dtype)
                for spec, offset in zip(specs, offsets, strict=False)
            }
            bound = tensors, self._engine.bind(tensors)
        self._bound[key] = bound
        return bound
