"""Names that people write in more than one way."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from blockcache.runtime.errors import ConfigError

if TYPE_CHECKING:
    from blockcache.runtime import Bundle, Preset

PRECISIONS = {
    "float32": "float32", "fp32": "float32",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16",
}  # fmt: skip
"""Precisions as diffusers and TensorRT call them, and as we do."""


def precision_of(text: str) -> str:
    """The full name of a precision.

    Examples:
        >>> precision_of("bf16")
        'bfloat16'
    """
    if text not in PRECISIONS:
        raise ConfigError(f"Expected a precision of {', '.join(PRECISIONS)}; got {text!r}.")
    return PRECISIONS[text]


def precision_for(text: str | None, target: str | None) -> str:
    """The precision asked for, else the one that suits the GPU that engines will be built for.

    TensorRT fuses attention in 16 bits only, and the T4 (sm75) has no bfloat16.
    """
    from blockcache.export import Target

    capabilities = Target.parse(target).capabilities if target is not None else ()
    if text is not None:
        return precision_of(text)
    if not capabilities:
        return "float32"
    return "float16" if "SM75" in capabilities else "bfloat16"


def warn_of_float32(precision: str, device: str) -> None:
    """Say that a float32 model is slow on ``device``, a GPU."""
    if precision == "float32":
        logging.getLogger("blockcache").warning(
            "this bundle computes in float32, in which TensorRT does not fuse attention: it is "
            "slow on %s. Compile the model again with --target %s, which takes 16 bits.",
            device,
            device,
        )


def warn_of_guidance(preset: Preset, guidance: float | None) -> None:
    """Say that a preset's fit holds no further than the guidance scale that it was made for."""
    if guidance is None or guidance <= preset.guidance_scale or preset.solver.get("fitted") is None:
        return
    logging.getLogger("blockcache").warning(
        "%s is fitted to guidance %g; at %g its pictures end farther from those of more steps. "
        "Compile the model again with --guidance %g.",
        preset.name,
        preset.guidance_scale,
        guidance,
        guidance,
    )


def preset_of(bundle: Bundle, text: str | None) -> str:
    """A preset's name in the bundle, given in either spelling; default the recommended one.

    Raises:
        UnknownPresetError: the bundle holds no such preset.
    """
    return bundle.preset(text).name
