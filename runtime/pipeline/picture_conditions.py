"""Pictures that a U-Net reads beside the sample, made of what diffusers' pipelines are given.

=======================  ============================  =============================================
the U-Net reads          what is given                 what is made of it
=======================  ============================  =============================================
``mask``,                ``image``, ``mask_image``     the mask, every so many pixels; the image
``masked_image_latents``                               encoded, grey where it is drawn anew
``image_latents``        ``image``                     encoded, not scaled (the bundle's encoder)
``depth_mask``           ``depth_map``                 brought to -1..1
``image``                ``image``, ``noise_level``    the image with noise of the seeds; beside it
                                                       ``class_labels``, the level
=======================  ============================  =============================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from blockcache.runtime.arguments import whole_number
from blockcache.runtime.errors import InputError
from blockcache.runtime.pipeline.pictures import PictureEncoder
from blockcache.runtime.plan import ModelFacts
from blockcache.runtime.request import CLASSES
from blockcache.runtime.solvers.philox import standard_normal

INPAINT, EDIT, DEPTH = ("mask", "masked_image_latents"), ("image_latents",), ("depth_mask",)
UPSCALE = ("image",)
SERVED = {(): (), INPAINT: INPAINT, EDIT: EDIT, DEPTH: DEPTH, UPSCALE: (*UPSCALE, CLASSES)}
"""Extra inputs of a U-Net that a pipeline makes, and the conditions that are made with them."""

NOISE_STEP = 2**32 - 1
"""In the place of a step's number, where an upscaler's small picture gets its noise."""

_TAKES = {
    (): {"image"},
    INPAINT: {"image", "mask_image"},
    EDIT: {"image"},
    DEPTH: {"image", "depth_map"},
    UPSCALE: {"image"},
}
_NEEDS = {
    (): set[str](),
    INPAINT: {"image", "mask_image"},
    EDIT: {"image"},
    DEPTH: {"depth_map"},
    UPSCALE: {"image"},
}


@dataclass(frozen=True, eq=False)
class GivenPictures:
    """What a request brings, checked."""

    image: np.ndarray | None = None  # uint8 [N or 1, H, W, 3]
    mask_image: np.ndarray | None = None  # bool [N or 1, H, W]: what is drawn anew
    depth_map: np.ndarray | None = None  # float32 [N or 1, h, w]

    def counts(self) -> dict[str, int]:
        """How many there are of each, by argument."""
        return {n: 1 if v is None else len(v) for n, v in vars(self).items()}


def require_pictures(model: ModelFacts, given: GivenPictures) -> None:
    """Raise InputError where the model needs a picture that is not there, or reads none such."""
    names = {name for name, values in vars(given).items() if values is not None}
    takes, needs = _TAKES[model.extra_inputs], _NEEDS[model.extra_inputs]
    for name in sorted(names - takes):
        raise InputError(
            f"{name}: {model.name!r} reads no such picture. Leave it out; what it takes is "
            f"{', '.join(sorted(takes))}."
        )
    for name in sorted(needs - names):
        raise InputError(f"{name}: {model.name!r} draws by it, got none. Pass {name}=...")
    if given.image is None or given.mask_image is None:
        return
    if given.mask_image.shape[1:] != given.image.shape[1:3]:
        raise InputError(
            f"mask_image: expected the image's size {list(given.image.shape[1:3])}, got "
            f"{list(given.mask_image.shape[1:])}. Resize it first."
        )


def picture_conditions(
    model: ModelFacts,
    encoder: Callable[[], PictureEncoder],
    given: GivenPictures,
    size: tuple[int, int],
) -> Mapping[str, np.ndarray]:
    """The U-Net's extra inputs by name, float32 [N or 1, C, h, w].

    Args:
        model: of which ``require_pictures`` has seen what is given.
        encoder: gives the bundle's encoder; asked where a picture is encoded.
        given: the request's pictures.
        size: of the latents.

    Raises:
        ConfigError: the bundle has no encoder.
        InputError: a depth map of another size than the latents, or without depth.
    """
    if model.extra_inputs == DEPTH:
        assert given.depth_map is not None
        return {"depth_mask": _depth_mask(given.depth_map, size)}
    if model.extra_inputs == EDIT:
        assert given.image is not None
        return {"image_latents": encoder().latents(given.image)}
    if model.extra_inputs == INPAINT:
        assert given.image is not None
        assert given.mask_image is not None
        every = given.mask_image.shape[1] // size[0]
        return {
            "mask": given.mask_image[:, None, ::every, ::every].astype(np.float32),
            "masked_image_latents": encoder().latents(given.image, kept=~given.mask_image),
        }
    return {}


def upscale_conditions(
    images: np.ndarray, seeds: Sequence[int], level: int, levels: Sequence[float]
) -> Mapping[str, np.ndarray]:
    """What an upscaler reads beside the sample: its small picture noised, and how much.

    Args:
        images: uint8 [N or 1, h, w, 3], of the latents' size.
        seeds: N, of the noise.
        level: an index of ``levels``.
        levels: of ``PipelineFacts``.

    Returns:
        By name: ``image`` float32 [N, 3, h, w], ``class_labels`` int64 [1].

    Raises:
        InputError: a level that is none of ``levels``.
    """
    level = whole_number("noise_level", level, 0, len(levels) - 1)
    signed = images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    _, channels, height, width = signed.shape
    made = standard_normal(np.array(seeds, np.uint64), NOISE_STEP, channels * height * width)
    noise = made.reshape(len(seeds), channels, height, width)
    kept, added = (np.float32(share**0.5) for share in (levels[level], 1 - levels[level]))
    return {"image": kept * signed + added * noise, CLASSES: np.array([level], np.int64)}


def _depth_mask(depths: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[N, 1, h, w] in -1..1, each by its own least and most."""
    if depths.shape[1:] != size:
        raise InputError(
            f"depth_map: expected the latents' size {list(size)}, got {list(depths.shape[1:])}. "
            f"Resize it first (diffusers does so, bicubically)."
        )
    least, most = (bound(depths, axis=(1, 2), keepdims=True) for bound in (np.min, np.max))
    if not (most > least).all():
        raise InputError("depth_map: expected depths that differ, got a map of one number.")
    scaled: np.ndarray = 2 * (depths - least) / (most - least) - 1
    return scaled[:, None].astype(np.float32)


def as_masks(mask: object) -> np.ndarray:
    """One mask or several as bool [N, H, W]: True where 0.5 (128 of 255) or more.

    Raises:
        InputError: neither pictures of Pillow nor arrays [H, W] or [N, H, W] of bool, uint8 or
            float32 in 0..1.
    """
    several = isinstance(mask, list | tuple)
    found = [_mask(each) for each in mask] if several else [_mask(mask)]  # type: ignore[attr-defined]
    shapes = {each.shape for each in found}
    right = len(shapes) == 1 and found[0].ndim in ((2,) if several else (2, 3)) and found[0].size
    if not right:
        raise InputError(
            f"mask_image: expected [H, W] or [N, H, W], or pictures of one size, got shapes "
            f"{sorted(shapes)}."
        )
    stacked = np.stack(found) if several else found[0]
    return stacked[None] if stacked.ndim == 2 else stacked


def _mask(mask: object) -> np.ndarray:
    array = np.asarray(mask.convert("L") if hasattr(mask, "convert") else mask)  # of Pillow
    if array.dtype == np.bool_:
        return array
    if array.dtype == np.uint8:
        made: np.ndarray = array >= 128
        return made
    if array.dtype == np.float32 and np.isfinite(array).all():
        if array.size and (array.min() < 0 or array.max() > 1):
            raise InputError(
                f"mask_image: expected float32 in 0..1, got {array.min():g} to {array.max():g}."
            )
        half: np.ndarray = array >= 0.5
        return half
    raise InputError(
        f"mask_image: expected bool, uint8 or finite float32 in 0..1, got {array.dtype}."
    )


def as_depths(depth: object) -> np.ndarray:
    """float32 [N, h, w] of one depth map or several; InputError for anything else."""
    array = np.asarray(depth)
    array = array[None] if array.ndim == 2 else array
    fits = array.ndim == 3 and array.size and array.dtype == np.float32
    if not fits or not np.isfinite(array).all():
        raise InputError(
            f"depth_map: expected finite float32 [h, w] or [N, h, w], got {array.dtype} "
            f"{list(array.shape)}."
        )
    return array
