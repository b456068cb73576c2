"""The continuous batch: many requests at once, each at its own step, with caching.

::

    with ContinuousBatch.open("bundle", slots=8) as batch:
        future = batch.submit(batch.noise([0]), prompt_embeds, negative_prompt_embeds)
        future.result().latents         # float32 [1, C, H, W], as a Session gives them

Requests come and go between ticks; at a tick each advances one step. A request's latents are those
that it gets alone, up to rounding.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from blockcache.runtime.arguments import finite_number, whole_number
from blockcache.runtime.batching.counters import BatchCounters, RequestTally
from blockcache.runtime.batching.outcome import BatchedResult, BatchFuture, BatchProgress
from blockcache.runtime.batching.presets import PresetTables
from blockcache.runtime.batching.slots import BatchMemory, SlotMemory
from blockcache.runtime.batching.tick import ActiveRequest, Ticker
from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.devices.host import HostDevice
from blockcache.runtime.engines.choice import make_backend
from blockcache.runtime.engines.engine import Backend
from blockcache.runtime.engines.loading import load_engines
from blockcache.runtime.errors import (
    BlockCacheError,
    Cancelled,
    ConfigError,
    DeadlineError,
    InputError,
    QueueFullError,
)
from blockcache.runtime.fork import keep_in_children
from blockcache.runtime.plan import LOOP_ROLES, MOST_SIZE, Preset, Sizes, preset_name
from blockcache.runtime.request import (
    PROMPT,
    Request,
    check_finite_values,
    checked_request,
    guidance_of,
    starting_noise,
)
from blockcache.runtime.solvers.recorded import DiffusersScheduler, recorded_solver


@dataclass(eq=False)
class _Job:
    """A request from submit to its end."""

    request: Request
    preset: str
    future: BatchFuture
    submitted: float  # seconds of the monotonic clock, as the next two
    deadline: float | None
    callback: Callable[[BatchProgress], None] | None
    admitted: float = 0.0
    active: ActiveRequest | None = None  # in its slot


@dataclass
class _Tally(RequestTally):
    waiting_seconds: float = 0.0
    denoising_seconds: float = 0.0


class ContinuousBatch:
    """Up to ``slots`` images of one size, each at its own step of its own preset.

    Thread-safe: any thread submits; one thread of the batch's own runs the ticks. Requests get
    slots in the order in which they came. Like a session it belongs to the process that opened it.
    """

    def __init__(
        self,
        bundle: Bundle,
        presets: Sequence[Preset],
        backend: Backend,
        sizes: Sizes,
        *,
        slots: int,
        queue: int,
    ) -> None:
        device = backend.device
        if not isinstance(device, HostDevice):
            raise ConfigError(
                f"Expected a backend on the CPU, got {backend.name!r}: a continuous batch brings "
                f"rows together in host memory. On a GPU use Session."
            )
        segments = bundle.segments
        loop = tuple(s for s in segments if s.role in LOOP_ROLES)
        prompts = tuple(s for s in segments if s.role == "prompt")
        self.bundle, self.slots, self.sizes = bundle, slots, replace(sizes, batch=1)
        self.default_preset = presets[0].name
        memory = SlotMemory(bundle.model, loop, prompts, device, self.sizes, slots)
        self._tables = PresetTables(presets, loop, memory.fields, device, self.sizes)
        self.memory: BatchMemory = replace(memory.memory, tables=self._tables.bytes)
        """Bytes held from now until the batch is closed."""
        engines = load_engines(backend, bundle, (*loop, *prompts))
        ticker = Ticker(loop, prompts, engines, self._tables, memory, device)
        self._times = ticker.times
        self._most_waiting = queue
        self._waiting: deque[_Job] = deque()
        self._active: list[_Job] = []
        self._free = list(range(slots))
        self._tally = _Tally()
        self._wake = threading.Condition()
        self._closing = self._draining = False
        self._process = os.getpid()
        keep_in_children(self)
        self._thread = threading.Thread(  # engines and memory are its own, and end with it
            target=self._serve, args=(ticker,), name="blockcache-batch", daemon=True
        )
        self._thread.start()

    @classmethod
    def open(
        cls,
        bundle: Bundle | str | Path,
        *,
        slots: int = 8,
        presets: Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        tokens: int | None = None,
        queue: int = 256,
        backend: str | Backend = "ort",
        threads: int | None = None,
        verify: bool = True,
    ) -> ContinuousBatch:
        """Open a bundle, load its engines and take all memory that the batch will need.

        Args:
            bundle: A folder that ``blockcache compile`` wrote, or an opened Bundle.
            slots: Images that are denoised together at most.
            presets: Those that requests may ask for, the first by default. Default: the
                recommended one, then all others that have a solver of the runtime.
            height: Latent height of every request; default the model's.
            width: Latent width of every request; default the model's.
            tokens: Length of every prompt; default the model's.
            queue: Requests that may wait for a slot; ``submit`` refuses more.
            backend: "ort", or a Backend on the CPU.
            threads: CPU threads of ONNX Runtime; default one a physical core.
            verify: Check the sha256 of every file first.

        Raises:
            ConfigError: an option out of range, a backend on a GPU, or a preset that runs a
                scheduler of diffusers.
            BundleError, EngineError, MissingExtraError: see ``Session.open``.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify=verify)
        slots = whole_number("slots", slots, 1, MOST_SIZE // 2, ConfigError)
        queue = whole_number("queue", queue, 1, error=ConfigError)
        usual = opened.model.sizes
        sizes = Sizes(
            batch=1,
            height=usual.height if height is None else height,
            width=usual.width if width is None else width,
            tokens=usual.tokens if tokens is None else tokens,
        )
        factor = opened.model.downsampling
        if sizes.height % factor or sizes.width % factor:
            raise ConfigError(
                f"Expected a latent height and width divisible by {factor}, got {sizes.height} x "
                f"{sizes.width}."
            )
        chosen = _chosen(opened, presets)
        made = backend if not isinstance(backend, str) else make_backend(backend, threads=threads)
        return cls(opened, chosen, made, sizes, slots=slots, queue=queue)

    @property
    def presets(self) -> tuple[str, ...]:
        """What requests may ask for."""
        return tuple(self._tables.presets)

    def preset(self, name: str | None = None) -> Preset:
        """One of ``presets``, by its name or as it was asked of the compiler; default the first.

        Raises:
            InputError: the batch was not opened with it.
        """
        known = self._tables.presets
        if name is None:
            return known[self.default_preset]
        found = known.get(name) or known.get(preset_name(str(name)))
        if found is None:
            raise InputError(
                f"preset: expected one that the batch was opened with, {list(known)}, got {name!r}."
            )
        return found

    @property
    def running(self) -> bool:
        """Whether its thread is there, to take requests or to finish them."""
        return self._thread.is_alive()

    def noise(self, seeds: Sequence[int]) -> np.ndarray:
        """Standard normal noise float32 [N, C, H, W], the same as ``Session.noise`` gives."""
        return starting_noise(self.bundle.model, seeds, self.sizes.height, self.sizes.width)

    def submit(
        self,
        noise: np.ndarray,
        prompt_embeds: np.ndarray,
        negative_prompt_embeds: np.ndarray | None = None,
        *,
        preset: str | None = None,
        conditions: Mapping[str, np.ndarray] | None = None,
        negative_conditions: Mapping[str, np.ndarray] | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        image_guidance_scale: float = 1.0,
        seeds: Sequence[int] | None = None,
        image_latents: np.ndarray | None = None,
        start_step: int = 0,
        deadline: float | None = None,
        callback: Callable[[BatchProgress], None] | None = None,
    ) -> BatchFuture:
        """Ask for one image; arguments are those of ``Session.denoise`` with N = 1.

        Everything is checked here, so that what is wrong with a request never reaches the batch.

        Args:
            noise: float32 [1, C, H, W], standard normal; ``self.noise([seed])`` makes it.
            prompt_embeds: float32 [1, tokens, D].
            negative_prompt_embeds: float32 [1, tokens, D]; needed for guidance.
            preset: one of ``self.presets``; default the first.
            conditions: further inputs by name (SDXL: text_embeds, time_ids), [1, ...].
            negative_conditions: the same for the unconditional half.
            guidance_scale: default the preset's. 1 or less turns guidance off.
            guidance_rescale: 0 (off) to 1.
            image_guidance_scale: InstructPix2Pix; 1 (off) or more.
            seeds: one whole number, for presets whose solver adds noise at every step.
            image_latents: float32 [1, C, H, W] to start from, noised to ``start_step``'s level.
            start_step: the first step to execute; it recomputes every block.
            deadline: seconds from now; what has not finished by then fails with DeadlineError.
            callback: called after each step, in the thread of the ticks: all requests wait for it,
                so hand over to a thread of your own what takes time. What it raises ends the
                request.

        Returns:
            The result to come. It raises Cancelled, DeadlineError, InputError (the result is not
            finite) or EngineError.

        Raises:
            InputError: a tensor has the wrong shape, dtype or values, NaN and infinity among them.
            QueueFullError: too many requests wait.
            ConfigError: the batch is closed, or was opened before a fork.
        """
        chosen = self.preset(preset)
        request = self._checked(
            chosen,
            noise,
            {PROMPT: prompt_embeds, **(conditions or {})},
            {
                **(negative_conditions or {}),
                **({} if negative_prompt_embeds is None else {PROMPT: negative_prompt_embeds}),
            },
            guidance=(guidance_scale, guidance_rescale, image_guidance_scale),
            seeds=seeds,
            image_latents=image_latents,
            start_step=start_step,
        )
        now = time.monotonic()
        until = None if deadline is None else now + finite_number("deadline", deadline)
        job = _Job(request, chosen.name, BatchFuture(self._notify), now, until, callback)
        self.check_process()
        with self._wake:
            if self._closing:
                raise ConfigError(
                    "Expected an open batch, this one is closed. Open another: "
                    "ContinuousBatch.open."
                )
            if len(self._waiting) >= self._most_waiting:
                raise QueueFullError(
                    f"Expected at most {self._most_waiting} requests that wait for a slot, there "
                    f"are as many. Try again later, or open the batch with a longer queue."
                )
            self._tally.submitted += 1
            self._waiting.append(job)
            self._wake.notify()
        return job.future

    def counters(self) -> BatchCounters:
        """What happened so far."""
        with self._wake:
            tally, times = self._tally, self._times
            return BatchCounters(
                waiting=len(self._waiting),
                active=len(self._active),
                **asdict(tally),
                ticks=times.ticks,
                steps=times.steps,
                launches=times.launches,
                launches_saved=times.launches_alone - times.launches,
                launches_of_images=dict(sorted(times.images.items())),
                engine_seconds=times.engines_ns / 1e9,
                copy_seconds=times.copies_ns / 1e9,
                solver_seconds=times.solver_ns / 1e9,
            )

    def close(self, drain: bool = True) -> None:
        """Take no more requests, end those that are there, free engines and memory.

        Args:
            drain: finish what was submitted; False cancels it.

        Raises:
            ConfigError: called by a future's callback, in the batch's own thread.
        """
        if os.getpid() != self._process:  # in a forked child: its parent frees them
            return
        if threading.current_thread() is self._thread:
            raise ConfigError(
                "close was called from a callback of a future, in the thread that it would wait "
                "for. Close the batch from another thread."
            )
        with self._wake:
            self._draining = drain and (self._draining or not self._closing)
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def __enter__(self) -> ContinuousBatch:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(drain=kind is None)

    # -- a request's arguments ---------------------------------------------------------------------

    def _checked(
        self,
        preset: Preset,
        noise: Any,
        positive: Mapping[str, Any],
        negative: Mapping[str, Any],
        *,
        guidance: tuple[float | None, float, float],
        **others: Any,
    ) -> Request:
        """A request of one image, of the batch's sizes, in finite numbers."""
        tables = self._tables.solvers[preset.name]
        scale = preset.guidance_scale if guidance[0] is None else guidance[0]
        request = checked_request(
            self.bundle.model,
            preset.schedule.steps,
            noise=noise,
            positive=positive,
            negative=negative,
            guidance=guidance_of(scale, *guidance[1:]),
            needs_seeds=bool(tables.coefficients[:, 7].any()),
            check_finite=True,
            **others,
        )
        if request.images != 1:
            raise InputError(
                f"noise: expected one image [1, C, H, W], got {request.images}. Submit each by "
                f"itself."
            )
        if replace(request.sizes, batch=1) != self.sizes:
            raise InputError(
                f"Expected a request of the batch's sizes, {self.sizes}, got "
                f"{replace(request.sizes, batch=1)}. Open another batch for other sizes."
            )
        return request

    def check_process(self) -> None:
        """Raise ConfigError in a forked child: the batch's thread stayed in the parent."""
        if os.getpid() != self._process:
            raise ConfigError(
                "This batch was opened before the process forked, and its threads stayed in the "
                "parent. Open a batch in the child: ContinuousBatch.open."
            )

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    # -- the batch's own thread --------------------------------------------------------------------

    def _serve(self, ticker: Ticker) -> None:
        """Tick as long as there is something to do."""
        while self._wait_for_work():
            self._end_early()
            self._advance(ticker)

    def _wait_for_work(self) -> bool:
        """False where the batch is closed and nothing is left to do."""
        with self._wake:
            while not (self._waiting or self._active or self._closing):
                self._wake.wait()
            return bool(self._waiting or self._active)

    def _end_early(self) -> None:
        """End what was cancelled, or is past its deadline, waiting or active."""
        now = time.monotonic()
        with self._wake:
            jobs = [*self._waiting, *self._active]
            abandoned = self._closing and not self._draining
        for job in jobs:
            if abandoned or job.future.cancel_requested:
                self._end(job, Cancelled("The request was cancelled; others go on."))
            elif job.deadline is not None and now > job.deadline:
                late = job.deadline - job.submitted
                self._end(
                    job,
                    DeadlineError(
                        f"Expected the request to finish within {late:.3g} s, it did not. Give it "
                        f"more time, or open a batch with fewer requests waiting."
                    ),
                )

    def _advance(self, ticker: Ticker) -> None:
        """Admit what fits, and do one tick."""
        with self._wake:
            new = [self._waiting.popleft() for _ in range(min(len(self._free), len(self._waiting)))]
            slots = [self._free.pop(0) for _ in new]
            self._active += new
            now = time.monotonic()
            for job in new:
                job.admitted = now
                job.future.set_running_or_notify_cancel()
                self._tally.waiting_seconds += now - job.submitted
        try:
            admitted = [(j.request, j.preset, s) for j, s in zip(new, slots, strict=True)]
            for job, active in zip(new, ticker.admit(admitted), strict=True):
                job.active = active
            running = [job.active for job in self._active if job.active is not None]
            if running:
                ticker.tick(running)
        except Exception as error:  # an engine's failure is of the launch, not of one request
            with self._wake:
                self._free += [s for s, job in zip(slots, new, strict=True) if job.active is None]
            for job in list(self._active):
                self._end(job, error)
            return
        for job in list(self._active):
            self._report(job, ticker)
        for job in [job for job in self._active if job.active is not None and job.active.done]:
            self._finish(job, ticker)

    def _report(self, job: _Job, ticker: Ticker) -> None:
        """Tell a request's callback about the step that it has just done."""
        if job.callback is None or job.active is None:
            return
        step, tables = job.active.step - 1, self._tables.solvers[job.preset]
        latents, steps = ticker.latents(job.active), job.request.steps.stop
        try:
            job.callback(BatchProgress(step, steps, float(tables.timesteps[step]), latents))
        except Exception as error:  # the caller's own, of this request alone
            self._end(job, error)

    def _finish(self, job: _Job, ticker: Ticker) -> None:
        """The result of a request whose last step has run."""
        active = job.active
        assert active is not None
        latents = ticker.latents(active)
        try:
            check_finite_values("the denoised latents", latents)
        except BlockCacheError as error:
            self._end(job, error)
            return
        spent = time.monotonic() - job.admitted
        result = BatchedResult(
            latents,
            len(job.request.steps),
            active.launches,
            1e3 * (job.admitted - job.submitted),
            1e3 * spent,
        )
        with self._wake:
            self._tally.denoising_seconds += spent
        self._end(job, result)

    def _end(self, job: _Job, outcome: BatchedResult | Exception) -> None:
        """Free a request's slot or its place in the queue, then tell whoever waits for it."""
        error = outcome if isinstance(outcome, Exception) else None
        with self._wake:
            if job in self._active:
                self._active.remove(job)
                if job.active is not None:
                    self._free.append(job.active.slot)
                    self._free.sort()
            else:
                with contextlib.suppress(ValueError):
                    self._waiting.remove(job)
            self._tally.end(error)
        if isinstance(outcome, BatchedResult):
            job.future.set_result(outcome)
        else:
            job.future.set_exception(outcome)


def _chosen(bundle: Bundle, names: Sequence[str] | None) -> list[Preset]:
    """The presets of a batch, the default first."""
    if names is not None:
        if isinstance(names, str) or not names:
            raise ConfigError(f"presets: expected a list of names, got {names!r}.")
        return [bundle.preset(name) for name in dict.fromkeys(names)]
    first = bundle.preset()
    found = [first, *(bundle.preset(n) for n in bundle.preset_names if n != first.name)]
    ours = [p for p in found if not isinstance(recorded_solver(p.solver), DiffusersScheduler)]
    if not ours:
        raise ConfigError(
            "Expected a preset with a solver of the runtime, all of this bundle's run schedulers "
            "of diffusers. Add one: blockcache compile --preset dpm:20."
        )
    return ours
