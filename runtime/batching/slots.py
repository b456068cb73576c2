"""Where the tensors of a batch lie: one allocation, made when it opens.

A *slot* holds what one image needs from its first step to its last: conditions, latents, cached
outputs. It has two rows, for the halves of guidance, or three (InstructPix2Pix). What segments hand
each other within a tick lies beside the slots, sharing memory by lifetime.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from blockcache.runtime.devices.host import HostDevice
from blockcache.runtime.devices.tensor import Tensor
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.memory import Lifetime, aligned, plan_arena
from blockcache.runtime.plan import Dim, ModelFacts, Segment, Sizes, TensorSpec
from blockcache.runtime.program import grouped


@dataclass(frozen=True)
class BatchMemory:
    """Bytes that a batch holds, engines' weights and scratch not counted."""

    cached: int  # outputs that steps reuse, of all slots
    requests: int  # conditions, latents, model input and output, of all slots
    boundary: int  # what segments hand each other within a tick
    gathered: int  # what a launch reads and writes beside its place
    tables: int  # rows of all presets

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


class SlotMemory:
    """All tensors of a batch of ``slots`` images at most.

    Args:
        model: its blocks and conditions.
        loop: segments of the loop, in the order in which they run.
        prompts: segments that run once a request.
        device: the host.
        sizes: of an image.
        slots: how many.

    Raises:
        ConfigError: a tensor has another first axis than the batch.
    """

    def __init__(
        self,
        model: ModelFacts,
        loop: Sequence[Segment],
        prompts: Sequence[Segment],
        device: HostDevice,
        sizes: Sizes,
        slots: int,
    ) -> None:
        self.rows_a_slot = model.most_rows  # guidance runs an image as often
        self.rows = self.rows_a_slot * slots
        self.outputs = model.outputs
        self._device = device
        self._sizes = replace(sizes, batch=self.rows)
        groups = grouped(model, loop, prompts, buffers=1)
        self.fields = groups.rows
        self.cached = {spec.name for spec in groups.blocks}
        segments = (*loop, *prompts)
        for spec in {t for s in segments for t in (*s.inputs, *s.outputs)}:
            _require_rows(spec)
        kept = {t.name: (model.outputs * self.rows, t) for t in groups.blocks}
        kept |= {t.name: (self.rows, t) for t in groups.requests}
        self._offsets: dict[str, int] = {}
        total = 0
        for name, (rows, spec) in kept.items():
            self._offsets[name] = total
            total += aligned(rows * self._row_bytes(spec))
        latents = (slots, *self._shape(groups.requests, "sample"))
        total = self._reserve("latents", 4 * math.prod(latents), total)
        total = self._reserve("past_x0", 8 * math.prod(latents), total)
        of_slots = total
        total = self._place_boundary(groups.boundary, loop, total)
        boundary = total - of_slots
        gathered = max(self._gather_bytes(segment) for segment in segments)
        self._gathered = total
        self._memory = device.allocate(total + gathered)
        self.tensors = {
            name: self._tensor(self._offsets[name], rows, spec)
            for name, (rows, spec) in kept.items()
        }
        shapes = {"latents": latents, "past_x0": (slots, 2, *latents[1:])}
        self._of_slots = {  # one a slot, whatever its rows
            name: device.tensor(self._memory, self._offsets[name], shape, "float32")
            for name, shape in shapes.items()
        }
        cached = sum(aligned(self.tensors[spec.name].bytes) for spec in groups.blocks)
        self.memory = BatchMemory(cached, of_slots - cached, boundary, gathered, tables=0)

    def boundary(self, spec: TensorSpec, rows: int) -> Tensor:
        """The first rows of a tensor that lives within a tick."""
        return self._tensor(self._offsets[spec.name], rows, spec)

    def gathered(self, segment: Segment, rows: int) -> dict[str, Tensor]:
        """Room for all inputs and outputs of a segment, until the next launch."""
        found, offset = {}, self._gathered
        for spec in (*segment.inputs, *segment.outputs):
            found[spec.name] = self._tensor(offset, rows, spec)
            offset += aligned(self.rows * self._row_bytes(spec))
        return found

    def part(self, name: str, slot: int, rows: int) -> Tensor:
        """The rows of one slot: [rows, ...]; of latents [1, ...] and of past x0 [2, 1, ...]."""
        whole = self._of_slots.get(name) or self.tensors[name]
        if name in self._of_slots:
            shape = (1, *whole.shape[1:]) if name == "latents" else (2, 1, *whole.shape[2:])
            offset = slot * (whole.bytes // whole.shape[0])
        else:
            shape = (rows, *whole.shape[1:])
            offset = self.rows_a_slot * slot * (whole.bytes // whole.shape[0])
        return self._device.tensor(self._memory, self._offsets[name] + offset, shape, whole.dtype)

    def _reserve(self, name: str, count: int, total: int) -> int:
        self._offsets[name] = total
        return total + aligned(count)

    def _place_boundary(
        self, boundary: Sequence[TensorSpec], loop: Sequence[Segment], begin: int
    ) -> int:
        """Boundary tensors share memory by lifetime; returns where they end."""
        written = {o.name: i for i, segment in enumerate(loop) for o in segment.outputs}
        read = {v.name: i for i, segment in enumerate(loop) for v in segment.inputs}
        lifetimes = [
            Lifetime(t.bytes(self._sizes), written[t.name], read[t.name]) for t in boundary
        ]
        arena = plan_arena(lifetimes)
        for spec, offset in zip(boundary, arena.offsets, strict=True):
            self._offsets[spec.name] = begin + offset
        return begin + arena.bytes

    def _gather_bytes(self, segment: Segment) -> int:
        specs = (*segment.inputs, *segment.outputs)
        return sum(aligned(self.rows * self._row_bytes(spec)) for spec in specs)

    def _row_bytes(self, spec: TensorSpec) -> int:
        return spec.bytes(replace(self._sizes, batch=1))

    def _shape(self, specs: Sequence[TensorSpec], name: str) -> tuple[int, ...]:
        """Of one row."""
        (found,) = [spec for spec in specs if spec.name == name]
        return found.shape(self._sizes)[1:]

    def _tensor(self, offset: int, rows: int, spec: TensorSpec) -> Tensor:
        shape = (rows, *spec.shape(self._sizes)[1:])
        return self._device.tensor(self._memory, offset, shape, spec.dtype)


def _require_rows(spec: TensorSpec) -> None:
    """Each image has rows of its own: the batch is the first axis, and no other depends on it."""
    first, *rest = spec.dims
    if first != Dim.parse("batch") or any("batch" in dim.axes for dim in rest):
        raise ConfigError(
            f"Expected tensors with the batch as first axis, {spec.name!r} is "
            f"[{', '.join(map(str, spec.dims))}]. Such a model runs by Session, one request at a "
            f"time; please report its config."
        )
