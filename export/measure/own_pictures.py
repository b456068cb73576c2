"""Pictures to measure with, made by the model: what a U-Net reads beside the sample.

A model that inpaints or edits is measured on pictures. Where a calibration holds prompts alone, its
pictures are made of uncached runs of the model itself:

=======================  ============================  =============================================
the U-Net reads          what draws                    what is read then
=======================  ============================  =============================================
``mask``,                the model, everything masked  each prompt's drawing, behind a random
``masked_image_latents``                               rectangle
``image_latents``        the model, without a picture  for each prompt the drawing of the next one
``image`` (upscaler)     the model, of the noisiest    each prompt's drawing made small, at a noise
                         grey picture                  level of 20
``depth_mask``           nothing                       smooth random depths, near at the bottom
=======================  ============================  =============================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch

from blockcache.export.measure.sampling import Sampling
from blockcache.export.observer import Observer, unobserved
from blockcache.export.unet.extra_inputs import KINDS
from blockcache.export.unet.model import SourceModel
from blockcache.runtime.plan import IMAGE_LATENTS

Coder: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""Half an autoencoder: latents [N, C, h, w] to a picture [N, 3, H, W] in 0..1, or one in -1..1 to
latents."""

STEPS, SEED = 12, 7919
"""How the pictures are drawn; no other measurement draws with this seed."""

AT_ONCE = 8
"""Pictures that are drawn together."""

LEVEL = 20
"""An upscaler's noise level, as its pipeline has it where none is given."""

CLASSES = "class_labels"
_INPAINT, _EDIT, _DEPTH, _UPSCALE = (
    tuple(each.name for each in KINDS[kind])
    for kind in ("inpaint", "instruct-pix2pix", "depth2img", "upscale")
)
_MADE = {_INPAINT: _INPAINT, _EDIT: _EDIT, _DEPTH: _DEPTH, _UPSCALE: (*_UPSCALE, CLASSES)}
"""By what is read beside the sample: all conditions that are made."""


@dataclass(frozen=True)
class Coders:
    """An autoencoder's halves, and how an upscaler's small picture is noised."""

    decode: Coder  # the model's own
    encode: Coder  # scales what it makes as the pipeline does
    noise_levels: Sequence[float] = ()  # as of ``PipelineFacts``


def own_pictures_of(model: SourceModel) -> tuple[str, ...]:
    """The pictures that a model reads and that ``own_pictures`` can make, by name."""
    return _MADE.get(_beside(model), ())


def takes_drawings(model: SourceModel) -> bool:
    """Whether these are made of drawings, which takes ``Coders``."""
    return _beside(model) in (_INPAINT, _EDIT, _UPSCALE)


def takes_noise_levels(model: SourceModel) -> bool:
    """Whether they are noised, too."""
    return _beside(model) == _UPSCALE


def own_pictures(
    sampling: Sampling, coders: Coders | None, *, observer: Observer = unobserved
) -> dict[str, np.ndarray]:
    """What the model of ``sampling`` reads beside the sample, one for each prompt.

    Args:
        sampling: of a model for which ``own_pictures_of`` names some, with prompts alone.
        coders: needed where the model ``takes_drawings``.
        observer: hears the pictures drawn, stage "pictures".

    Returns:
        float32 [P, C, h, w] by name; an upscaler's ``class_labels`` int64 [1].
    """
    kind, rng = _beside(sampling.model), np.random.default_rng(SEED)
    count, (height, width) = sampling.calibration.prompts, sampling.model.sample_size
    if kind == _DEPTH:
        return {kind[0]: np.stack([random_depths(rng, height, width) for _ in range(count)])}
    assert coders is not None
    decode, encode = coders.decode, coders.encode
    if kind == _EDIT:
        drawn = _drawings(sampling, {IMAGE_LATENTS: _none(sampling.model)}, decode, observer)
        return {IMAGE_LATENTS: np.roll(_encoded(encode, drawn), -1, axis=0)}
    factor = _pixels(decode, sampling.model)
    if kind == _UPSCALE:
        levels, most = coders.noise_levels, len(coders.noise_levels) - 1
        nothing = torch.zeros(1, 3, height, width)
        drawn = _drawings(sampling, _noised(rng, nothing, most, levels), decode, observer)
        small = torch.nn.functional.avg_pool2d(drawn, factor)
        return _noised(rng, small, min(LEVEL, most), levels)
    grey = torch.zeros(1, 3, height * factor, width * factor)
    covered = {
        "mask": np.ones((1, 1, height, width), np.float32),
        "masked_image_latents": _encoded(encode, grey),
    }
    drawn = _drawings(sampling, covered, decode, observer)
    masks = np.stack([random_mask(rng, height * factor, width * factor) for _ in range(count)])
    kept = drawn * torch.from_numpy(1 - masks)
    return {
        "mask": np.ascontiguousarray(masks[:, :, ::factor, ::factor]),
        "masked_image_latents": _encoded(encode, kept),
    }


def random_mask(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A rectangle of ones, each side a quarter to three quarters: float32 [1, height, width]."""
    mask = np.zeros((1, height, width), np.float32)
    spans = []
    for side in (height, width):
        length = max(1, round(side * rng.uniform(0.25, 0.75)))
        start = int(rng.integers(0, side - length + 1))
        spans.append(slice(start, start + length))
    mask[:, spans[0], spans[1]] = 1
    return mask


def random_depths(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A floor that recedes, with smooth shapes before it: float32 [1, height, width] in -1..1."""
    y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    depths = np.broadcast_to(y, (height, width)).copy()
    for _ in range(3):
        middle, size = rng.uniform(0.2, 0.8, 2), rng.uniform(0.1, 0.3, 2)
        away = ((y - middle[0]) / size[0]) ** 2 + ((x - middle[1]) / size[1]) ** 2
        depths += rng.uniform(0.3, 1.0) * np.exp(-away)
    spread = np.ptp(depths)
    scaled: np.ndarray = 2 * (depths - depths.min()) / (spread or 1.0) - 1
    return scaled[None].astype(np.float32)


@torch.no_grad()
def _drawings(
    sampling: Sampling, pictures: Mapping[str, np.ndarray], decode: Coder, observer: Observer
) -> torch.Tensor:
    """One of every prompt, float32 [P, 3, H, W] in -1..1, all drawn with the same ``pictures``."""
    positive = {**sampling.calibration.positive, **pictures}
    drawing = replace(
        sampling,
        calibration=replace(sampling.calibration, positive=positive),
        image_guidance_scale=1.0,
    )
    jobs = [(prompt, SEED) for prompt in range(sampling.calibration.prompts)]
    made = []
    with drawing.cached_unet() as cached:
        for done in range(0, len(jobs), AT_ONCE):
            observer("pictures", done, len(jobs))
            denoiser, noise = drawing.begin(cached, jobs[done : done + AT_ONCE])
            latents = denoiser.denoise(noise, drawing.uncached).cpu()
            made += [decode(each[None]) * 2 - 1 for each in latents]
    observer("pictures", len(jobs), len(jobs))
    return torch.cat(made)


def _noised(
    rng: np.random.Generator, pictures: torch.Tensor, level: int, levels: Sequence[float]
) -> dict[str, np.ndarray]:
    """An upscaler's small pictures [N, 3, h, w] at a noise level."""
    noise = rng.standard_normal(pictures.shape, np.float32)
    made = levels[level] ** 0.5 * pictures.numpy() + (1 - levels[level]) ** 0.5 * noise
    return {_UPSCALE[0]: made.astype(np.float32), CLASSES: np.array([level], np.int64)}


def _beside(model: SourceModel) -> tuple[str, ...]:
    """What the U-Net reads beside the sample."""
    return tuple(each.name for each in model.conditions if each.beside_sample)


@torch.no_grad()
def _encoded(encode: Coder, pictures: torch.Tensor) -> np.ndarray:
    """float32 [N, C, h, w], one picture after the other."""
    return torch.cat([encode(each[None]) for each in pictures]).float().numpy()


@torch.no_grad()
def _pixels(decode: Coder, model: SourceModel) -> int:
    """Pixels a latent, along a side."""
    side = model.downsampling
    return int(decode(torch.zeros(1, model.channels, side, side)).shape[-1]) // side


def _none(model: SourceModel) -> np.ndarray:
    """No picture, as guidance's unconditional part has it: zeros [1, C, h, w]."""
    return np.zeros((1, model.channels, *model.sample_size), np.float32)
