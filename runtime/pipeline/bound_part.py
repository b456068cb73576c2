"""A text encoder, decoder or encoder on its device."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from blockcache.runtime.devices.device import Device
from blockcache.runtime.devices.tensor import Tensor, Window
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
        self._engine = engine
        self.device: Device = backend.device
        self._axes = {axis for spec in part.inputs for dim in spec.dims for axis in dim.axes}
        self._bound: dict[Sizes, tuple[dict[str, Tensor], Launch]] = {}

    def __call__(
        self, sizes: Sizes, inputs: Mapping[str, np.ndarray | Window]
    ) -> dict[str, np.ndarray]:
        """Run once, and copy what it writes to the host; see ``run``."""
        with self.device.session_lock():
            made = self.run(sizes, inputs)
            return {name: self.device.download(tensor) for name, tensor in made.items()}

    def run(self, sizes: Sizes, inputs: Mapping[str, np.ndarray | Window]) -> dict[str, Tensor]:
        """Run once.

        Args:
            sizes: of the tensors; axes that the part does not have do not matter.
            inputs: by name, shaped as the part's inputs at ``sizes``: arrays of the host, or what
                lies on the device in the part's own dtype.

        Returns:
            What it writes, in place: valid until it runs again. The caller holds the device's
            ``session_lock`` for as long as that is read.

        Raises:
            EngineError: the engine library failed.
        """
        with self.device.session_lock():
            tensors, launch = self._at(sizes)
            for name, values in inputs.items():
                if isinstance(values, Window):
                    self.device.copy(tensors[name].window(), values)
                else:
                    self.device.upload(tensors[name], values)
            launch()
            return {spec.name: tensors[spec.name] for spec in self.part.outputs}

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
            memory = self.device.allocate(offsets[-1])
            tensors = {
                spec.name: self.device.tensor(memory, offset, spec.shape(key), spec.dtype)
                for spec, offset in zip(specs, offsets, strict=False)
            }
            bound = tensors, self._engine.bind(tensors)
        self._bound[key] = bound
        return bound
