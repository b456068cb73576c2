"""The session: open a bundle, denoise.

::

    session = Session.open("bundle", preset="dpm-20-d0.5")
    result = session.denoise(session.noise(seeds=[0, 1]), prompt_embeds, negative_prompt_embeds)
    result.latents                  # float32 [N, C, H, W]
    result.record.summary()         # what ran and how long

Opening binds everything; a step then only launches. Cache state belongs to one request and is
reset by construction: the first executed step recomputes every block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np

from blockcache.runtime.bundle import Bundle
from blockcache.runtime.devices.device import Guidance, StepFunction, modes_of
from blockcache.runtime.devices.device_view import DeviceView
from blockcache.runtime.devices.graphs import GraphPlayer, LoopGraphs
from blockcache.runtime.devices.interop import host_array, host_arrays
from blockcache.runtime.devices.tensor import Tensor
from blockcache.runtime.drift import DriftMonitor
from blockcache.runtime.engines.choice import make_backend
from blockcache.runtime.engines.engine import Backend, Launch
from blockcache.runtime.engines.loading import load_engines
from blockcache.runtime.errors import BundleFormatError, Cancelled, ConfigError, InputError
from blockcache.runtime.plan import LOOP_ROLES, Preset, Sizes
from blockcache.runtime.program import MemoryReport, Program
from blockcache.runtime.record import RunRecord
from blockcache.runtime.request import Request, check_finite_values
from blockcache.runtime.solver import SolverConfig, solver_tables

SHAPES = 4
"""How many shapes a session keeps memory for; the one unused for longest is let go."""


@dataclass(frozen=True)
class Progress:
    """What a callback sees after each step."""

    step: int  # that has just finished, 0..S-1
    steps: int  # S
    timestep: float  # the scheduler's number for this step
    latents: np.ndarray  # float32 [N, C, H, W]: a view, copy it to keep it


@dataclass(frozen=True)
class Denoised:
    """The result of one request."""

    latents: np.ndarray  # float32 [N, C, H, W]
    record: RunRecord
    device_latents: DeviceView | None = None
    """On a GPU the same, in place: valid until the session's next request of this shape."""


class Session:
    """A bundle bound to one preset, one engine library and, per shape, to memory.

    Thread-safe: calls of ``denoise`` on one session wait for each other. Sessions of one process
    share the engines of a bundle and have buffers of their own, for the last ``SHAPES`` shapes.
    """

    def __init__(
        self,
        bundle: Bundle,
        preset: Preset,
        backend: Backend,
        drift: DriftMonitor | None = None,
    ) -> None:
        if preset.alignment.outputs != bundle.model.outputs:
            raise BundleFormatError(
                f"Preset {preset.name!r} combines {preset.alignment.outputs} outputs of a block, "
                f"the bundle's segments {bundle.model.outputs}. Compile the preset again."
            )
        self.bundle = bundle
        self.preset = preset
        self.backend = backend
        self.drift = drift
        if drift is not None:
            drift.watch(bundle, preset)
        needed = [s for s in bundle.segments if s.role in (*LOOP_ROLES, "prompt")]
        self._engines = load_engines(backend, bundle, needed)
        self._tables = solver_tables(SolverConfig.from_json(preset.solver))
        self._programs: dict[tuple[int, ...], Program] = {}
        self._lock = backend.device.session_lock()
        self._running = False
        self._graphs = (
            None
            if backend.graphs is None
            else GraphPlayer(backend.device, backend.graphs, backend.settled)
        )

    @classmethod
    def open(
        cls,
        bundle: Bundle | str | Path,
        *,
        preset: str | None = None,
        backend: str | Backend = "auto",
        threads: int | None = None,
        stream: Any = None,
        graphs: str = "auto",
        verify: bool = True,
        drift: DriftMonitor | None = None,
    ) -> Session:
        """Open a bundle and load its engines.

        Args:
            bundle: A folder that ``blockcache compile`` wrote, or an opened Bundle.
            preset: One of the bundle's presets; default its first.
            backend: "auto", "trt", "ort", "ort-cuda", "empty", or a Backend.
            threads: CPU threads of the engine library; default one a physical core.
            stream: The caller's CUDA stream: a number or an object with ``__cuda_stream__``. It
                belongs to one thread at a time, as CUDA has it.
            graphs: With TensorRT: "auto" captures the loop in CUDA graphs and replays them, "off"
                launches one by one, "check" also compares addresses before each replay.
            verify: Check the sha256 of every file first.
            drift: Compare live traffic with the preset's profile; None costs nothing.

        Raises:
            BundleError: see ``Bundle.open`` and ``Bundle.preset``.
            MissingExtraError: the engine library is not installed.
            EngineError: the library refuses a segment.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify=verify)
        name = opened.preset_names[0] if preset is None and opened.preset_names else preset
        chosen = opened.preset(name or "")
        if isinstance(backend, str):
            backend = make_backend(
                backend,
                threads=threads,
                bundle=opened,
                stream=stream,
                graphs=graphs,
                verify=verify,
            )
        return cls(opened, chosen, backend, drift)

    @property
    def steps(self) -> int:
        """S of the preset."""
        return self.preset.schedule.steps

    def noise(
        self, seeds: Sequence[int], height: int | None = None, width: int | None = None
    ) -> np.ndarray:
        """Standard normal noise float32 [N, C, H, W], one generator a seed.

        An image is the same alone and in a batch. Height and width are latent sizes.
        """
        sizes = self.bundle.model.sizes
        shape = (self.bundle.model.channels, height or sizes.height, width or sizes.width)
        images = [
            np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, np.float32)
            for seed in seeds
        ]
        return np.stack(images)

    def memory(self, images: int = 1, guided: bool = True) -> MemoryReport:
        """Bytes held for the model's default sizes and ``images`` images."""
        sizes = self.bundle.model.sizes.for_images(images, guided=guided)
        with self._lock:
            return self._program(sizes, images).memory

    def launches(self, images: int = 1, guided: bool = True) -> dict[str, Launch]:
        """Every segment of a request by name, bound, to be timed one by one."""
        sizes = self.bundle.model.sizes.for_images(images, guided=guided)
        with self._lock:
            program = self._program(sizes, images)
            step = program.run_from(0).launches[0]
        bound = {program.loop[index].name: launch for index, launch in step}
        prompts = [s.name for s in self.bundle.segments if s.role == "prompt"]
        return bound | dict(zip(prompts, program.prompt, strict=True))

    def denoise(
        self,
        noise: np.ndarray,
        prompt_embeds: np.ndarray,
        negative_prompt_embeds: np.ndarray | None = None,
        *,
        conditions: Mapping[str, np.ndarray] | None = None,
        negative_conditions: Mapping[str, np.ndarray] | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        image_latents: np.ndarray | None = None,
        start_step: int = 0,
        callback: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        check_finite: bool = False,
    ) -> Denoised:
        """Denoise N images by the preset's schedule.

        Tensors are numpy arrays, or those of torch, CuPy, JAX, on the host or the GPU, also in
        16 bits; a GPU tensor is read after what its library has put on its current stream.

        Args:
            noise: float32 [N, C, H, W], standard normal; ``self.noise(seeds)`` makes it.
            prompt_embeds: float32 [N or 1, tokens, D].
            negative_prompt_embeds: float32 [N or 1, tokens, D], the unconditional prompt; needed
                for guidance.
            conditions: further inputs by name (SDXL: text_embeds, time_ids), [N or 1, ...].
            negative_conditions: the same for the unconditional half; ``time_ids`` and
                ``class_labels`` default to the positive ones.
            guidance_scale: classifier-free guidance; default the preset's. 1 turns it off.
            guidance_rescale: 0 (off) to 1, as in diffusers (arXiv 2305.08891, section 3.4).
            image_latents: float32 [N, C, H, W] to start from, noised to ``start_step``'s level.
            start_step: the first step to execute; it recomputes every block.
            callback: called after each step with a Progress.
            cancelled: asked before each step; True raises Cancelled.
            check_finite: raise InputError for NaN or infinity in inputs or result.

        Raises:
            InputError: a tensor has the wrong shape, dtype or values.
            Cancelled: ``cancelled()`` was true.
            EngineError: the engine library failed.
        """
        scale = self.preset.guidance_scale if guidance_scale is None else float(guidance_scale)
        guidance = Guidance(scale, float(guidance_rescale)) if scale != 1.0 else None
        noise, guided = host_array(noise), guidance is not None
        request = Request(self.bundle, noise, guided, start_step, self.steps, check_finite)
        positive = {"encoder_hidden_states": prompt_embeds, **(conditions or {})}
        negative = dict(negative_conditions or {})
        if negative_prompt_embeds is not None:
            negative["encoder_hidden_states"] = negative_prompt_embeds
        inputs = request.conditions(host_arrays(positive), host_arrays(negative))
        start = self._start(request, host_array(image_latents))
        with self._exclusive():
            program = self._program(request.sizes, request.images)
            for name, values in inputs.items():
                self.backend.device.upload(program.tensors[name], values)
            result = self._run(program, request, start, guidance, callback, cancelled)
        if self.drift is not None and result.record.change is not None:
            self.drift.add(result.record.change)
        return result

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One request at a time; a callback cannot start another on the same buffers."""
        with self._lock:
            if self._running:
                raise ConfigError(
                    "denoise was called from a callback of the same session, whose buffers are in "
                    "use. Open a second session; engines are shared."
                )
            self._running = True
            try:
                yield
            finally:
                self._running = False

    # -- the loop ------------------------------------------------------------------------------

    def _run(
        self,
        program: Program,
        request: Request,
        start: np.ndarray,
        guidance: Guidance | None,
        callback: Callable[[Progress], None] | None,
        cancelled: Callable[[], bool] | None,
    ) -> Denoised:
        """Run the prompt segment once, then for each step, each segment: run it or reuse it."""
        run = program.run_from(request.first)
        record = RunRecord(program.loop, range(request.first, self.steps))
        latents = program.tensors["latents"]
        solver = self._solver(program, request, guidance)
        if run.meter is not None:
            solver = run.meter.after(solver)
        begin = perf_counter_ns()
        for launch in program.prompt:
            launch()
        record.prompt_ns = perf_counter_ns() - begin
        self._set_latents(program, request, start)
        graphs = self._loop_graphs(program, request, guidance)
        begin = perf_counter_ns()

        def do_step(step: int) -> None:
            self._step(run.load_row, run.launches[step], solver, step, record)

        if graphs is not None and callback is None and cancelled is None:
            graphs.play_loop(record.steps, do_step)
        else:
            for step in record.steps:
                if cancelled is not None and cancelled():
                    raise Cancelled(f"Cancelled before step {step} of {self.steps}.")
                (graphs.play_step if graphs is not None else _call)(step, do_step)
                if callback is not None:
                    self._report(callback, step, latents)
        result = self.backend.device.download(latents)
        record.total_ns = perf_counter_ns() - begin
        if run.meter is not None:
            record.change = run.meter.read()
        if graphs is not None:
            record.launched(run.launches)
        if request.check_finite:
            check_finite_values("the denoised latents", result)
        return Denoised(result, record, self.backend.device.view(latents))

    @staticmethod
    def _step(
        load_row: StepFunction,
        launches: Sequence[tuple[int, Callable[[], None]]],
        solver: StepFunction,
        step: int,
        record: RunRecord,
    ) -> None:
        """One denoising step: a reused block is simply not among the launches."""
        load_row(step)
        ran, durations = record.ran[step], record.segment_ns[step]
        for index, launch in launches:
            begin = perf_counter_ns()
            launch()
            durations[index] = perf_counter_ns() - begin
            ran[index] = True
        solver(step)

    def _report(self, callback: Callable[[Progress], None], step: int, latents: Tensor) -> None:
        view = latents.array if latents.array is not None else self.backend.device.download(latents)
        callback(Progress(step, self.steps, float(self._tables.timesteps[step]), view))

    # -- preparation ---------------------------------------------------------------------------

    def _loop_graphs(
        self, program: Program, request: Request, guidance: Guidance | None
    ) -> LoopGraphs | None:
        """CUDA graphs of this request's shape and first step; None where launches stay single."""
        if self._graphs is None:
            return None
        shape = (*astuple(request.sizes), request.images, request.first, *modes_of(guidance))
        return LoopGraphs(self._graphs, shape, program.tensors)

    def _program(self, sizes: Sizes, images: int) -> Program:
        """The program of these sizes; bound on first use, kept while among the last ``SHAPES``."""
        key = (*astuple(sizes), images)
        program = self._programs.pop(key, None)
        while program is None and len(self._programs) >= SHAPES:
            oldest = next(iter(self._programs))
            if self._graphs is not None:
                self._graphs.forget(oldest)
            del self._programs[oldest]  # before the new one takes its memory
        self._programs[key] = program or Program(
            self.bundle.model,
            self.bundle.segments,
            self._engines,
            self.preset,
            self.backend.device,
            sizes,
            images,
            measured=self.drift is not None,
        )
        return self._programs[key]

    def _start(self, request: Request, image_latents: np.ndarray | None) -> np.ndarray:
        """The sample that the first executed step sees, in the solver's own space."""
        if image_latents is None:
            if request.first:
                raise InputError(
                    f"start_step={request.first} continues from an image: expected image_latents, "
                    f"got none. Give them, or start at step 0."
                )
            scaled: np.ndarray = request.noise * np.float32(self._tables.initial_scale)
            return scaled
        request.check("image_latents", image_latents, request.noise.shape)
        signal, noise = self._tables.noising[request.first]
        start: np.ndarray = signal * image_latents + noise * request.noise
        return start

    def _set_latents(self, program: Program, request: Request, start: np.ndarray) -> None:
        device = self.backend.device
        device.upload(program.tensors["latents"], start)
        device.upload(program.tensors["history"], np.zeros_like(start))
        halves = [start * self._tables.input_scale[request.first]] * (2 if request.guided else 1)
        device.upload(program.tensors["sample"], np.concatenate(halves))

    def _solver(
        self, program: Program, request: Request, guidance: Guidance | None
    ) -> StepFunction:
        coefficients = self._tables.coefficients.copy()
        coefficients[request.first] = self._tables.first[request.first]
        tensors = program.tensors
        return self.backend.device.solver(
            coefficients,
            guidance,
            tensors["latents"],
            tensors["history"],
            tensors["model_output"],
            tensors["sample"],
        )


def _call(step: int, do_step: StepFunction) -> None:
    do_step(step)
