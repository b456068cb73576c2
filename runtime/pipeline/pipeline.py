"""The pipeline: prompts in, pictures out, without torch.

::

    with Pipeline.open("bundle") as pipeline:
        drawn = pipeline(["a red bicycle"], seeds=[0, 1])
        drawn.images                    # uint8 [2, H, W, 3]
        drawn.summary()                 # what ran and how long

It needs numpy, safetensors, tokenizers and one engine library.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from blockcache.runtime.arguments import finite_number
from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.devices.tensor import Tensor
from blockcache.runtime.errors import Cancelled, ConfigError, InputError
from blockcache.runtime.loop import Progress
from blockcache.runtime.pipeline.control_arguments import ControlArguments
from blockcache.runtime.pipeline.parts import CONTROL, PipelineParts, bound_parts, require_served
from blockcache.runtime.pipeline.picture_arguments import (
    Size,
    common_count,
    first_step,
    latent_size,
    micro_sizes,
    random_seeds,
    texts_of,
    tile_side,
    whole_seeds,
)
from blockcache.runtime.pipeline.picture_conditions import (
    DEPTH,
    EDIT,
    INPAINT,
    SERVED,
    UPSCALE,
    GivenPictures,
    as_depths,
    as_masks,
    picture_conditions,
    require_pictures,
    upscale_conditions,
)
from blockcache.runtime.pipeline.pictures import as_pictures
from blockcache.runtime.pipeline.prompts import Encoded
from blockcache.runtime.record import RunRecord
from blockcache.runtime.session import Session
from blockcache.runtime.weights import BASE, changed_parts

USUAL_NOISE = 20
"""The ``noise_level`` of an upscaler, where none is given."""


@dataclass(frozen=True)
class Drawn:
    """Pictures, and how they came about."""

    images: np.ndarray  # uint8 [N, H, W, 3]; none where ``denoising_end`` ended the run early
    seeds: tuple[int, ...]  # one an image
    latents: np.ndarray  # float32 [N, C, h, w]
    record: RunRecord  # of the denoising
    text_ms: float
    decode_ms: float
    truncated: tuple[str, ...]  # per prompt what did not fit, "" where all did

    def summary(self) -> dict[str, float | int]:
        """The figures people ask for first."""
        times = {"text_ms": round(self.text_ms, 3), "decode_ms": round(self.decode_ms, 3)}
        return {**self.record.summary(), **times}


class Pipeline:
    """A session with the text encoders and the autoencoder of its model.

    Thread-safe: calls wait for each other. For several at a time open one pipeline each; engines
    are shared. A pipeline belongs to the process that opened it, as a ``Session`` does.
    """

    def __init__(self, session: Session) -> None:
        require_served(session.bundle, CONTROL, SERVED)
        self.session = session
        self._parts = PipelineParts.load(session.backend, session.bundle)
        self._lock = threading.RLock()

    @classmethod
    def open(
        cls,
        bundle: Bundle | str | Path,
        *,
        preset: str | None = None,
        verify: bool = True,
        **options: Any,
    ) -> Pipeline:
        """Open a bundle with its text encoders and autoencoder.

        Args:
            bundle: A folder that ``blockcache compile`` wrote, or an opened Bundle.
            preset: One of the bundle's presets; default the recommended one.
            verify: Check the sha256 of every file first.
            options: Whatever else ``Session.open`` takes: backend, threads, device, ...

        Raises:
            ConfigError: the bundle holds the U-Net alone, or one that takes more than a prompt.
            MissingExtraError: tokenizers or the engine library is not installed.
            BundleError, EngineError: see ``Session.open``.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify=verify)
        require_served(opened, CONTROL, SERVED)  # before engines are loaded
        session = Session.open(opened, preset=preset, verify=verify, **options)
        try:
            return cls(session)
        except BaseException:
            session.close()
            raise

    def __call__(
        self,
        prompts: str | Sequence[str],
        negative_prompts: str | Sequence[str] | None = None,
        *,
        seeds: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        image_guidance_scale: float | None = None,
        noise_level: int | None = None,
        height: int | None = None,
        width: int | None = None,
        image: Any = None,
        mask_image: Any = None,
        depth_map: np.ndarray | None = None,
        strength: float | None = None,
        latents: np.ndarray | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        control_image: Any = None,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        long_prompts: bool = False,
        tile: int | None = None,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
        callback: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Drawn:
        """Draw N pictures; N is the number of prompts or of seeds, whichever is more than one.

        Args:
            prompts: one, or N.
            negative_prompts: one, or N; used with guidance only.
            seeds: whole numbers, one a picture; default random ones, told in the result.
            guidance_scale: default the preset's. 1 or less turns guidance off, as in diffusers.
            guidance_rescale: 0 (off) to 1, as in diffusers.
            height: of the pictures, in pixels; default the model's, or what ``image`` leads to.
            width: the same.
            image_guidance_scale: InstructPix2Pix: how far to follow ``image``, 1 (off) or more;
                default 1.5, as in diffusers.
            noise_level: upscalers: how much ``image`` is noised first; default 20, as in diffusers.
            image: uint8 [N or 1, H, W, 3], or RGB pictures of Pillow: to start from, to inpaint,
                what InstructPix2Pix edits, or what the x4 upscaler enlarges.
            mask_image: inpainting: what is drawn anew, bool, uint8 or float32 [N or 1, H, W] (0.5
                or more), or pictures of Pillow; as large as ``image``.
            depth_map: depth2img: float32 [N or 1, h, w], of the latents' size; near is large.
            strength: how much of ``image`` is drawn anew, above 0 to 1; default 0.8, of inpainting
                1. Not for InstructPix2Pix and upscalers.
            latents: float32 [N, C, h, w] to go on from at ``denoising_start``.
            denoising_start: where a run goes on that ended there, as a share of the noise schedule:
                SDXL's refiner, given the base's latents.
            denoising_end: where to end early. No pictures are made of latents that are noisy yet:
                ``images`` is empty, ``latents`` are for the refiner.
            control_image: pictures like ``image``, for the bundle's ControlNet; for several a list
                with those of each. Their size is that of the pictures to draw.
            controlnet_conditioning_scale: how strongly it acts, as in diffusers; for several
                ControlNets one number or one each, as for the next two.
            control_guidance_start: the share of the steps before it acts.
            control_guidance_end: the share of the steps up to which it acts.
            long_prompts: encode what is longer than the text encoder's length in chunks; else it
                falls away with a warning, as in diffusers.
            tile: decode in tiles of so many pixels a side: less memory, and slightly other pixels.
            original_size: SDXL: (height, width) in pixels; default the pictures'.
            crops_coords_top_left: SDXL: (top, left).
            target_size: SDXL: (height, width) in pixels; default the pictures'.
            aesthetic_score: SDXL's refiner.
            negative_aesthetic_score: SDXL's refiner.
            callback: called after each step with a Progress; it may edit the latents in place.
            cancelled: asked before each step and each picture; True raises Cancelled.

        Raises:
            InputError: an argument of another type, size or range.
            ConfigError: ``image``, and the bundle has no encoder; a closed pipeline.
            Cancelled: ``cancelled()`` was true.
            EngineError: the engine library failed.
        """
        texts = texts_of("prompts", prompts)
        others = (
            None if negative_prompts is None else texts_of("negative_prompts", negative_prompts)
        )
        model = self.session.bundle.model
        pictures = GivenPictures(
            None if image is None else as_pictures(image),
            None if mask_image is None else as_masks(mask_image),
            None if depth_map is None else as_depths(depth_map),
        )
        require_pictures(model, pictures)
        first = self._first(pictures, strength, latents, denoising_start)
        last = None if denoising_end is None else self.session.step_at(denoising_end)
        counts = {"prompts": len(texts), "negative_prompts": len(others or [""])}
        given = None if seeds is None else whole_seeds(seeds)
        counts |= {"seeds": 1 if given is None else len(given)}
        counts |= pictures.counts()
        control = ControlArguments.of(
            model,
            control_image,
            controlnet_conditioning_scale,
            control_guidance_start,
            control_guidance_end,
        )
        sized = self._pixels_of(pictures.image, control)
        if latents is not None:
            counts["latents"] = len(latents)
            height, width = (side * self.factor for side in latents.shape[2:])
        count = common_count({**counts, **control.counts})
        height, width = self._latent_size(sized, height, width)
        side = None if tile is None else tile_side(self.factor, tile)
        scale = self.session.preset.guidance_scale if guidance_scale is None else guidance_scale
        guided = finite_number("guidance_scale", scale) > 1
        chosen = random_seeds(count) if given is None else given
        if len(chosen) != count:
            raise InputError(f"seeds: expected one a picture, {count}, got 1. Pass as many.")
        pixels = (height * self.factor, width * self.factor)
        controls = control.conditions(self.session, first)
        with self._held():
            begin = time.perf_counter()
            positive, negative = self._prompts(texts, others if guided else None, long_prompts)
            states = [self._parts.prompts.lent(side.states) for side in (positive, negative)]
            text_ms = (time.perf_counter() - begin) * 1e3
            sizes = micro_sizes(pixels, original_size, crops_coords_top_left, target_size)
            read = self._read(pictures, chosen, noise_level, (height, width))
            result = self.session.denoise(
                self.session.noise(chosen, height, width) if latents is None else None,
                states[0],
                states[1] if guided else None,
                conditions={
                    **self._parts.conditions(positive, sizes, aesthetic_score),
                    **controls,
                    **read,
                },
                negative_conditions=self._parts.conditions(
                    negative, sizes, negative_aesthetic_score
                )
                if guided
                else None,
                seeds=chosen,
                guidance_scale=scale,
                guidance_rescale=guidance_rescale,
                image_guidance_scale=self._image_scale(image_guidance_scale),
                image_latents=self._start(pictures.image, count)
                if pictures.image is not None and (first or model.extra_inputs in ((), DEPTH))
                else None,
                latents=latents,
                start_step=first,
                end_step=last,
                callback=callback,
                cancelled=cancelled,
            )
            begin = time.perf_counter()
            view = result.device_latents
            final = result.latents if view is None else view.tensor  # nobody else draws now
            if last is None:
                drawn = self._decode(final, side, cancelled)
            else:
                drawn = np.zeros((0, *pixels, 3), np.uint8)
            decode_ms = (time.perf_counter() - begin) * 1e3
        return Drawn(
            drawn, chosen, result.latents, result.record, text_ms, decode_ms, positive.late
        )

    @property
    def factor(self) -> int:
        """Pixels a latent, along a side."""
        return self._parts.decoder.factor

    def encode_prompt(self, prompts: str | Sequence[str]) -> np.ndarray:
        """What the U-Net attends to, float32 [N, tokens, D], as ``Session.denoise`` takes it.

        Raises:
            InputError: neither a text nor a list of texts.
        """
        texts = texts_of("prompts", prompts)
        with self._held():
            states = self._parts.prompts(texts).states
            return self.session.backend.device.download(states).astype(np.float32, copy=False)

    def decode(self, latents: np.ndarray, *, tile: int | None = None) -> np.ndarray:
        """Pictures uint8 [N, H, W, 3] of latents float32 [N, C, h, w]; for previews in a callback.

        Raises:
            InputError: latents of another shape.
        """
        channels = self.session.bundle.model.channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise InputError(
                f"latents: expected float32 [N, {channels}, h, w], got {latents.dtype} "
                f"{list(latents.shape)}."
            )
        side = None if tile is None else tile_side(self.factor, tile)
        with self._held():
            return self._decode(np.asarray(latents, np.float32), side, None)

    def warm_up(
        self,
        images: int = 1,
        height: int | None = None,
        width: int | None = None,
        *,
        guided: bool | None = None,
    ) -> None:
        """Run everything once, so that the first real request of this shape is quick.

        Args:
            images: N of the requests to come.
            height: of the pictures, in pixels; default the model's.
            width: of the pictures, in pixels; default the model's.
            guided: with or without guidance; default as the preset has it.
        """
        high, wide = self._latent_size(None, height, width)
        with self._held():
            self._parts.prompts([""])
            self.session.warm_up(images, high, wide, guided=guided)
            channels = self.session.bundle.model.channels
            self._decode(np.zeros((1, channels, high, wide), np.float32), None, None)

    def swap_weights(
        self,
        bundle: Bundle | str | Path | None = None,
        name: str | None = None,
        *,
        keep_bytes: int = 0,
        verify: bool = True,
    ) -> str:
        """Draw all pictures to come with other weights, those of text encoders and decoder too.

        Pictures in the making are finished on the old ones. Arguments, result and errors are those
        of ``Session.swap_weights``; ``keep_bytes`` counts the U-Net's alone. Parts are loaded
        anew at each swap, but for those that are the same in both bundles.

        Raises:
            ConfigError: also where the parts differ in more than weights.
        """
        session = self.session
        chosen = name if bundle is None else session.load_weights(bundle, name, verify=verify)
        goal = session.bundle_of(chosen)
        before = session.bundle
        changed = changed_parts(before, goal)
        fresh = bound_parts(session.backend, goal, changed, plans=session.bundle_of(BASE))
        with self._lock:
            if session.bundle is not before:
                raise ConfigError(
                    "swap_weights was called by two threads of one pipeline. Call it again."
                )
            chosen = session.swap_weights(name=chosen, keep_bytes=keep_bytes, verify=verify)
            old = self._parts.bound  # texts that were encoded before are forgotten
            self._parts = PipelineParts(session.bundle, {**old, **fresh})
            for name in fresh:
                old[name].release()
        return chosen

    def close(self) -> None:
        """Free engines and memory; closing twice is fine."""
        with self._lock:
            self.session.close()
            self._parts.release()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """An open pipeline, and on a GPU the stream: nothing else runs on the session meanwhile."""
        with self._lock:
            self.session.check_open()
            with self.session.backend.device.session_lock():
                yield

    def _first(
        self,
        pictures: GivenPictures,
        strength: float | None,
        latents: np.ndarray | None,
        denoising_start: float | None,
    ) -> int:
        """The first step of a request."""
        if (latents is None) != (denoising_start is None):
            raise InputError(
                "Expected latents and denoising_start together, got one of them: a run goes on "
                "from the latents of another one."
            )
        if latents is not None and denoising_start is not None:
            model = self.session.bundle.model
            if not isinstance(latents, np.ndarray) or latents.ndim != 4:
                raise InputError(
                    f"latents: expected float32 [N, {model.channels}, h, w], got "
                    f"{type(latents).__name__}."
                )
            return self.session.step_at(denoising_start)
        extra = self.session.bundle.model.extra_inputs
        unstarted = pictures.image is None or extra in (EDIT, UPSCALE)
        if strength is not None and unstarted:
            raise InputError(
                f"strength: nothing starts from an image here, got {strength}. Leave it out."
            )
        if unstarted:
            return 0
        usual = 1.0 if extra == INPAINT else 0.8
        return first_step(self.session.steps, usual if strength is None else strength)

    def _pixels_of(self, image: np.ndarray | None, control: ControlArguments) -> Size | None:
        """Height and width of the pictures to draw, where pictures that are given say so."""
        given = next((p for p in (image, *control.pictures) if p is not None), None)
        if given is None:
            return None
        upscales = image is not None and self.session.bundle.model.extra_inputs == UPSCALE
        factor = self.factor if upscales else 1
        return given.shape[1] * factor, given.shape[2] * factor

    def _read(
        self, pictures: GivenPictures, seeds: Sequence[int], noise_level: int | None, size: Size
    ) -> Mapping[str, np.ndarray]:
        """What the U-Net reads beside the sample, and what belongs to it."""
        model = self.session.bundle.model
        if model.extra_inputs == UPSCALE:
            assert pictures.image is not None
            level = USUAL_NOISE if noise_level is None else noise_level
            levels = self._parts.require_noise_levels()
            return upscale_conditions(pictures.image, seeds, level, levels)
        if noise_level is not None:
            raise InputError(
                f"noise_level: {model.name!r} enlarges no picture, got {noise_level}. Leave it out."
            )
        return picture_conditions(model, self._parts.require_encoder, pictures, size)

    def _image_scale(self, scale: float | None) -> float:
        """InstructPix2Pix's second scale; others have none."""
        edits = self.session.bundle.model.extra_inputs == EDIT
        usual = 1.5 if edits else 1.0
        return usual if scale is None else scale

    def _latent_size(self, given: Size | None, height: int | None, width: int | None) -> Size:
        return latent_size(self.session.bundle.model, self.factor, given, height, width)

    def _prompts(
        self, texts: list[str], negatives: list[str] | None, long_prompts: bool
    ) -> tuple[Encoded, Encoded]:
        """Both halves of guidance's batch; warns of prompts that are too long."""
        every = [*texts, *(negatives or [""])]
        chunks = self._parts.prompts.chunks(every) if long_prompts else 1
        positive, negative = self._parts.encode(texts, negatives, chunks=chunks)
        for text in filter(None, positive.late):
            warnings.warn(
                f"The end of a prompt was cut off, the text encoder does not take it: {text!r}. "
                f"Shorten the prompt, or pass long_prompts=True.",
                stacklevel=3,
            )
        return positive, negative

    def _start(self, images: np.ndarray, count: int) -> np.ndarray:
        """Latents to start from, [count, C, h, w]."""
        latents = self._parts.require_encoder().latents(images)
        return np.repeat(latents, count, axis=0) if len(latents) < count else latents

    def _decode(
        self, latents: np.ndarray | Tensor, tile: int | None, cancelled: Callable[[], bool] | None
    ) -> np.ndarray:
        pictures = []
        for place in range(latents.shape[0]):
            if cancelled is not None and cancelled():
                raise Cancelled("The request was cancelled while its pictures were decoded.")
            image = (
                latents.along(place, 1)
                if isinstance(latents, Tensor)
                else latents[place : place + 1]
            )
            pictures.append(self._parts.decoder.images(image, tile))
        return np.concatenate(pictures)
