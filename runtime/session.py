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
import functools
import os
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from blockcache.runtime.arguments import finite_number, whole_number
from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.control import control_window
from blockcache.runtime.devices.device import modes_of
from blockcache.runtime.devices.graphs import GraphPlayer, LoopGraphs
from blockcache.runtime.devices.interop import where_it_lies
from blockcache.runtime.drift import DriftMonitor
from blockcache.runtime.engines.choice import make_backend, refuse_options, require_members
from blockcache.runtime.engines.engine import Backend, Engine, Launch
from blockcache.runtime.engines.loading import load_engines
from blockcache.runtime.errors import BundleFormatError, ConfigError, InputError
from blockcache.runtime.evaluation import take_conditions
from blockcache.runtime.fork import keep_in_children
from blockcache.runtime.loop import Denoised, Progress, denoise
from blockcache.runtime.open_request import OpenRequest
from blockcache.runtime.plan import CONTROL_SCALE, LOOP_ROLES, Preset, Segment, Sizes
from blockcache.runtime.program import MemoryReport, Program
from blockcache.runtime.request import (
    CLASSES,
    PROMPT,
    Request,
    checked_conditions,
    checked_request,
    guidance_of,
    starting_noise,
)
from blockcache.runtime.solvers.recorded import (
    DiffusersScheduler,
    recorded_solver,
    timesteps_of,
)
from blockcache.runtime.solvers.solver import SolverTables, solver_tables
from blockcache.runtime.weights import BASE, WeightSet, preset_like, to_keep

SHAPES = 4
"""How many shapes a session keeps memory for; the one unused for longest is let go."""


class Session:
    """A bundle bound to one preset, one engine library and, per shape, to memory.

    Thread-safe: calls of ``denoise`` on one session wait for each other. Sessions of one process
    share the engines of a bundle and have buffers of their own, for the last ``SHAPES`` shapes.

    A session belongs to the process that opened it. Under a server that forks its workers, open one
    in each worker: with gunicorn in the hook ``post_fork`` (or without ``--preload``), with uWSGI
    in ``@postfork``, with ``multiprocessing`` in the worker's function. In a forked child an
    inherited session refuses to work; it does not keep the child from ending.
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
        self.backend = backend
        self.drift = drift
        if drift is not None:
            drift.watch(bundle, preset)
        base = WeightSet(BASE, bundle, preset, load_engines(backend, bundle, _needed(bundle)))
        self._weights, self._sets = base, {BASE: base}
        self._base = replace(base, engines={})  # to load it again
        self._solver = recorded_solver(preset.solver)
        self._timesteps = timesteps_of(self._solver)
        self._programs: dict[tuple[Sizes, int], Program] = {}
        self._lock = backend.device.session_lock()
        self._running = self._closed = False
        self._open: Callable[[], OpenRequest | None] = lambda: None  # a weak reference
        self._process = os.getpid()
        keep_in_children(self)
        self._graphs = self._graph_player()

    @classmethod
    def open(
        cls,
        bundle: Bundle | str | Path,
        *,
        preset: str | None = None,
        backend: str | Backend = "auto",
        threads: int | None = None,
        stream: Any = None,
        device: int | None = None,
        graphs: str | None = None,
        verify: bool = True,
        drift: DriftMonitor | None = None,
    ) -> Session:
        """Open a bundle and load its engines.

        Args:
            bundle: A folder that ``blockcache compile`` wrote, or an opened Bundle.
            preset: One of the bundle's presets; default the recommended one.
            backend: "auto", "trt", "ort", "ort-cuda", "empty", or a Backend.
            threads: CPU threads of ONNX Runtime; default one a physical core.
            stream: The caller's CUDA stream: a number or an object with ``__cuda_stream__``. It
                belongs to one thread at a time, as CUDA has it.
            device: Index of the CUDA device; default the stream's, else the current one.
            graphs: With TensorRT: "auto" (the default) captures the loop in CUDA graphs and replays
                them, "off" launches one by one, "check" also compares addresses before each replay.
            verify: Check the sha256 of every file first.
            drift: Compare live traffic with the preset's profile; None costs nothing.

        Raises:
            ConfigError: an option that the engine library would ignore.
            BundleError: see ``Bundle.open`` and ``Bundle.preset``.
            MissingExtraError: the engine library is not installed.
            EngineError: the library refuses a segment.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify=verify)
        chosen = opened.preset(preset)
        if not isinstance(backend, str):
            options = {"threads": threads, "stream": stream, "device": device, "graphs": graphs}
            refuse_options(type(backend).__name__, **options)
            require_members(backend)
        else:
            backend = make_backend(
                backend,
                threads=threads,
                bundle=opened,
                stream=stream,
                device=device,
                graphs=graphs,
                verify=verify,
            )
        return cls(opened, chosen, backend, drift)

    @property
    def bundle(self) -> Bundle:
        """The bundle whose weights requests run on."""
        return self._weights.bundle

    @property
    def preset(self) -> Preset:
        """The preset, with that bundle's time tables."""
        return self._weights.preset

    @property
    def _engines(self) -> Mapping[str, Engine]:
        return self._weights.engines

    @property
    def steps(self) -> int:
        """S of the preset."""
        return self.preset.schedule.steps

    @property
    def timesteps(self) -> np.ndarray:
        """What the U-Net is conditioned on at each step: float32 [S], as diffusers has them."""
        return np.array(self._timesteps)

    @property
    def sigmas(self) -> np.ndarray:
        """Noise levels sigma / alpha of the steps: float32 [S], without the end of the last.

        Raises:
            ConfigError: the preset runs a scheduler of diffusers, which has its own.
        """
        signal, noise = self._tables.noising.T
        return np.asarray(noise / signal)

    def step_at(self, share: float) -> int:
        """The step before which ``share`` of the noise schedule is behind.

        That is the ``end_step`` of diffusers' ``denoising_end``, and the ``start_step`` of
        ``denoising_start``.

        Raises:
            InputError: not above 0 and below 1, or no step lies on either side of it.
        """
        number = finite_number("denoising_end and denoising_start", share)
        solver = self._solver
        if isinstance(solver, DiffusersScheduler):
            raise ConfigError(f"Preset {self.preset.name!r} runs a scheduler of diffusers.")
        training = solver.noise.train_timesteps
        step = int((self._timesteps >= round(training * (1 - number))).sum())
        if not 0 < number < 1 or not 0 < step < self.steps:
            raise InputError(
                f"denoising_end and denoising_start: expected a share of the noise schedule, "
                f"0 to 1, with a step of the preset's {self.steps} on either side, got {share}."
            )
        return step

    def check_open(self) -> None:
        """Raise ConfigError where the session is closed, or was opened before a fork."""
        with self._held():
            pass

    @functools.cached_property
    def _tables(self) -> SolverTables:
        if isinstance(self._solver, DiffusersScheduler):
            raise ConfigError(
                f"Preset {self.preset.name!r} runs {self._solver.scheduler} of diffusers, which is "
                f"not in the runtime: attach the bundle to a pipeline (blockcache.diffusers), or "
                f"drive the scheduler yourself with begin, predict and end."
            )
        return solver_tables(self._solver)

    @property
    def unet_config(self) -> dict[str, object]:
        """The U-Net's config, as diffusers names it."""
        return dict(self.bundle.unet_config)

    def noise(
        self, seeds: Sequence[int], height: int | None = None, width: int | None = None
    ) -> np.ndarray:
        """Standard normal noise float32 [N, C, H, W], one generator a seed.

        An image is the same alone and in a batch. Height and width are latent sizes.

        Raises:
            InputError: no seeds, or a number that is not whole or too small.
        """
        return starting_noise(self.bundle.model, seeds, height, width)

    def control_scale(
        self, scale: float = 1.0, start: float = 0.0, end: float = 1.0, *, start_step: int = 0
    ) -> np.ndarray:
        """The condition ``control_scale`` of a ControlNet, float32 [1, 3]; see ``control_window``.

        Args:
            scale: diffusers' ``controlnet_conditioning_scale``; 0 is no control at all.
            start: ``control_guidance_start``, the share of the steps before the first it acts at.
            end: ``control_guidance_end``, the share of the steps up to the last it acts at.
            start_step: of the request; shares are of the steps that it executes, as in diffusers.

        Raises:
            InputError: numbers out of range.
        """
        return control_window(self._timesteps, scale, start, end, start_step)

    def memory(self, images: int = 1, guided: bool = True) -> MemoryReport:
        """Bytes held for the model's default sizes and ``images`` images."""
        sizes = self.bundle.model.sizes.for_images(images, guided=guided)
        with self._held():
            return self._program(sizes, images).memory

    def launches(self, images: int = 1, guided: bool = True) -> dict[str, Launch]:
        """Every segment of a request by name, bound, to be timed one by one."""
        sizes = self.bundle.model.sizes.for_images(images, guided=guided)
        with self._held():
            program = self._program(sizes, images)
            step = program.run_from(0).launches[0]
        bound = {program.loop[index].name: launch for index, launch in step}
        prompts = [s.name for s in self.bundle.segments if s.role == "prompt"]
        return bound | dict(zip(prompts, program.prompt, strict=True))

    def denoise(
        self,
        noise: np.ndarray | None,
        prompt_embeds: np.ndarray,
        negative_prompt_embeds: np.ndarray | None = None,
        *,
        conditions: Mapping[str, np.ndarray] | None = None,
        negative_conditions: Mapping[str, np.ndarray] | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        image_guidance_scale: float = 1.0,
        seeds: Sequence[int] | None = None,
        image_latents: np.ndarray | None = None,
        latents: np.ndarray | None = None,
        start_step: int = 0,
        end_step: int | None = None,
        callback: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        check_finite: bool = False,
    ) -> Denoised:
        """Denoise N images by the preset's schedule.

        Tensors are numpy arrays, or those of torch, CuPy, JAX, on the host or the GPU, also in
        16 bits; a GPU tensor is read after what its library has put on its current stream.
        Conditions on the session's GPU in the bundle's precision do not pass through the host.

        Args:
            noise: float32 [N, C, H, W], standard normal; ``self.noise(seeds)`` makes it. None
                beside ``latents``.
            prompt_embeds: float32 [N or 1, tokens, D].
            negative_prompt_embeds: float32 [N or 1, tokens, D], the unconditional prompt; needed
                for guidance.
            conditions: further inputs by name (SDXL: text_embeds, time_ids), [N or 1, ...].
            negative_conditions: the same for the unconditional half; ``time_ids`` and
                ``class_labels`` default to the positive ones.
            guidance_scale: classifier-free guidance; default the preset's. 1 or less turns it off,
                as in diffusers.
            guidance_rescale: 0 (off) to 1, as in diffusers (arXiv 2305.08891, section 3.4).
            image_guidance_scale: InstructPix2Pix: how far to follow ``image_latents``; 1 (off) or
                more, as in diffusers. It runs three samples an image instead of two.
            seeds: N whole numbers, one an image; needed by presets whose solver adds noise at every
                step (euler-a, dpm-sde, lcm), not read by others. With the same seed an image gets
                the same noise, alone and in a batch.
            image_latents: float32 [N, C, H, W] to start from, noised to ``start_step``'s level.
            latents: float32 [N, C, H, W] that a run with this solver left, whose ``end_step`` is
                this one's ``start_step``; taken as they are. SDXL's refiner goes on like this.
            start_step: the first step to execute; it recomputes every block.
            end_step: the first step that is not executed, so that the latents stay noisy; default
                S. ``step_at`` finds it.
            callback: called after each step with a Progress; it may edit the latents in place.
            cancelled: asked before each step; True raises Cancelled.
            check_finite: raise InputError for NaN or infinity in inputs or result.

        Raises:
            ConfigError: the preset runs a scheduler of diffusers: see ``begin``.
            InputError: a tensor has the wrong shape, dtype or values.
            Cancelled: ``cancelled()`` was true.
            EngineError: the engine library failed.
        """
        stochastic = bool(self._tables.coefficients[:, 7].any())
        scale = self.preset.guidance_scale if guidance_scale is None else guidance_scale
        negative = dict(negative_conditions or {})
        if negative_prompt_embeds is not None:
            negative[PROMPT] = negative_prompt_embeds
        request = checked_request(
            self.bundle.model,
            self.steps,
            noise=noise,
            positive=self._placed({PROMPT: prompt_embeds, **(conditions or {})}, check_finite),
            negative=self._placed(negative, check_finite),
            guidance=guidance_of(scale, guidance_rescale, image_guidance_scale),
            seeds=seeds,
            needs_seeds=stochastic,
            image_latents=image_latents,
            latents=latents,
            start_step=start_step,
            end_step=end_step,
            check_finite=check_finite,
        )
        result = self._run(request, callback, cancelled)
        if self.drift is not None and result.record.change is not None:
            self.drift.add(result.record.change)
        return result

    def begin(
        self,
        prompt_embeds: np.ndarray,
        *,
        conditions: Mapping[str, np.ndarray] | None = None,
        batch: int | None = None,
        height: int | None = None,
        width: int | None = None,
        check_finite: bool = False,
    ) -> OpenRequest:
        """Open a request whose loop, guidance and solver are the caller's: see ``OpenRequest``.

        The batch is laid out as the caller likes, guided halves or not: the session sees rows. A
        prompt that is the same as in the request before is not computed again. A drift monitor
        does not hear of such requests.

        Args:
            prompt_embeds: float32 [batch or 1, tokens, D].
            conditions: further inputs by name (SDXL: text_embeds, time_ids), [batch or 1, ...].
            batch: rows of the samples to come; default those of ``prompt_embeds``.
            height: latent height; default the model's.
            width: latent width; default the model's.
            check_finite: raise InputError for NaN or infinity in the conditions.

        Raises:
            ConfigError: another request of this session is open.
            InputError: a tensor or size that does not fit.
            EngineError: the engine library failed.
        """
        model = self.bundle.model
        given = self._placed({PROMPT: prompt_embeds, **(conditions or {})}, check_finite)
        sizes, checked = checked_conditions(
            model, given, batch=batch, height=height, width=width, check_finite=check_finite
        )
        with self._exclusive():
            program = self._program(sizes, sizes.batch)
            request = OpenRequest(
                self.backend.device,
                program,
                self.steps,
                self._held,
                functools.partial(self._step_graphs, self._graphs, program, sizes),
            )
            before = program.conditions
            if before is None or any(
                isinstance(values, tuple) or not np.array_equal(values, before[name])
                for name, values in checked.items()
            ):
                take_conditions(self.backend.device, program, checked, request.record)
            self._open = weakref.ref(request)
        return request

    def warm_up(
        self,
        images: int = 1,
        height: int | None = None,
        width: int | None = None,
        *,
        guided: bool | None = None,
    ) -> None:
        """Denoise once with empty prompts, so that the first real request of this shape is quick.

        It allocates memory, lets the engine library compile what it compiles late, and captures
        CUDA graphs. It takes as long as one request. A drift monitor does not hear of it.

        Args:
            images: N of the requests to come.
            height: latent height; default the model's.
            width: latent width; default the model's.
            guided: with or without guidance; default as the preset has it.
        """
        model, images = self.bundle.model, whole_number("images", images, 1)
        guided = self.preset.guidance_scale > 1 if guided is None else guided
        noise = self.noise(range(images), height, width)
        sizes = replace(model.sizes, batch=1, height=noise.shape[2], width=noise.shape[3])
        dtypes = {"int64": np.int64}
        empty = {
            spec.name: np.zeros(spec.shape(sizes), dtypes.get(spec.dtype, np.float32))
            for spec in model.conditions
        }
        if isinstance(self._solver, DiffusersScheduler):
            self._warm_up_steps(images * (2 if guided else 1), empty, sizes)
            return
        request = checked_request(
            model,
            self.steps,
            noise=noise,
            positive=empty,
            negative=empty,
            guidance=guidance_of(max(self.preset.guidance_scale, 2.0), 0.0) if guided else None,
            seeds=range(images),
        )
        self._run(request)

    def _warm_up_steps(
        self,
        batch: int,
        conditions: dict[str, np.ndarray],
        sizes: Sizes,
    ) -> None:
        """The steps of a request whose solver is the caller's."""
        prompt = conditions.pop(PROMPT)
        sample = self.noise(range(batch), sizes.height, sizes.width)
        with self.begin(
            prompt, conditions=conditions, batch=batch, height=sizes.height, width=sizes.width
        ) as request:
            for step in range(self.steps):
                request.predict(step, sample)

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the sets of weights that are loaded, the last used at the end."""
        return tuple(self._sets)

    def bundle_of(self, name: str | None) -> Bundle:
        """The bundle of a set of weights that is loaded, or of "base".

        Raises:
            ConfigError: no such set.
        """
        if name == BASE:
            return self._base.bundle
        loaded = self._sets.get(name or "")
        if loaded is None:
            raise ConfigError(
                f"Expected a bundle, or a name of {[*self._sets]}, got {name!r}. A set that was "
                f"let go is loaded again by its bundle."
            )
        return loaded.bundle

    def load_weights(
        self, bundle: Bundle | str | Path, name: str | None = None, *, verify: bool = True
    ) -> str:
        """Load the weights of another bundle beside those that requests run on.

        The session draws meanwhile. The bundle is one of the same graphs and the same preset, as
        ``blockcache compile --lora FILE --like BUNDLE`` makes it. All segments are loaded, or none.
        TensorRT engines of the bundle that the session opened are refitted.

        Args:
            bundle: a folder, or an opened Bundle.
            name: what ``swap_weights`` calls the set; default the name of the bundle's folder.
            verify: check the sha256 of every file first.

        Returns:
            The set's name.

        Raises:
            ConfigError: graphs, schedule or model differ; engines that cannot be refitted; the
                name "base", which is that of the weights that the session opened with.
            BundleError: see ``Bundle.open``.
            EngineError: the engine library refuses a segment.
        """
        self.check_open()
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify=verify)
        chosen = opened.folder.name if name is None else name
        if chosen == BASE:
            raise ConfigError(
                f"Expected another name than {BASE!r}, which are the weights that the session "
                f"opened with. Give one: name=..."
            )
        base = self._base
        self._keep(
            WeightSet(
                chosen,
                opened,
                preset_like(base.bundle, base.preset, opened),
                load_engines(self.backend, opened, _needed(opened), plans=base.bundle),
            )
        )
        return chosen

    def swap_weights(
        self,
        bundle: Bundle | str | Path | None = None,
        name: str | None = None,
        *,
        keep_bytes: int = 0,
        verify: bool = True,
    ) -> str:
        """Let all requests to come run on other weights; those in flight finish on the old ones.

        It waits for the request that is running. Where loading fails nothing changes.

        Args:
            bundle: whose weights; loaded first, as by ``load_weights``.
            name: without a bundle, a set that is loaded, or "base": those that the session opened
                with. With one, what to call it.
            keep_bytes: weights that stay loaded beside the new ones, so that a swap back is quick:
                the last used, by the bytes of their files. "base" always comes back: it is loaded
                again where it was let go.
            verify: as of ``load_weights``.

        Returns:
            The set's name.

        Raises:
            ConfigError: as ``load_weights``; neither a bundle nor a name; a name that is not
                loaded; called from a callback of the same session.
            BundleError, EngineError: as ``load_weights``.
        """
        keep = whole_number("keep_bytes", keep_bytes, 0, error=ConfigError)
        chosen = name if bundle is None else self.load_weights(bundle, name, verify=verify)
        if chosen == BASE and BASE not in self._sets:
            bundle = self._base.bundle
            engines = load_engines(self.backend, bundle, _needed(bundle))
            self._keep(replace(self._base, engines=engines))
        with self._held():
            if self._running:
                raise ConfigError(
                    "swap_weights was called from a callback of the same session. Swap after "
                    "denoise has returned, or in another thread."
                )
            self.bundle_of(chosen)
            self._switch(str(chosen), keep)
        return str(chosen)

    def _switch(self, name: str, keep_bytes: int) -> None:
        """Take a loaded set; programs and graphs are bound to engines, so they go."""
        self._weights = self._sets.pop(name)
        self._sets[name] = self._weights
        self._programs.clear()
        self._graphs = self._graph_player()
        kept = to_keep(self._sets, name, keep_bytes)
        self._sets = {key: loaded for key, loaded in self._sets.items() if key in kept}

    def _keep(self, loaded: WeightSet) -> None:
        """A set that ``_switch`` can take; it is the first to be let go until it has been."""
        with self._held():
            others = {name: kept for name, kept in self._sets.items() if name != loaded.name}
            self._sets = {loaded.name: loaded, **others}

    def close(self) -> None:
        """Free engines and memory; a closed session refuses every request. Closing twice is fine.

        Engines that another session of the process uses stay loaded.

        Raises:
            ConfigError: a callback of this session's own request closes it.
        """
        if os.getpid() != self._process:  # in a forked child: its parent frees them
            return
        with self._lock:
            if self._running:
                raise ConfigError(
                    "close was called from a callback of the same session, whose engines are in "
                    "use. Close the session after denoise has returned."
                )
            self._closed = True
            self._programs.clear()
            self._sets.clear()
            self._weights = replace(self._weights, engines={})
            self._graphs = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            "A session cannot be pickled or copied: it holds engines and memory of this process. "
            "Hand over the bundle's folder and the preset's name, and call Session.open there."
        )

    def _placed(self, given: Mapping[str, Any], check_finite: bool) -> Mapping[str, Any]:
        """Conditions, without a copy those that lie on the session's GPU as the engines read them.

        What is to be checked for finite numbers is checked on the host.
        """
        if check_finite:
            return given
        small = (CLASSES, "time_ids", CONTROL_SCALE)  # guidance's other half may be made of these
        specs = {
            c.name: c.dtype for c in self.bundle.model.conditions if not c.name.startswith(small)
        }
        device = self.backend.device
        return {n: where_it_lies(device, values, specs.get(n)) for n, values in given.items()}

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """The session's lock, of an open session in the process that opened it."""
        if os.getpid() != self._process:  # the lock may be held for good by a thread of the parent
            raise ConfigError(
                "This session was opened before the process forked, and the engine library's "
                "threads stayed in the parent. Open a session in the child: Session.open; with "
                "gunicorn in the hook post_fork."
            )
        with self._lock:
            if self._closed:
                raise ConfigError(
                    "Expected an open session, this one is closed. Open another: Session.open."
                )
            yield

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One request at a time; a callback cannot start another on the same buffers."""
        with self._held():
            opened = self._open()
            if opened is not None and opened.is_open:
                raise ConfigError(
                    "A request that begin has opened is still open, and its buffers are in use. "
                    "End it (request.end()), or open a second session; engines are shared."
                )
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

    def _run(
        self,
        request: Request,
        callback: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Denoised:
        with self._exclusive():
            program = self._program(request.sizes, request.images)
            modes = modes_of(request.guidance)
            steps = (request.first, request.steps.stop)
            shape = (request.sizes, request.images, *steps, *modes)
            graphs = self._graphs_of(program, shape)
            device, tables = self.backend.device, self._tables
            return denoise(device, program, request, tables, graphs, callback, cancelled)

    def _graph_player(self) -> GraphPlayer | None:
        """Graphs of one set of weights; None where launches stay single."""
        mode = self.backend.graphs
        if mode is None:
            return None
        return GraphPlayer(self.backend.device, mode, self.backend.settled)

    @staticmethod
    def _step_graphs(
        player: GraphPlayer | None, program: Program, sizes: Sizes, first: int
    ) -> LoopGraphs | None:
        """Graphs of an open request's steps: of the weights that it began with."""
        if player is None:
            return None
        return LoopGraphs(player, (sizes, sizes.batch, first, "predict"), program.tensors)

    def _graphs_of(self, program: Program, shape: tuple[Hashable, ...]) -> LoopGraphs | None:
        """CUDA graphs of a request's shape and first step; None where launches stay single."""
        return None if self._graphs is None else LoopGraphs(self._graphs, shape, program.tensors)

    def _program(self, sizes: Sizes, images: int) -> Program:
        """The program of these sizes; bound on first use, kept while among the last ``SHAPES``."""
        key = (sizes, images)
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


def _needed(bundle: Bundle) -> list[Segment]:
    """The segments that a session runs."""
    return [segment for segment in bundle.segments if segment.role in (*LOOP_ROLES, "prompt")]
