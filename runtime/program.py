"""Everything that is bound once for one shape: memory, addresses, and what each step launches.

Tensors live in four places. Boundary tensors of the trunk share an arena by lifetime. A block's
output has a buffer of its own that persists from step to step (two, written in turn, where the
alignment combines the last two outputs or a monitor compares them): a reused block costs nothing,
the trunk segment behind it reads the value that is still there. What changes with the step number
alone (hoisted time projections, alignment) is one row of a table, copied into place at the start of
the step. Request tensors (latents, prompt) are plain buffers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from blockcache.runtime.change_meter import ChangeMeter, previous_steps
from blockcache.runtime.devices.device import Device, StepFunction
from blockcache.runtime.devices.tensor import Tensor, encode
from blockcache.runtime.engines.engine import Engine, Launch
from blockcache.runtime.memory import Lifetime, aligned, plan_arena
from blockcache.runtime.plan import (
    DTYPE_BYTES,
    LOOP_ROLES,
    ModelFacts,
    Preset,
    Schedule,
    Segment,
    Sizes,
    TensorSpec,
    block_output_name,
    coefficient_names,
    previous_output_name,
    row_specs,
)
from blockcache.runtime.run_table import computed, run_table


@dataclass(frozen=True)
class MemoryReport:
    """Bytes that a program holds, engines' weights and scratch not counted."""

    arena: int  # boundary tensors, sharing memory by lifetime
    boundary_sum: int  # the same tensors side by side
    blocks: int  # persistent block outputs
    tables: int  # per-step rows
    requests: int  # latents, model input and output, prompt tensors


@dataclass(frozen=True)
class Run:
    """What the steps of a run do, for one first step."""

    first: int
    launches: tuple[tuple[tuple[int, Launch], ...], ...]  # per step: (segment index, launch)
    load_row: StepFunction
    meter: ChangeMeter | None  # where a monitor wants the change of what is recomputed


class Program:
    """A bundle's segments bound to memory for one preset and one set of sizes."""

    def __init__(
        self,
        model: ModelFacts,
        segments: Sequence[Segment],
        engines: Mapping[str, Engine],
        preset: Preset,
        device: Device,
        sizes: Sizes,
        images: int,
        measured: bool = False,
    ) -> None:
        self.loop = tuple(segment for segment in segments if segment.role in LOOP_ROLES)
        self._preset, self._device, self._engines = preset, device, engines
        self._outputs = model.outputs
        self._buffers = 2 if measured else model.outputs
        self._kept = {  # the tensor of a kept output, and of the one computed before it
            block_output_name(k): previous_output_name(k) for k in range(len(model.blocks))
        }
        self._measured, self._images = measured, images
        self._measurable = np.array([block.cut is None for block in model.blocks])
        prompts = [segment for segment in segments if segment.role == "prompt"]
        groups = grouped(model, self.loop, prompts, self._buffers)
        self._rows = groups.rows
        self.tensors: dict[str, Tensor] = {}
        arena_bytes = self._place_boundary(groups.boundary, sizes)
        for spec in (*groups.requests, *groups.blocks):
            self._allocate(spec.name, spec.shape(sizes), spec.dtype)
        latents = (images, *self.tensors["sample"].shape[1:])
        self._allocate("latents", latents, "float32")
        self._allocate("past_x0", (2, *latents), "float32")
        row_bytes = self._place_row(sizes)
        self.memory = MemoryReport(
            arena=arena_bytes,
            boundary_sum=sum(aligned(spec.bytes(sizes)) for spec in groups.boundary),
            blocks=sum(spec.bytes(sizes) for spec in groups.blocks),
            tables=(preset.schedule.steps + 1) * row_bytes,
            requests=sum(spec.bytes(sizes) for spec in groups.requests)
            + 3 * self.tensors["latents"].bytes,
        )
        self.prompt = tuple(self._bind(segment) for segment in prompts)
        self.conditions: Mapping[str, np.ndarray] | None = None
        """Those of the last request, whose prompt tensors are in place."""
        self._bound: dict[tuple[str, ...], Launch] = {}
        self._runs: dict[int, Run] = {}

    def run_from(self, first: int) -> Run:
        """The launches of a run whose first executed step is ``first``; bound on first use."""
        if first not in self._runs:
            schedule = self._preset.schedule.started_at(first)
            launches = ((),) * first + tuple(self._launches(schedule))
            meter = self._meter(first) if self._measured else None
            self._runs[first] = Run(first, launches, self._row_loader(first), meter)
        return self._runs[first]

    # -- memory --------------------------------------------------------------------------------

    def _allocate(self, name: str, shape: Sequence[int], dtype: str) -> None:
        memory = self._device.allocate(math.prod(shape) * DTYPE_BYTES[dtype])
        self.tensors[name] = self._device.tensor(memory, 0, shape, dtype)

    def _place_boundary(self, boundary: Sequence[TensorSpec], sizes: Sizes) -> int:
        """Boundary tensors of the trunk share one allocation by lifetime; returns its bytes."""
        written = {o.name: i for i, segment in enumerate(self.loop) for o in segment.outputs}
        read = {v.name: i for i, segment in enumerate(self.loop) for v in segment.inputs}
        arena = plan_arena(
            [Lifetime(t.bytes(sizes), written[t.name], read[t.name]) for t in boundary]
        )
        memory = self._device.allocate(arena.bytes)
        for spec, offset in zip(boundary, arena.offsets, strict=True):
            shape = spec.shape(sizes)
            self.tensors[spec.name] = self._device.tensor(memory, offset, shape, spec.dtype)
        return arena.bytes

    def _place_row(self, sizes: Sizes) -> int:
        """The step's row: its fields side by side in one allocation; returns its bytes."""
        offsets, total = [], 0
        for spec in self._rows:
            offsets.append(total)
            total += aligned(spec.bytes(sizes))
        memory = self._device.allocate(total)
        for spec, offset in zip(self._rows, offsets, strict=True):
            shape = spec.shape(sizes)
            self.tensors[spec.name] = self._device.tensor(memory, offset, shape, spec.dtype)
        self._row = self._device.tensor(memory, 0, (total,), "uint8")
        self._row_offsets = offsets
        return total

    def _row_loader(self, first: int) -> StepFunction:
        """Upload the table of a run; the first executed step uses fresh outputs as they are."""
        steps = self._preset.schedule.steps
        table = np.zeros((steps, *self._row.shape), np.uint8)
        values = dict(self._preset.time_tables)
        for k, alignment in enumerate(self._preset.alignment.tables):
            coefficients = alignment.copy()
            coefficients[first] = 0.0
            coefficients[first, 0] = 1.0
            for place, name in enumerate(coefficient_names(k, self._outputs)):
                values[name] = coefficients[:, place]
        for spec, offset in zip(self._rows, self._row_offsets, strict=True):
            one = encode(values[spec.name].reshape(steps, -1), spec.dtype)  # of one image
            content = np.tile(one, (1, self.tensors[spec.name].bytes // one.shape[1]))
            table[:, offset : offset + content.shape[1]] = content
        memory = self._device.allocate(table.nbytes)
        target = self._device.tensor(memory, 0, table.shape, "uint8")
        self._device.upload(target, table)
        return self._device.row_loader(self._row, target)

    # -- launches ------------------------------------------------------------------------------

    def _launches(self, schedule: Schedule) -> Iterable[tuple[tuple[int, Launch], ...]]:
        """Per step, the segments that run. Kept outputs go to their buffers in turn."""
        counts = dict.fromkeys(self._kept, 0)
        for running in run_table(self.loop, schedule):
            launches = []
            for index in np.flatnonzero(running).tolist():
                segment = self.loop[index]
                for spec in segment.outputs:
                    if spec.name in counts:
                        counts[spec.name] += 1
                launches.append((index, self._launch(segment, counts)))
            yield tuple(launches)

    def _slots(self, computed: int) -> tuple[int, int]:
        """Buffers of the last output and of the one before, after ``computed`` recomputes.

        Before the second recompute there is no earlier output: both are the last one, so that
        nothing of an earlier request is ever read.
        """
        last = (computed - 1) % self._buffers
        return last, last if computed < 2 else (computed - 2) % self._buffers

    def _launch(self, segment: Segment, counts: Mapping[str, int]) -> Launch:
        """The segment bound to the buffers that its kept outputs are in, after ``counts`` runs."""
        names = {spec.name: spec.name for spec in (*segment.inputs, *segment.outputs)}
        if self._buffers == 2:
            for name in names.keys() & counts.keys():
                buffers = (name, self._kept[name])
                last, before = self._slots(counts[name])
                names[name] = buffers[last]
                if self._kept[name] in names:
                    names[self._kept[name]] = buffers[before]
        key = (segment.name, *names.values())
        if key not in self._bound:
            self._bound[key] = self._bind(segment, names)
        return self._bound[key]

    def _bind(self, segment: Segment, names: Mapping[str, str] | None = None) -> Launch:
        """Bind a segment; ``names`` says which tensor stands for each of its own."""
        own = [spec.name for spec in (*segment.inputs, *segment.outputs)]
        tensors = {name: self.tensors[names[name] if names else name] for name in own}
        return self._engines[segment.name].bind(tensors)

    # -- measurements --------------------------------------------------------------------------

    def _meter(self, first: int) -> ChangeMeter:
        """Measure only pairs of outputs that a full run has too.

        After a late start, which recomputes every block, the first gap is shorter than the profile
        knows.
        """
        schedule = self._preset.schedule
        usual = computed(self.loop, run_table(self.loop, schedule), schedule.blocks)
        late = schedule.started_at(first)
        recompute = np.zeros_like(usual)
        recompute[first:] = computed(self.loop, run_table(self.loop, late), schedule.blocks)
        before, counts = previous_steps(recompute), np.cumsum(recompute, axis=0)
        compared = recompute & (before >= 0) & (before == previous_steps(usual)) & self._measurable

        def last_two(step: int, k: int) -> tuple[Tensor, Tensor]:
            buffers = (self.tensors[block_output_name(k)], self.tensors[previous_output_name(k)])
            last, earlier = self._slots(int(counts[step, k]))
            return buffers[last], buffers[earlier]

        return ChangeMeter(self._device, self._images, compared, last_two)


@dataclass(frozen=True)
class TensorGroups:
    """Where each tensor of a bundle belongs."""

    boundary: tuple[TensorSpec, ...]  # trunk to other segments, within a step
    blocks: tuple[TensorSpec, ...]  # block outputs, every buffer
    rows: tuple[TensorSpec, ...]  # fields of the step's row
    requests: tuple[TensorSpec, ...]  # sample, model output, conditions, prompt tensors


def grouped(
    model: ModelFacts, loop: Sequence[Segment], prompts: Sequence[Segment], buffers: int
) -> TensorGroups:
    """Sort all tensors of the loop, and what feeds it, by place.

    Args:
        model: its blocks and conditions.
        loop: segments of the loop, in the order in which they run.
        prompts: segments that run once a request.
        buffers: how many computed outputs of a block are kept, 1 or 2.
    """
    outputs = {t.name: t for segment in loop for t in segment.outputs}
    inputs = {t.name: t for segment in loop for t in segment.inputs}
    requests = {t.name: t for t in model.conditions}
    requests |= {t.name: t for segment in prompts for t in segment.outputs}
    requests |= {"sample": inputs["sample"], "model_output": outputs["model_output"]}
    names = [block_output_name(k) for k in range(len(model.blocks))]
    blocks = {name: outputs[name] for name in names}
    if buffers == 2:
        for k, name in enumerate(names):
            before = previous_output_name(k)
            blocks[before] = replace(outputs[name], name=before)
    apart = requests.keys() | blocks.keys()
    return TensorGroups(
        boundary=tuple(t for name, t in outputs.items() if name not in apart),
        blocks=tuple(blocks.values()),
        rows=row_specs(model, (*loop, *prompts)),
        requests=tuple(requests.values()),
    )
