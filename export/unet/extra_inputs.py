"""U-Nets with more input channels: which pictures stand behind the sample's, by name.

Such a U-Net reads the sample and one picture or more, as large as it, laid behind each other along
the channels. Its config says how many channels there are, not what they hold; the pipeline's class
does. Names and order are those of the pipelines of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blockcache.runtime.errors import ConfigError, UnsupportedModelError


@dataclass(frozen=True)
class ExtraInput:
    """A picture [N, channels, H, W] behind the sample's channels."""

    name: str
    channels: int

    def __str__(self) -> str:
        return f"{self.name}:{self.channels}"


KINDS: Mapping[str, tuple[ExtraInput, ...]] = {
    "inpaint": (ExtraInput("mask", 1), ExtraInput("masked_image_latents", 4)),
    "instruct-pix2pix": (ExtraInput("image_latents", 4),),
    "depth2img": (ExtraInput("depth_mask", 1),),
    "upscale": (ExtraInput("image", 3),),
}
"""What U-Nets are known to read, in this order."""

_PIPELINES = {
    "StableDiffusionInpaintPipeline": "inpaint",
    "StableDiffusionXLInpaintPipeline": "inpaint",
    "StableDiffusionInstructPix2PixPipeline": "instruct-pix2pix",
    "StableDiffusionXLInstructPix2PixPipeline": "instruct-pix2pix",
    "StableDiffusionDepth2ImgPipeline": "depth2img",
    "StableDiffusionUpscalePipeline": "upscale",
}


def find_extra_inputs(
    config: Mapping[str, Any], pipeline: str | None = None, wanted: str | None = None
) -> tuple[ExtraInput, ...]:
    """What a U-Net reads behind the sample; nothing where it has no more input channels.

    Args:
        config: of the U-Net.
        pipeline: the class that the pipeline's model_index.json names. Where there is none, the
            number of channels decides.
        wanted: one of ``KINDS``, or names and channels ("mask:1,masked_image_latents:4").

    Raises:
        ConfigError: ``wanted`` cannot be read, or has another number of channels.
        UnsupportedModelError: nobody says what the channels hold.
    """
    taken, given = (int(config.get(f"{side}_channels", 4)) for side in ("out", "in"))
    if wanted is not None:
        found = KINDS.get(wanted) or _parsed(wanted)
        if taken + _channels(found) != given:
            raise ConfigError(
                f"Expected extra inputs of {given - taken} channels in all, as many as the U-Net "
                f"has in_channels ({given}) beside its {taken} out_channels; got {wanted!r} of "
                f"{_channels(found)}."
            )
        return found
    if given == taken:
        return ()
    if pipeline is None:
        kinds = [kind for kind, inputs in KINDS.items() if _channels(inputs) == given - taken]
    else:
        kinds = [_PIPELINES[pipeline]] if pipeline in _PIPELINES else []
    if len(kinds) != 1 or taken + _channels(KINDS[kinds[0]]) != given:
        raise UnsupportedModelError(
            f"This U-Net has {given} input channels for {taken} output channels, and nothing says "
            f"what the others hold{f' in a {pipeline}' if pipeline else ''}. Supported are "
            f"{', '.join(KINDS)}. Say which with --extra-inputs (extra_inputs=...), or give names "
            f"and channels in their order, such as {','.join(map(str, KINDS['inpaint']))}."
        )
    return KINDS[kinds[0]]


def _channels(inputs: tuple[ExtraInput, ...]) -> int:
    return sum(each.channels for each in inputs)


def _parsed(text: str) -> tuple[ExtraInput, ...]:
    """Names and channels, as a user writes them."""
    found = [re.fullmatch(r"([a-z][a-z0-9_]*):([1-9][0-9]{0,3})", part) for part in text.split(",")]
    names = [match[1] for match in found if match is not None]
    if len(set(names)) != len(found):
        raise ConfigError(
            f"Expected extra inputs as one of {', '.join(KINDS)}, or as names and channels such as "
            f"{','.join(map(str, KINDS['inpaint']))}; got {text!r}."
        )
    return tuple(ExtraInput(match[1], int(match[2])) for match in found if match is not None)
