"""The denoising loop: evaluate the U-Net, do the solver's step, and report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np

from blockcache.runtime.devices.device import Device, StepFunction
from blockcache.runtime.devices.device_view import DeviceView
from blockcache.runtime.devices.graphs import LoopGraphs
from blockcache.runtime.devices.tensor import Tensor
from blockcache.runtime.errors import Cancelled, InputError
from blockcache.runtime.evaluation import evaluate, take_conditions
from blockcache.runtime.program import Program
from blockcache.runtime.record import RunRecord
from blockcache.runtime.request import Request, check_finite_values
from blockcache.runtime.solvers.solver import SolverTables


class Progress:
    """What a callback gets after each step, to look at and to edit.

    The next step starts from what the callback leaves, as with diffusers'
    ``callback_on_step_end``. ``progress.latents = values`` works everywhere. On the CPU
    ``latents`` may also be changed in place; on a GPU it is a read-only copy, and what may be
    changed in place is ``device_latents``, by ``torch.as_tensor`` or ``cupy.asarray``.
    """

    def __init__(
        self, step: int, steps: int, timestep: float, tensor: Tensor, device: Device
    ) -> None:
        self.step = step  # that has just finished, 0..S-1
        self.steps = steps  # S
        self.timestep = timestep  # the scheduler's number for this step
        self._tensor, self._device = tensor, device

    @property
    def latents(self) -> np.ndarray:
        """float32 [N, C, H, W]; copy it to keep it."""
        if self._tensor.array is not None:
            return self._tensor.array
        copy = self._device.download(self._tensor)
        copy.setflags(write=False)
        return copy

    @latents.setter
    def latents(self, values: np.ndarray) -> None:
        """Replace them; the shape stays."""
        if np.shape(values) != self._tensor.shape:
            raise InputError(
                f"progress.latents: expected shape {list(self._tensor.shape)}, got "
                f"{list(np.shape(values))}."
            )
        self._device.upload(self._tensor, np.asarray(values, np.float32))

    @property
    def device_latents(self) -> DeviceView | None:
        """On a GPU the latents where they lie."""
        return self._device.view(self._tensor)


@dataclass(frozen=True)
class Denoised:
    """The result of one request."""

    latents: np.ndarray  # float32 [N, C, H, W]
    record: RunRecord
    device_latents: DeviceView | None = None
    """On a GPU the same, in place: valid until the session's next request of this shape."""


def denoise(
    device: Device,
    program: Program,
    request: Request,
    tables: SolverTables,
    graphs: LoopGraphs | None,
    callback: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Denoised:
    """Run the prompt segment once, then every step of the request.

    Args:
        device: where the program's tensors lie.
        program: bound to the request's sizes.
        request: what to draw.
        tables: of the preset's solver.
        graphs: of this program and request; None launches one by one.
        callback: called after each step.
        cancelled: asked before each step.

    Raises:
        Cancelled: ``cancelled()`` was true.
        EngineError: the engine library failed.
        InputError: the result is not finite, where the request wants that checked.
    """
    run = program.run_from(request.first)
    record = RunRecord(program.loop, request.steps)
    latents = program.tensors["latents"]
    solver = _solver(device, program, request, tables)
    if run.meter is not None:
        solver = run.meter.after(solver)
    if callback is not None:
        report = _reporter(device, program, request, tables, callback)
    take_conditions(device, program, request.conditions, record)
    _set_latents(device, program, request, tables)
    begin = perf_counter_ns()

    def do_step(step: int) -> None:
        evaluate(run, step, record)
        solver(step)

    if graphs is not None and callback is None and cancelled is None:
        graphs.play_loop(record.steps, do_step)
    else:
        for step in record.steps:
            if cancelled is not None and cancelled():
                raise Cancelled(f"Cancelled before step {step} of {request.steps.stop}.")
            (graphs.play_step if graphs is not None else _call)(step, do_step)
            if callback is not None:
                report(step)
    result = device.download(latents)
    record.total_ns = perf_counter_ns() - begin
    if run.meter is not None:
        record.change = run.meter.read()
        record.change[request.steps.stop :] = np.nan  # of steps that an earlier run took
    if graphs is not None:
        record.launched(run.launches)
    if request.check_finite:
        check_finite_values("the denoised latents", result)
    return Denoised(result, record, device.view(latents))


def _call(step: int, do_step: StepFunction) -> None:
    do_step(step)


def _reporter(
    device: Device,
    program: Program,
    request: Request,
    tables: SolverTables,
    callback: Callable[[Progress], None],
) -> StepFunction:
    """Calls back after a step, then makes the next model input from what the callback left."""
    latents, steps = program.tensors["latents"], request.steps.stop
    renew_input = device.model_input(tables.coefficients[:, 6], latents, program.tensors["sample"])

    def report(step: int) -> None:
        callback(Progress(step, steps, float(tables.timesteps[step]), latents, device))
        renew_input(step)

    return report


def _set_latents(device: Device, program: Program, request: Request, tables: SolverTables) -> None:
    """Put the sample and the model input of the first step in place."""
    start = start_latents(request, tables)
    device.upload(program.tensors["latents"], start)
    rows = request.sizes.batch // request.images
    inputs = [start * tables.input_scale[request.first]] * rows
    device.upload(program.tensors["sample"], np.concatenate(inputs))


def start_latents(request: Request, tables: SolverTables) -> np.ndarray:
    """The sample that the first executed step sees, in the solver's own space."""
    if request.continues:
        return request.noise
    if request.image_latents is None:
        scaled: np.ndarray = request.noise * np.float32(tables.initial_scale)
        return scaled
    signal, noise = tables.noising[request.first]
    start: np.ndarray = signal * request.image_latents + noise * request.noise
    return start


def _solver(
    device: Device, program: Program, request: Request, tables: SolverTables
) -> StepFunction:
    """The solver's step; the first executed one has no step before it to learn from."""
    tensors = program.tensors
    return device.solver(
        tables.rows_from(request.first),
        request.guidance,
        request.seeds,
        tensors["latents"],
        tensors["past_x0"],
        tensors["model_output"],
        tensors["sample"],
    )
