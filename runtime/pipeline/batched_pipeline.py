"""The batched pipeline: prompts in, pictures out, many requests at once, without torch.

::

    with BatchedPipeline.open("bundle", slots=8) as pipeline:
        future = pipeline.submit("a red bicycle", seed=0)
        future.result().image           # uint8 [H, W, 3]

A request goes through three threads: prompts are encoded in one, a continuous batch denoises in
the second, and in the third what is denoised meanwhile is decoded together. A fourth calls the
callbacks. None waits for another.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blockcache.runtime.arguments import finite_number, whole_number
from blockcache.runtime.batching.batch import ContinuousBatch
from blockcache.runtime.batching.counters import RequestTally
from blockcache.runtime.batching.outcome import BatchedResult, BatchFuture, BatchProgress
from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.engines.choice import make_backend
from blockcache.runtime.engines.engine import Backend
from blockcache.runtime.errors import (
    Cancelled,
    ConfigError,
    DeadlineError,
    InputError,
    QueueFullError,
)
from blockcache.runtime.fork import keep_in_children
from blockcache.runtime.pipeline.parts import PipelineParts, require_served
from blockcache.runtime.pipeline.picture_arguments import (
    Size,
    first_step,
    latent_size,
    micro_sizes,
    random_seeds,
    tile_side,
)
from blockcache.runtime.pipeline.picture_outcome import (
    BatchedPicture,
    PictureFuture,
    PipelineCounters,
)
from blockcache.runtime.pipeline.pictures import as_pictures
from blockcache.runtime.request import guidance_of

DECODED_TOGETHER = 4
"""Pictures that share a run of the decoder at most, so that its memory is bounded."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Asked:
    """One picture, all of it checked."""

    prompt: str
    negative_prompt: str | None
    preset: str
    seed: int
    guidance_scale: float
    guidance_rescale: float
    image: np.ndarray | None  # uint8 [1, H, W, 3]
    first: int  # the first step to execute
    sizes: tuple[int, ...]  # SDXL's micro-conditions
    scores: tuple[float, float]  # its refiner's
    deadline: float | None  # seconds from submit


@dataclass(eq=False)
class _Job:
    """A picture from submit to its end."""

    asked: _Asked
    callback: Callable[[BatchProgress], None] | None
    submitted: float  # seconds of the monotonic clock
    future: PictureFuture = field(init=False)
    denoising: BatchFuture | None = None
    denoised: BatchedResult | None = None
    text_ms: float = 0.0
    truncated: str = ""
    progress: BatchProgress | None = None  # the last step, until the callback has seen it
    error: Exception | None = None  # of the callback

    def __post_init__(self) -> None:
        self.future = PictureFuture(self.stop)

    def stop(self) -> None:
        """End the denoising before its next step."""
        if self.denoising is not None:
            self.denoising.cancel()


@dataclass
class _Tally(RequestTally):
    text_seconds: float = 0.0  # these are of what finished
    waiting_seconds: float = 0.0
    denoising_seconds: float = 0.0
    decode_seconds: float = 0.0


class BatchedPipeline:
    """Text encoders, a continuous batch and a decoder: up to ``slots`` pictures at a time.

    Thread-safe: any thread submits. Pictures are those that a ``Pipeline`` draws alone, up to
    rounding. Like a session it belongs to the process that opened it.
    """

    def __init__(
        self, batch: ContinuousBatch, parts: PipelineParts, *, most: int, tile: int | None = None
    ) -> None:
        self.batch = batch
        self.slots = batch.slots
        self._parts, self._most, self._tile = parts, most, tile
        self._lock = threading.Lock()  # of tally, closing, and what is to be decoded
        self._decoding = threading.Lock()  # the decoder takes one caller at a time
        self._tally = _Tally()
        self._decodes: Counter[int] = Counter()
        self._denoised: deque[_Job] = deque()
        self._closing = self._abandoned = False
        self._process = os.getpid()
        self._own_threads: set[int] = set()
        keep_in_children(self)
        self._text, self._pictures, self._reports = (
            ThreadPoolExecutor(1, f"blockcache-{name}", initializer=self._note_thread)
            for name in ("text", "pictures", "reports")
        )

    @classmethod
    def open(
        cls,
        bundle: Bundle | str | Path,
        *,
        slots: int = 8,
        presets: Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        queue: int = 256,
        tile: int | None = None,
        backend: str | Backend = "ort",
        threads: int | None = None,
        verify: bool = True,
    ) -> BatchedPipeline:
        """Open a bundle with its text encoders and autoencoder, for many requests at once.

        Args:
            bundle: A folder that ``blockcache compile`` wrote, or an opened Bundle.
            slots: Pictures that are denoised together at most.
            presets: Those that requests may ask for, the first by default. Default: the
                recommended one, then all others that have a solver of the runtime.
            height: Of all pictures, in pixels; default the model's.
            width: Of all pictures, in pixels; default the model's.
            queue: Pictures that may be pending beyond those in slots; ``submit`` refuses more.
            tile: Decode in tiles of so many pixels a side.
            backend: "ort", or a Backend on the CPU.
            threads: CPU threads of ONNX Runtime, for each of text, denoising and decoding; default
                one a physical core.
            verify: Check the sha256 of every file first.

        Raises:
            ConfigError: the bundle holds the U-Net alone, or one that takes more than a prompt; an
                option out of range; a backend on a GPU.
            InputError: height, width or tile do not fit the model.
            MissingExtraError: tokenizers or the engine library is not installed.
            BundleError, EngineError: see ``Session.open``.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify=verify)
        require_served(opened)
        made = backend if not isinstance(backend, str) else make_backend(backend, threads=threads)
        slots = whole_number("slots", slots, 1, error=ConfigError)
        queue = whole_number("queue", queue, 1, error=ConfigError)
        parts = PipelineParts.load(made, opened)
        factor = parts.decoder.factor
        side = None if tile is None else tile_side(factor, tile)
        high, wide = latent_size(opened.model, factor, None, height, width)
        batch = ContinuousBatch.open(
            opened,
            slots=slots,
            presets=presets,
            height=high,
            width=wide,
            tokens=parts.prompts.tokens,
            queue=slots + queue,  # the bound is kept here, over all stages
            backend=made,
        )
        return cls(batch, parts, most=slots + queue, tile=side)

    def submit(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        *,
        preset: str | None = None,
        seed: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        image: Any = None,
        strength: float = 0.8,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
        deadline: float | None = None,
        callback: Callable[[BatchProgress], None] | None = None,
    ) -> PictureFuture:
        """Ask for one picture; arguments are those of ``Pipeline``, for one.

        Args:
            prompt: what does not fit into the text encoder's length falls away, and is told.
            negative_prompt: used with guidance only.
            preset: one of ``presets``; default the first.
            seed: a whole number; default a random one, told in the result.
            guidance_scale: default the preset's. 1 or less turns guidance off.
            guidance_rescale: 0 (off) to 1.
            image: uint8 [H, W, 3], or an RGB picture of Pillow, of the pipeline's size.
            strength: how much of ``image`` is drawn anew, above 0 to 1.
            original_size: SDXL: (height, width) in pixels; default the picture's.
            crops_coords_top_left: SDXL: (top, left).
            target_size: SDXL: (height, width) in pixels; default the picture's.
            aesthetic_score: SDXL's refiner.
            negative_aesthetic_score: SDXL's refiner.
            deadline: seconds from now; what is not there by then fails with DeadlineError.
            callback: called after steps with a BatchProgress, in a thread of the pipeline's own;
                a slow one sees the last step only. ``self.decode`` makes a preview of its latents.
                What it raises ends the request.

        Returns:
            The picture to come. It raises Cancelled, DeadlineError, InputError (the result is not
            finite), EngineError, or what the callback raised.

        Raises:
            InputError: an argument of another type, size or range.
            ConfigError: ``image``, and the bundle has no encoder; a closed pipeline, or one that
                was opened before a fork.
            QueueFullError: too many requests are pending.
        """
        chosen = self.batch.preset(preset)
        scale = chosen.guidance_scale if guidance_scale is None else guidance_scale
        guidance_of(scale, guidance_rescale)
        start = None if image is None else self._start(image)
        steps = chosen.schedule.steps
        asked = _Asked(
            prompt=_text("prompt", prompt),
            negative_prompt=None
            if negative_prompt is None
            else _text("negative_prompt", negative_prompt),
            preset=chosen.name,
            seed=random_seeds(1)[0] if seed is None else whole_number("seed", seed, 0),
            guidance_scale=scale,
            guidance_rescale=guidance_rescale,
            image=start,
            first=0 if start is None else first_step(steps, strength),
            sizes=micro_sizes(self.picture_size, original_size, crops_coords_top_left, target_size),
            scores=(
                finite_number("aesthetic_score", aesthetic_score),
                finite_number("negative_aesthetic_score", negative_aesthetic_score),
            ),
            deadline=None if deadline is None else finite_number("deadline", deadline),
        )
        self.batch.check_process()
        job = _Job(asked, callback, time.monotonic())
        with self._lock:
            if self._closing:
                raise ConfigError(
                    "Expected an open pipeline, this one is closed. Open another: "
                    "BatchedPipeline.open."
                )
            if self._tally.pending >= self._most:
                raise QueueFullError(
                    f"Expected at most {self._most} pending requests, there are as many. Try again "
                    f"later, or open the pipeline with a longer queue."
                )
            self._tally.submitted += 1
            self._text.submit(self._encode, job)
        return job.future

    @property
    def presets(self) -> tuple[str, ...]:
        """What requests may ask for."""
        return self.batch.presets

    @property
    def picture_size(self) -> Size:
        """Height and width of all pictures, in pixels."""
        factor, sizes = self._parts.decoder.factor, self.batch.sizes
        return sizes.height * factor, sizes.width * factor

    @property
    def running(self) -> bool:
        """Whether it takes requests, or finishes them."""
        return self.batch.running

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pictures uint8 [N, H, W, 3] of latents float32 [N, C, h, w], for previews.

        Raises:
            InputError: latents of another shape.
        """
        sizes, channels = self.batch.sizes, self.batch.bundle.model.channels
        shape = (channels, sizes.height, sizes.width)
        if latents.ndim != 4 or latents.shape[1:] != shape:
            raise InputError(
                f"latents: expected float32 [N, {', '.join(map(str, shape))}], got "
                f"{latents.dtype} {list(latents.shape)}."
            )
        with self._decoding:
            return self._parts.decoder.images(np.asarray(latents, np.float32), self._tile)

    def warm_up(self, images: int = 1) -> None:
        """Draw so many pictures at once, so that the first real ones are quick; they are counted.

        Raises:
            EngineError: the engine library failed.
        """
        count = whole_number("images", images, 1, self.slots)
        for future in [self.submit("", seed=seed) for seed in range(count)]:
            future.result()

    def counters(self) -> PipelineCounters:
        """What happened so far."""
        batch = self.batch.counters()
        with self._lock:
            return PipelineCounters(
                pending=self._tally.pending,
                **asdict(self._tally),
                decodes_of_images=dict(sorted(self._decodes.items())),
                batch=batch,
            )

    def close(self, drain: bool = True) -> None:
        """Take no more requests, end those that are there, free engines and memory.

        Args:
            drain: finish what was submitted; False cancels it.

        Raises:
            ConfigError: called by a callback, in a thread that it would wait for.
        """
        if os.getpid() != self._process:  # in a forked child: its parent frees them
            return
        if threading.get_ident() in self._own_threads:
            raise ConfigError(
                "close was called from a callback, in a thread that it would wait for. Close the "
                "pipeline from another thread."
            )
        with self._lock:
            self._closing = True
            self._abandoned = self._abandoned or not drain
        self._text.shutdown()
        self.batch.close(drain=drain)
        self._pictures.shutdown()
        self._reports.shutdown()
        self._parts.release()

    def __enter__(self) -> BatchedPipeline:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(drain=kind is None)

    def _start(self, image: Any) -> np.ndarray:
        """A picture to start from, uint8 [1, H, W, 3]."""
        self._parts.require_encoder()
        pictures = as_pictures(image)
        if pictures.shape[:3] != (1, *self.picture_size):
            raise InputError(
                f"image: expected one picture of {list(self.picture_size)} pixels, as the "
                f"pipeline was opened for, got {list(pictures.shape)}. Resize it first."
            )
        return pictures

    def _note_thread(self) -> None:
        self._own_threads.add(threading.get_ident())

    # -- in the thread of texts --------------------------------------------------------------------

    def _encode(self, job: _Job) -> None:
        """Encode a prompt, and hand the request to the batch."""
        job.future.set_running_or_notify_cancel()
        ended = self._ended_early(job)
        if ended is not None:
            self._end(job, ended)
            return
        try:
            job.denoising = self._submit(job)
        except Exception as error:  # of this request alone
            self._end(job, error)
            return
        if job.future.cancel_requested or self._abandoned:  # meanwhile
            job.stop()
        job.denoising.add_done_callback(lambda done: self._denoise_ended(job, done))

    def _submit(self, job: _Job) -> BatchFuture:
        asked, begin = job.asked, time.monotonic()
        guided = guidance_of(asked.guidance_scale, asked.guidance_rescale) is not None
        negatives = None if asked.negative_prompt is None or not guided else [asked.negative_prompt]
        positive, negative = self._parts.encode([asked.prompt], negatives)
        states = [self._parts.prompts.lent(side.states) for side in (positive, negative)]
        conditions = [
            self._parts.conditions(side, asked.sizes, score)
            for side, score in zip((positive, negative), asked.scores, strict=True)
        ]
        latents = (
            None if asked.image is None else self._parts.require_encoder().latents(asked.image)
        )
        now = time.monotonic()
        job.text_ms, job.truncated = 1e3 * (now - begin), positive.late[0]
        return self.batch.submit(
            self.batch.noise([asked.seed]),
            states[0],
            states[1] if guided else None,
            preset=asked.preset,
            conditions=conditions[0],
            negative_conditions=conditions[1] if guided else None,
            guidance_scale=asked.guidance_scale,
            guidance_rescale=asked.guidance_rescale,
            seeds=[asked.seed],
            image_latents=latents,
            start_step=asked.first,
            deadline=None if asked.deadline is None else job.submitted + asked.deadline - now,
            callback=None if job.callback is None else lambda done: self._note_step(job, done),
        )

    # -- in the thread of ticks: only hands over ---------------------------------------------------

    def _note_step(self, job: _Job, progress: BatchProgress) -> None:
        job.progress = progress
        self._reports.submit(self._report, job)

    def _denoise_ended(self, job: _Job, done: Future[BatchedResult]) -> None:
        error = done.exception()
        if error is not None:
            asked_for = isinstance(error, Cancelled | DeadlineError)
            told = self._ended_early(job) if asked_for else None
            self._pictures.submit(self._end, job, told or error)
            return
        job.denoised = done.result()
        with self._lock:
            self._denoised.append(job)
        self._pictures.submit(self._decode_waiting)

    # -- in the thread of reports ------------------------------------------------------------------

    def _report(self, job: _Job) -> None:
        """Tell a request's callback about its last step, unless it has seen it."""
        progress, job.progress = job.progress, None
        if progress is None or job.callback is None or job.future.done():
            return
        try:
            job.callback(progress)
        except Exception as error:  # the caller's own, of this request alone
            job.error = error
            job.stop()

    # -- in the thread of pictures -----------------------------------------------------------------

    def _decode_waiting(self) -> None:
        """Decode what is denoised by now together; others find nothing left to do."""
        with self._lock:
            count = min(len(self._denoised), DECODED_TOGETHER)
            jobs = [self._denoised.popleft() for _ in range(count)]
        ended = [(job, self._ended_early(job)) for job in jobs]
        for job, outcome in ended:
            if outcome is not None:
                self._end(job, outcome)
        ready = [job for job, outcome in ended if outcome is None]
        if ready:
            self._decode(ready)

    def _decode(self, jobs: Sequence[_Job]) -> None:
        begin = time.monotonic()
        latents = [job.denoised.latents for job in jobs if job.denoised is not None]
        try:
            images = self.decode(np.concatenate(latents))
        except Exception as error:  # an engine's failure is of the launch, not of one request
            for job in jobs:
                self._end(job, error)
            return
        now = time.monotonic()
        with self._lock:
            self._decodes[len(jobs)] += 1
        for job, image in zip(jobs, images, strict=True):
            self._end(job, _picture(job, image, decode_ms=1e3 * (now - begin), now=now))

    # -- the end of a request ----------------------------------------------------------------------

    def _ended_early(self, job: _Job) -> Exception | None:
        """Why a request goes no further, if it does not."""
        if job.error is not None:
            return job.error
        if self._abandoned or job.future.cancel_requested:
            return Cancelled("The request was cancelled; others go on.")
        deadline = job.asked.deadline
        if deadline is not None and time.monotonic() > job.submitted + deadline:
            return DeadlineError(
                f"Expected the picture within {deadline:.3g} s, it was not there. Give it more "
                f"time, or open a pipeline with fewer requests waiting."
            )
        return None

    def _end(self, job: _Job, outcome: BatchedPicture | BaseException) -> None:
        """Count a request's end, then tell whoever waits for it."""
        with self._lock:
            tally = self._tally
            tally.end(None if isinstance(outcome, BatchedPicture) else outcome)
            if isinstance(outcome, BatchedPicture):
                tally.text_seconds += outcome.text_ms / 1e3
                tally.waiting_seconds += outcome.waiting_ms / 1e3
                tally.denoising_seconds += outcome.denoising_ms / 1e3
                tally.decode_seconds += outcome.decode_ms / 1e3
        if isinstance(outcome, BatchedPicture):
            job.future.set_result(outcome)
        else:
            job.future.set_exception(outcome)


def _picture(job: _Job, image: np.ndarray, *, decode_ms: float, now: float) -> BatchedPicture:
    """The result of a request whose picture is decoded."""
    done = job.denoised
    assert done is not None
    total = 1e3 * (now - job.submitted)
    return BatchedPicture(
        image=image,
        seed=job.asked.seed,
        latents=done.latents,
        truncated=job.truncated,
        steps=done.steps,
        launches=done.launches,
        text_ms=job.text_ms,
        denoising_ms=done.denoising_ms,
        decode_ms=decode_ms,
        waiting_ms=max(0.0, total - job.text_ms - done.denoising_ms - decode_ms),
    )


def _text(name: str, given: object) -> str:
    """A text; InputError for anything else."""
    if not isinstance(given, str):
        raise InputError(f"{name}: expected a text, got {type(given).__name__}.")
    return given
