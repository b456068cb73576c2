"""One request, checked as a whole before anything runs: shapes, dtypes, the halves of guidance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from blockcache.runtime.arguments import finite_number, whole_number
from blockcache.runtime.devices.device import Guidance, modes_of
from blockcache.runtime.devices.dlpack import Lent
from blockcache.runtime.devices.interop import host_array
from blockcache.runtime.errors import InputError
from blockcache.runtime.plan import (
    IMAGE_LATENTS,
    MOST_SIZE,
    ModelFacts,
    Sizes,
    TensorSpec,
    default_condition,
    default_negative,
)

PROMPT = "encoder_hidden_states"
"""The condition that every model has."""

CLASSES = "class_labels"
"""The condition that may be the number of a class."""


Condition: TypeAlias = "np.ndarray | tuple[np.ndarray | Lent, ...]"
"""[batch, ...], the unconditional half first; or the halves (thirds with guidance by an image), [N
or 1, ...] each, where one of them lies on the session's GPU."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What one call of ``Session.denoise`` asks for; ``checked_request`` makes it."""

    sizes: Sizes
    images: int  # N
    steps: range  # those to execute
    guidance: Guidance | None
    noise: np.ndarray  # float32 [N, C, H, W]; the latents, where a run is continued
    seeds: np.ndarray | None  # uint64 [N], of the noise that a solver adds at every step
    image_latents: np.ndarray | None  # float32 [N, C, H, W], where an image is continued
    continues: bool  # from the latents of a run that ended at ``first``
    conditions: Mapping[str, Condition]  # by name
    check_finite: bool

    @property
    def first(self) -> int:
        """The first step to execute."""
        return self.steps.start


def checked_request(
    model: ModelFacts,
    steps: int,
    *,
    noise: Any,
    positive: Mapping[str, Any],
    negative: Mapping[str, Any],
    guidance: Guidance | None,
    seeds: Any = None,
    needs_seeds: bool = False,
    image_latents: Any = None,
    latents: Any = None,
    start_step: int = 0,
    end_step: int | None = None,
    check_finite: bool = False,
) -> Request:
    """The request that these arguments make; they are those of ``Session.denoise``.

    Args:
        model: what the bundle was compiled from.
        steps: S of the preset.
        noise: float32 [N, C, H, W]; None where there are ``latents``.
        positive: the conditions by name, the prompt among them.
        negative: the same for the unconditional half; not read without guidance.
        guidance: of ``guidance_of``.
        seeds: one an image, of the noise that a solver adds at every step.
        needs_seeds: whether the preset's solver adds any.
        image_latents: float32 [N, C, H, W]; None starts from noise alone.
        latents: float32 [N, C, H, W] of a run that ended at ``start_step``.
        start_step: the first step to execute.
        end_step: the first step that is not executed; None: all are.
        check_finite: refuse NaN and infinity in every tensor.

    Raises:
        InputError: the first argument that does not fit, by name.
    """
    first = whole_number("start_step", start_step, 0, steps - 1)
    end = steps if end_step is None else whole_number("end_step", end_step, first + 1, steps)
    check = _Check(check_finite)
    noise, image_latents, latents = map(host_array, (noise, image_latents, latents))
    if latents is not None:
        _require_alone(noise, image_latents)
        noise = latents
    named = "noise" if latents is None else "latents"
    shape = _noise_shape(model, named, check.numbers(named, noise))
    if image_latents is not None:
        check.tensor("image_latents", image_latents, shape)
    elif first and latents is None:
        raise InputError(
            f"start_step={first} continues from an image or a run: expected image_latents or "
            f"latents, got none. Give them, or start at step 0."
        )
    positive = {name: host_array(values) for name, values in positive.items()}
    negative = {name: host_array(values) for name, values in negative.items()}
    _refuse_unknown(model, (*positive, *negative))
    _require_guidance(model, guidance)
    sizes = replace(
        model.sizes,
        batch=shape[0] * modes_of(guidance)[0],
        height=shape[2],
        width=shape[3],
        tokens=_tokens(model, positive[PROMPT]),
    )
    conditions: dict[str, Condition] = {}
    for spec in model.conditions:
        half = _half(check, spec, sizes, shape[0], positive, "")
        if guidance is None:
            conditions[spec.name] = _joined(model, spec, [half])
            continue
        given = _default_negative(spec, half, guidance)
        defaults = {} if given is None else {spec.name: given}
        other = _half(check, spec, sizes, shape[0], {**defaults, **negative}, "negative ")
        between = [half if spec.name == IMAGE_LATENTS else other] * (guidance.rows - 2)
        conditions[spec.name] = _joined(model, spec, [other, *between, half])
    return Request(
        sizes=sizes,
        images=shape[0],
        steps=range(first, end),
        guidance=guidance,
        noise=noise,
        seeds=_step_seeds(seeds, shape[0], needed=needs_seeds),
        image_latents=image_latents,
        continues=latents is not None,
        conditions=conditions,
        check_finite=check_finite,
    )


def checked_conditions(
    model: ModelFacts,
    conditions: Mapping[str, Any],
    *,
    batch: object = None,
    height: object = None,
    width: object = None,
    check_finite: bool = False,
) -> tuple[Sizes, dict[str, Condition]]:
    """The conditions of a batch that the caller laid out; arguments are those of ``Session.begin``.

    Returns:
        The request's sizes, and a copy of the conditions by name, [batch, ...].

    Raises:
        InputError: the first argument that does not fit, by name.
    """
    given = {name: host_array(values) for name, values in conditions.items()}
    _refuse_unknown(model, tuple(given))
    prompt, usual = given[PROMPT], model.sizes
    is_prompt = isinstance(prompt, np.ndarray | Lent) and len(prompt.shape) == 3
    rows = prompt.shape[0] if batch is None and is_prompt and prompt.shape[0] else batch
    sizes = Sizes(
        batch=whole_number("batch", 1 if rows is None else rows, 1, MOST_SIZE),
        height=whole_number("height", usual.height if height is None else height, 1, MOST_SIZE),
        width=whole_number("width", usual.width if width is None else width, 1, MOST_SIZE),
        tokens=_tokens(model, prompt),
    )
    _require_factor(model, "height and width", sizes.height, sizes.width)
    check = _Check(check_finite)
    checked = {
        spec.name: _joined(model, spec, [_half(check, spec, sizes, sizes.batch, given, "")])
        for spec in model.conditions
    }
    return sizes, checked


def starting_noise(
    model: ModelFacts, seeds: Any, height: int | None = None, width: int | None = None
) -> np.ndarray:
    """Standard normal noise float32 [N, C, H, W], one generator a seed.

    Raises:
        InputError: no seeds, or a number that is not whole or too small.
    """
    if isinstance(seeds, str) or not isinstance(seeds, Iterable):
        raise InputError(f"seeds: expected a list of whole numbers, got {seeds!r}.")
    shape = (
        model.channels,
        model.sizes.height if height is None else whole_number("height", height, 1, MOST_SIZE),
        model.sizes.width if width is None else whole_number("width", width, 1, MOST_SIZE),
    )
    images = [
        np.random.Generator(np.random.PCG64(whole_number("seeds", seed, 0))).standard_normal(
            shape, np.float32
        )
        for seed in seeds
    ]
    if not images:
        raise InputError("seeds: expected one for each image, got an empty list.")
    return np.stack(images)


def guidance_of(scale: object, rescale: object, image_scale: object = 1.0) -> Guidance | None:
    """Classifier-free guidance, or None where it is off: at a scale of 1 or less, as in diffusers.

    Raises:
        InputError: one of them is no finite number or out of range.
    """
    guidance = Guidance(
        finite_number("guidance_scale", scale),
        finite_number("guidance_rescale", rescale),
        finite_number("image_guidance_scale", image_scale),
    )
    return guidance if guidance.scale > 1 else None


def check_finite_values(name: str, values: np.ndarray) -> None:
    """Raise InputError where there is NaN or infinity."""
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise InputError(
            f"{name}: expected finite numbers, got NaN or infinity in {bad} of {values.size}."
        )


@dataclass(frozen=True)
class _Check:
    finite: bool

    def tensor(
        self, name: str, values: Any, shape: Sequence[int], dtype: str = "float32"
    ) -> np.ndarray:
        """The values, or InputError where shape, dtype or (if asked for) contents are wrong."""
        if isinstance(values, Lent):
            raise InputError(f"{name}: expected shape {list(shape)}, got {list(values.shape)}.")
        array = self.numbers(name, values, dtype)
        if array.shape != tuple(shape):
            raise InputError(f"{name}: expected shape {list(shape)}, got {list(array.shape)}.")
        return array

    def numbers(self, name: str, values: Any, dtype: str = "float32") -> np.ndarray:
        """The values, or InputError where dtype or (if asked for) contents are wrong."""
        wanted = np.dtype(np.int64 if dtype == "int64" else np.float32)
        if not isinstance(values, np.ndarray) or values.dtype != wanted:
            got = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
            raise InputError(
                f"{name}: expected a numpy array of {wanted}, got {got}. "
                f"Convert it with .astype(np.{wanted})."
            )
        if self.finite:
            check_finite_values(name, values)
        return values


def _require_alone(noise: Any, image_latents: Any) -> None:
    """Latents of another run are all that a run begins with."""
    for name, values in (("noise", noise), ("image_latents", image_latents)):
        if values is not None:
            raise InputError(
                f"{name}: expected none beside latents, which are taken as the run before left "
                f"them. Leave one of them out."
            )


def _noise_shape(model: ModelFacts, name: str, noise: np.ndarray) -> tuple[int, int, int, int]:
    """[N, C, H, W] of the noise, where the model can draw it."""
    shape = noise.shape
    if len(shape) != 4 or shape[1] != model.channels or 0 in shape:
        raise InputError(
            f"{name}: expected [N, {model.channels}, height, width], got {list(shape)}. "
            f"session.noise(seeds) makes it."
        )
    _require_factor(model, name, shape[2], shape[3])
    return shape[0], shape[1], shape[2], shape[3]


def _step_seeds(seeds: Any, images: int, *, needed: bool) -> np.ndarray | None:
    """uint64 [N]: what the noise of each image's steps is made from."""
    if seeds is None and not needed:
        return None
    listed = list(seeds) if isinstance(seeds, Iterable) and not isinstance(seeds, str) else None
    if listed is None or len(listed) != images:
        got = repr(seeds) if listed is None else str(len(listed))
        raise InputError(
            f"seeds: expected {images} whole numbers, one an image, got {got}. The preset's solver "
            f"adds fresh noise at every step: pass the seeds that session.noise was given."
            if needed
            else f"seeds: expected {images} whole numbers, one an image, got {got}."
        )
    return np.array([whole_number("seeds", seed, 0, 2**64 - 1) for seed in listed], np.uint64)


def _require_factor(model: ModelFacts, name: str, height: int, width: int) -> None:
    """Refuse latent sizes that the graphs cannot halve as often as they do."""
    factor = model.downsampling
    if height % factor or width % factor:
        raise InputError(
            f"{name}: expected a latent height and width divisible by {factor}, got {height} x "
            f"{width}. The bundle's graphs halve and double sizes exactly, where diffusers rounds "
            f"up. Take {_next(height, factor)} x {_next(width, factor)} and crop the picture."
        )


def _next(size: int, factor: int) -> int:
    """The smallest multiple of ``factor`` that holds ``size``."""
    return -(-size // factor) * factor


def _refuse_unknown(model: ModelFacts, names: Sequence[str]) -> None:
    known = [spec.name for spec in model.conditions]
    for name in names:
        if name not in known:
            raise InputError(
                f"{name}: this model takes the conditions {known} and no other. ControlNet "
                f"residuals and adapters are not supported."
            )


def _tokens(model: ModelFacts, prompt: Any) -> int:
    """The prompt's length; the model's own where the prompt has a shape that is refused later."""
    fits = isinstance(prompt, np.ndarray | Lent) and len(prompt.shape) == 3 and prompt.shape[1]
    return int(prompt.shape[1]) if fits else model.sizes.tokens


def _require_classes(model: ModelFacts, labels: np.ndarray) -> None:
    """Refuse numbers of no class: an engine takes -1 for the last one."""
    if labels.min() < 0 or labels.max() >= model.classes:
        raise InputError(
            f"{CLASSES}: expected numbers of 0 to {model.classes - 1}, the classes of "
            f"{model.name!r}, got {labels.min()} to {labels.max()}."
        )


def _require_guidance(model: ModelFacts, guidance: Guidance | None) -> None:
    """Refuse guidance by an image where the model reads none."""
    if guidance is not None and guidance.rows > model.most_rows:
        raise InputError(
            f"image_guidance_scale: expected 1, as {model.name!r} has no {IMAGE_LATENTS} to guide "
            f"by, got {guidance.image_scale}. It is for InstructPix2Pix; leave it out."
        )


def _default_negative(
    spec: TensorSpec, values: np.ndarray | Lent, guidance: Guidance
) -> np.ndarray | Lent | None:
    """``default_negative``, also of what is lent, which is a prompt's or a picture.

    Where guidance weighs the image by itself, what is unconditional has none: zeros.
    """
    if spec.name == IMAGE_LATENTS and guidance.rows == 3:
        return np.zeros(values.shape, np.float32)
    if isinstance(values, Lent):
        return values if len(values.shape) == 4 else None
    return default_negative(spec.name, values)


def _joined(model: ModelFacts, spec: TensorSpec, halves: Sequence[np.ndarray | Lent]) -> Condition:
    """A condition of its halves; a copy of what is numpy's."""
    arrays = [half for half in halves if isinstance(half, np.ndarray)]
    if len(arrays) < len(halves):
        return tuple(halves)
    joined = np.concatenate(arrays)
    if spec.name == CLASSES and spec.dtype == "int64":
        _require_classes(model, joined)
    return joined


def _half(
    check: _Check,
    spec: TensorSpec,
    sizes: Sizes,
    images: int,
    given: Mapping[str, Any],
    side: str,
) -> np.ndarray | Lent:
    """One half of a condition, [N, ...]; a single image's value serves all."""
    values = given.get(spec.name)
    if values is None:
        values = default_condition(spec.name)
    if values is None:
        if side:
            raise InputError(
                f"{side}{spec.name}: expected a tensor, got none. Give it, or set "
                f"guidance_scale=1 to run without guidance."
            )
        raise InputError(
            f"{spec.name}: expected a tensor as prompt_embeds, got none."
            if spec.name == PROMPT
            else f"{spec.name}: this model needs it in conditions={{...}}, got none."
        )
    shape = spec.shape(replace(sizes, batch=images))
    if isinstance(values, Lent) and values.shape in (tuple(shape), (1, *shape[1:])):
        return values
    if isinstance(values, np.ndarray) and values.shape == (1, *shape[1:]):
        values = np.broadcast_to(values, shape)
    return check.tensor(side + spec.name, values, shape, spec.dtype)
