"""A tick: every active request advances one step of its own.

Each segment runs once, on those requests whose own row of the schedule asks for it. A schedule is
a table, so that is known before anything runs. What a request has cached lies in its slot; a launch
gathers it, and what the segment computes anew goes back there. What segments hand each other
within the tick is read in place where both run on the same requests, or both on the first ones of
the tick's order, which is why requests with more to run stand first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns

import numpy as np

from blockcache.runtime.batching.presets import PresetTables, Way
from blockcache.runtime.batching.slots import SlotMemory
from blockcache.runtime.devices.device import StepFunction
from blockcache.runtime.devices.host import HostDevice
from blockcache.runtime.devices.tensor import Tensor
from blockcache.runtime.engines.engine import Engine, Launch
from blockcache.runtime.evaluation import put_condition
from blockcache.runtime.loop import start_latents
from blockcache.runtime.plan import Segment, block_output_name, previous_output_name
from blockcache.runtime.request import Request


@dataclass(eq=False)
class ActiveRequest:
    """A request in its slot, and how far it is."""

    request: Request
    slot: int
    rows: np.ndarray  # int64 [1, 2 or 3], of the slots' tensors
    way: Way
    solver: StepFunction
    step: int  # the next to run
    computed: dict[str, int]  # by cached tensor: how often it was computed
    launches: int = 0  # that it took part in

    @property
    def done(self) -> bool:
        """Whether its last step has run."""
        return self.step == self.request.steps.stop


@dataclass(frozen=True, eq=False)
class _Together:
    """Requests that share a launch."""

    active: tuple[ActiveRequest, ...]
    rows: np.ndarray  # int64 [n], of the slots' tensors
    places: np.ndarray  # int64 [n], in the tick's order
    leading: bool  # whether they stand first in it


@dataclass
class TickTimes:
    """What ticks did so far; nanoseconds by the host's clock."""

    ticks: int = 0
    steps: int = 0  # image steps
    launches: int = 0
    launches_alone: int = 0  # that the same requests would have taken one by one
    engines_ns: int = 0
    copies_ns: int = 0  # gathers and scatters
    solver_ns: int = 0
    images: dict[int, int] = field(default_factory=dict)  # launches by how many images shared them


class Ticker:
    """Segments, slots and presets, bound for ticks. Not thread-safe.

    Args:
        loop: segments of the loop, in the order in which they run.
        prompts: segments that run once a request.
        engines: of all of these, by name.
        presets: what requests may ask for.
        slots: where their tensors lie.
        device: the host.
    """

    def __init__(
        self,
        loop: Sequence[Segment],
        prompts: Sequence[Segment],
        engines: Mapping[str, Engine],
        presets: PresetTables,
        slots: SlotMemory,
        device: HostDevice,
    ) -> None:
        self._loop, self._prompts, self._engines = loop, prompts, engines
        self._presets, self._slots, self._device = presets, slots, device
        kept = range(len(slots.cached))
        self._before = {previous_output_name(k): block_output_name(k) for k in kept}
        self._specs = {spec.name: spec for segment in loop for spec in segment.outputs}
        self._launches: dict[tuple[object, ...], tuple[Launch, dict[str, Tensor]]] = {}
        self._written: dict[str, _Together] = {}  # this tick's boundary tensors, and whose they are
        self.times = TickTimes()

    def admit(self, admitted: Sequence[tuple[Request, str, int]]) -> list[ActiveRequest]:
        """Put requests into free slots, and run for all together what depends on prompts alone.

        Args:
            admitted: request, preset and slot of each.

        Raises:
            EngineError: the engine library failed.
        """
        active = [self._placed(*each) for each in admitted]
        if active:
            together = _together(active, active)
            for segment in self._prompts:
                self._launch(segment, together)
        return active

    def tick(self, active: Sequence[ActiveRequest]) -> None:
        """Advance every request by one step.

        Raises:
            EngineError: the engine library failed; none of the requests can go on.
        """
        order = sorted(active, key=lambda a: -int(a.way.runs[a.step].sum()))
        runs = np.stack([a.way.runs[a.step] for a in order])  # bool [n, M]
        shared: dict[bytes, _Together] = {}
        self._written.clear()
        for index, segment in enumerate(self._loop):
            asking = runs[:, index]
            if asking.any():
                key = asking.tobytes()
                if key not in shared:
                    who = [a for a, asks in zip(order, asking, strict=True) if asks]
                    shared[key] = _together(who, order)
                self._launch(segment, shared[key])
        begin = perf_counter_ns()
        for each in order:
            each.solver(each.step)
            each.step += 1
        self.times.solver_ns += perf_counter_ns() - begin
        self.times.ticks += 1
        self.times.steps += len(order)

    def latents(self, active: ActiveRequest) -> np.ndarray:
        """float32 [1, C, H, W], a copy."""
        return self._device.download(self._slots.part("latents", active.slot, 1))

    # -- a request in its slot ---------------------------------------------------------------------

    def _placed(self, request: Request, preset: str, slot: int) -> ActiveRequest:
        count = request.sizes.batch
        parts = {
            name: self._slots.part(name, slot, count)
            for name in ("latents", "past_x0", "sample", "model_output", *request.conditions)
        }
        for name, values in request.conditions.items():
            put_condition(self._device, parts[name], values)
        tables, way = self._presets.solvers[preset], self._presets.way(preset, request.first)
        start = start_latents(request, tables)
        self._device.upload(parts["latents"], start)
        halves = [start * tables.input_scale[request.first]] * count
        self._device.upload(parts["sample"], np.concatenate(halves))
        solver = self._device.solver(
            way.coefficients,
            request.guidance,
            request.seeds,
            parts["latents"],
            parts["past_x0"],
            parts["model_output"],
            parts["sample"],
        )
        first = self._slots.rows_a_slot * slot
        rows = np.arange(first, first + count)
        counts = dict.fromkeys(self._slots.cached, 0)
        return ActiveRequest(request, slot, rows, way, solver, request.first, counts)

    # -- launches ----------------------------------------------------------------------------------

    def _launch(self, segment: Segment, together: _Together) -> None:
        """Gather what lies elsewhere, run, and bring back what slots keep."""
        for spec in segment.outputs:
            if spec.name in self._slots.cached:
                for each in together.active:
                    each.computed[spec.name] += 1
        begin = perf_counter_ns()
        count, sources = len(together.rows), {}
        for spec in segment.inputs:
            source = self._source(spec.name, together)
            if source is not None:
                sources[spec.name] = source
        launch, tensors = self._bound(segment, count, tuple(sources))
        for name, (values, rows) in sources.items():
            # "clip" spares numpy a buffer; the rows are all there
            np.take(values, rows, axis=0, out=tensors[name].array, mode="clip")
        middle = perf_counter_ns()
        launch()
        end = perf_counter_ns()
        for spec in segment.outputs:
            target = self._slots.tensors.get(spec.name)
            if target is None:
                self._written[spec.name] = together
            else:
                _array(target)[self._kept_rows(spec.name, together)] = tensors[spec.name].array
        times, images = self.times, len(together.active)
        times.engines_ns += end - middle
        times.copies_ns += middle - begin + perf_counter_ns() - end
        times.launches += 1
        times.launches_alone += images
        times.images[images] = times.images.get(images, 0) + 1
        for each in together.active:
            each.launches += 1

    def _source(self, name: str, together: _Together) -> tuple[np.ndarray, np.ndarray] | None:
        """Where the rows of an input lie, and which they are; None where it is read in place."""
        field_of = self._presets.fields.get(name)
        if field_of is not None:
            rows = [np.full(len(a.rows), a.way.fields[name][a.step]) for a in together.active]
            return _array(field_of), np.concatenate(rows)
        cached = self._before.get(name, name)
        if cached in self._slots.tensors:
            return (
                _array(self._slots.tensors[cached]),
                self._kept_rows(cached, together, before=cached != name),
            )
        written = self._written[name]
        if written is together or (written.leading and together.leading):
            return None
        whole = self._slots.boundary(self._specs[name], len(written.rows))
        return _array(whole), np.searchsorted(written.places, together.places)

    def _kept_rows(self, name: str, together: _Together, before: bool = False) -> np.ndarray:
        """Rows of a slots' tensor: of cached ones those of the buffer that is asked for.

        Two outputs are kept in turn. Before the second there is no earlier one: both are the last.
        """
        if self._slots.outputs == 1 or name not in self._slots.cached:
            return together.rows
        found = []
        for each in together.active:
            computed = each.computed[name]
            back = 2 if before and computed > 1 else 1
            found.append((computed - back) % 2 * self._slots.rows + each.rows)
        return np.concatenate(found)

    def _bound(
        self, segment: Segment, count: int, gathered: tuple[str, ...]
    ) -> tuple[Launch, dict[str, Tensor]]:
        """A segment bound for so many rows; boundary tensors in place, unless gathered."""
        key = (segment.name, count, gathered)
        if key not in self._launches:
            tensors = self._slots.gathered(segment, count)
            for spec in (*segment.inputs, *segment.outputs):
                kept = spec.name in self._slots.tensors or spec.name in gathered
                if not kept:
                    tensors[spec.name] = self._slots.boundary(spec, count)
            self._launches[key] = self._engines[segment.name].bind(tensors), tensors
        return self._launches[key]


def _together(active: Sequence[ActiveRequest], order: Sequence[ActiveRequest]) -> _Together:
    """Some requests of a tick's order, which they follow."""
    begins = np.cumsum([0, *(len(each.rows) for each in order)])
    spans = {
        id(each): np.arange(begin, begin + len(each.rows))
        for each, begin in zip(order, begins.tolist(), strict=False)
    }
    places = np.concatenate([spans[id(each)] for each in active])
    leading = places[-1] == len(places) - 1
    rows = np.concatenate([each.rows for each in active])
    return _Together(tuple(active), rows, places, bool(leading))


def _array(tensor: Tensor) -> np.ndarray:
    assert tensor.array is not None, "a batch lies on the host"
    return tensor.array
