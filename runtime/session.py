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

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns

import numpy as np

from blockcache.runtime.bundle import Bundle
from blockcache.runtime.device import StepFunction, Tensor
from blockcache.runtime.engine import Backend, load_shared, make_backend
from blockcache.runtime.errors import BundleFormatError, Cancelled, InputError
from blockcache.runtime.plan import LOOP_ROLES, Preset, Sizes, TensorSpec
from blockcache.runtime.program import MemoryReport, Program
from blockcache.runtime.record import RunRecord
from blockcache.runtime.solver import SolverConfig, solver_tables

SHARED_CONDITIONS = ("time_ids", "class_labels")
"""Conditions whose negative (unconditional) value is the positive one unless given."""


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


class Session:
    """A bundle bound to one preset, one engine library and, per shape, to memory.

    Thread-safe: calls of ``denoise`` on one session wait for each other. Sessions of one process
    share the engines of a bundle and have buffers of their own.
    """

    def __init__(self, bundle: Bundle, preset: Preset, backend: Backend) -> None:
        if preset.alignment.outputs != bundle.model.outputs:
            raise BundleFormatError(
                f"Preset {preset.name!r} combines {preset.alignment.outputs} outputs of a block, "
                f"the bundle's segments {bundle.model.outputs}. Compile the preset again."
            )
        self.bundle = bundle
        self.preset = preset
        self.backend = backend
        needed = [s for s in bundle.segments if s.role in (*LOOP_ROLES, "prompt")]
        self._engines = {s.name: load_shared(backend, bundle, s) for s in needed}
        self._tables = solver_tables(SolverConfig.from_json(preset.solver))
        self._programs: dict[tuple[int, ...], Program] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        bundle: Bundle | str | Path,
        *,
        preset: str | None = None,
        backend: str | Backend = "auto",
        threads: int | None = None,
        verify: bool = True,
    ) -> Session:
        """Open a bundle and load its engines.

        Args:
            bundle: A folder that ``blockcache compile`` wrote, or an opened Bundle.
            preset: One of the bundle's presets; default its first.
            backend: "auto", "ort", "empty", or a Backend.
            threads: CPU threads of the engine library; default one a physical core.
            verify: Check the sha256 of every file first.

        Raises:
            BundleError: see ``Bundle.open`` and ``Bundle.preset``.
            MissingExtraError: the engine library is not installed.
            EngineError: the library refuses a segment.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify=verify)
        name = opened.preset_names[0] if preset is None and opened.preset_names else preset
        chosen = opened.preset(name or "")
        made = make_backend(backend, threads=threads) if isinstance(backend, str) else backend
        return cls(opened, chosen, made)

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
        shape = (self.bundle.model.channels, height or sizes["height"], width or sizes["width"])
        images = [
            np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, np.float32)
            for seed in seeds
        ]
        return np.stack(images)

    def memory(self, images: int = 1, guided: bool = True) -> MemoryReport:
        """Bytes held for the model's default sizes and ``images`` images."""
        sizes = dict(self.bundle.model.sizes, batch=images * (2 if guided else 1))
        with self._lock:
            return self._program(sizes, images).memory

    def denoise(
        self,
        noise: np.ndarray,
        prompt_embeds: np.ndarray,
        negative_prompt_embeds: np.ndarray | None = None,
        *,
        conditions: Mapping[str, np.ndarray] | None = None,
        negative_conditions: Mapping[str, np.ndarray] | None = None,
        guidance_scale: float | None = None,
        image_latents: np.ndarray | None = None,
        start_step: int = 0,
        callback: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        check_finite: bool = False,
    ) -> Denoised:
        """Denoise N images by the preset's schedule.

        Args:
            noise: float32 [N, C, H, W], standard normal; ``self.noise(seeds)`` makes it.
            prompt_embeds: float32 [N or 1, tokens, D].
            negative_prompt_embeds: float32 [N or 1, tokens, D], the unconditional prompt; needed
                for guidance.
            conditions: further inputs by name (SDXL: text_embeds, time_ids), [N or 1, ...].
            negative_conditions: the same for the unconditional half; ``time_ids`` and
                ``class_labels`` default to the positive ones.
            guidance_scale: classifier-free guidance; default the preset's. 1 turns it off.
            image_latents: float32 [N, C, H, W] to start from (image-to-image), noised to the level
                of ``start_step``.
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
        guided = scale != 1.0
        request = _Request(self.bundle, noise, guided, start_step, self.steps, check_finite)
        positive = {"encoder_hidden_states": prompt_embeds, **(conditions or {})}
        negative = dict(negative_conditions or {})
        if negative_prompt_embeds is not None:
            negative["encoder_hidden_states"] = negative_prompt_embeds
        inputs = request.conditions(positive, negative)
        start = self._start(request, image_latents)
        with self._lock:
            program = self._program(request.sizes, request.images)
            for name, values in inputs.items():
                self.backend.device.upload(program.tensors[name], values)
            return self._run(program, request, start, scale, callback, cancelled)

    # -- the loop ------------------------------------------------------------------------------

    def _run(
        self,
        program: Program,
        request: _Request,
        start: np.ndarray,
        guidance_scale: float,
        callback: Callable[[Progress], None] | None,
        cancelled: Callable[[], bool] | None,
    ) -> Denoised:
        """Run the prompt segment once, then for each step, each segment: run it or reuse it."""
        run = program.run_from(request.first)
        record = RunRecord(program.loop, range(request.first, self.steps))
        latents = program.tensors["latents"]
        solver = self._solver(program, request, guidance_scale)
        begin = perf_counter_ns()
        for launch in program.prompt:
            launch()
        record.prompt_ns = perf_counter_ns() - begin
        self._set_latents(program, request, start)
        begin = perf_counter_ns()
        for step in record.steps:
            if cancelled is not None and cancelled():
                raise Cancelled(f"Cancelled before step {step} of {self.steps}.")
            self._step(run.load_row, run.launches[step], solver, step, record)
            if callback is not None:
                self._report(callback, step, latents)
        result = self.backend.device.download(latents)
        record.total_ns = perf_counter_ns() - begin
        if request.check_finite:
            _check_finite("the denoised latents", result)
        return Denoised(result, record)

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

    def _program(self, sizes: Sizes, images: int) -> Program:
        """The program of these sizes; bound on first use, kept for the session's life."""
        key = (*sizes.values(), images)
        if key not in self._programs:
            self._programs[key] = Program(
                self.bundle.model,
                self.bundle.segments,
                self._engines,
                self.preset,
                self.backend.device,
                sizes,
                images,
            )
        return self._programs[key]

    def _start(self, request: _Request, image_latents: np.ndarray | None) -> np.ndarray:
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

    def _set_latents(self, program: Program, request: _Request, start: np.ndarray) -> None:
        device = self.backend.device
        device.upload(program.tensors["latents"], start)
        device.upload(program.tensors["history"], np.zeros_like(start))
        halves = [start * self._tables.input_scale[request.first]] * (2 if request.guided else 1)
        device.upload(program.tensors["sample"], np.concatenate(halves))

    def _solver(self, program: Program, request: _Request, guidance_scale: float) -> StepFunction:
        coefficients = self._tables.coefficients.copy()
        coefficients[request.first] = self._tables.first[request.first]
        tensors = program.tensors
        return self.backend.device.solver(
            coefficients,
            guidance_scale if request.guided else None,
            tensors["latents"],
            tensors["history"],
            tensors["model_output"],
            tensors["sample"],
        )


class _Request:
    """The checked inputs of one call of ``denoise``."""

    def __init__(
        self,
        bundle: Bundle,
        noise: np.ndarray,
        guided: bool,
        first: int,
        steps: int,
        check_finite: bool,
    ) -> None:
        model = bundle.model
        self.check_finite = check_finite
        self._specs = model.conditions
        shape = np.shape(noise)
        if len(shape) != 4 or shape[1] != model.channels or shape[0] < 1:
            raise InputError(
                f"noise: expected [N, {model.channels}, height, width], got {list(shape)}. "
                f"session.noise(seeds) makes it."
            )
        if shape[2] % model.downsampling or shape[3] % model.downsampling:
            raise InputError(
                f"noise: expected a latent height and width divisible by {model.downsampling}, "
                f"got {shape[2]} x {shape[3]}. Choose the next multiples."
            )
        if not 0 <= first < steps:
            raise InputError(f"start_step: expected 0 to {steps - 1}, got {first}.")
        self.images, self.guided, self.first = shape[0], guided, first
        batch = self.images * (2 if guided else 1)
        self.sizes = dict(model.sizes, batch=batch, height=shape[2], width=shape[3])
        self.noise = self.check("noise", noise, shape)

    def conditions(
        self, positive: Mapping[str, np.ndarray], negative: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Engine inputs [batch, ...]: with guidance the unconditional half comes first."""
        known = [spec.name for spec in self._specs]
        for name in (*positive, *negative):
            if name not in known:
                raise InputError(
                    f"{name}: this model takes the conditions {known} and no other. ControlNet "
                    f"residuals and adapters are not supported."
                )
        tokens = np.shape(positive["encoder_hidden_states"])
        if len(tokens) == 3:
            self.sizes["tokens"] = tokens[1]
        inputs = {}
        for spec in self._specs:
            halves = [self._condition(spec, positive, "")]
            if self.guided:
                defaults = positive if spec.name in SHARED_CONDITIONS else {}
                halves.insert(0, self._condition(spec, {**defaults, **negative}, "negative "))
            inputs[spec.name] = np.concatenate(halves)
        return inputs

    def _condition(
        self, spec: TensorSpec, given: Mapping[str, np.ndarray], side: str
    ) -> np.ndarray:
        if spec.name not in given:
            raise InputError(
                f"{side}{spec.name}: expected a tensor, got none. Give it, or set "
                f"guidance_scale=1 to run without guidance."
                if side
                else f"{spec.name}: this model needs it in conditions={{...}}, got none."
            )
        shape = spec.shape({**self.sizes, "batch": self.images})
        values = given[spec.name]
        if np.shape(values) == (1, *shape[1:]):
            values = np.broadcast_to(values, shape)
        return self.check(side + spec.name, values, shape, spec.dtype)

    def check(
        self, name: str, values: np.ndarray, shape: Sequence[int], dtype: str = "float32"
    ) -> np.ndarray:
        """The values, or InputError where shape, dtype or (if asked for) contents are wrong."""
        wanted = np.dtype(np.int64 if dtype == "int64" else np.float32)
        if not isinstance(values, np.ndarray) or values.dtype != wanted:
            got = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
            raise InputError(
                f"{name}: expected a numpy array of {wanted}, got {got}. "
                f"Convert it with .astype(np.{wanted})."
            )
        if values.shape != tuple(shape):
            raise InputError(f"{name}: expected shape {list(shape)}, got {list(values.shape)}.")
        if self.check_finite:
            _check_finite(name, values)
        return values


def _check_finite(name: str, values: np.ndarray) -> None:
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise InputError(
            f"{name}: expected finite numbers, got NaN or infinity in {bad} of {values.size}."
        )
