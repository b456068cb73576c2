"""The source model that a name, a folder or a hub id stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blockcache.export import Lora, Parts, SourceModel

DEMO = "demo"
"""The name under which the shipped demo model is known."""


def check_source(model: str) -> None:
    """Raise an error where ``model`` cannot be loaded, judged by its name alone: no file is read.

    Raises:
        ConfigError: neither "demo", a folder, nor a hub id.
        MissingExtraError: the demo model's weights are not installed.
    """
    from blockcache.export.unet.hub import check_name

    if model == DEMO:
        from blockcache.tools.demo.model import weights_dir

        weights_dir()
    else:
        check_name(model)


def check_demo_prompts() -> None:
    """Raise MissingExtraError where the demo model's text encoder is not installed."""
    from blockcache.tools.demo.model import check_text_encoder

    check_text_encoder()


def load_source(
    model: str,
    dtype: str = "float32",
    cached: str = "transformers",
    variant: str | None = None,
    loras: Sequence[Lora] = (),
    extra_inputs: str | None = None,
    controlnets: Sequence[str] = (),
) -> SourceModel:
    """The source model of ``demo``, a diffusers folder or a hub id.

    Args:
        model: which.
        dtype: of the weights in memory.
        cached: what its blocks are: "transformers" or "resnets".
        variant: of a folder's or hub id's weights, as ``load_model`` has it.
        loras: merged into its weights.
        extra_inputs: what a U-Net with more input channels reads in them, as ``load_model`` has it.
        controlnets: folders or hub ids of ControlNets that run with it.
    """
    from blockcache.export import load_model

    if model == DEMO:
        from blockcache.tools.demo.model import weights_dir

        return load_model(
            weights_dir(),
            dtype=dtype,
            name=DEMO,
            cached=cached,
            loras=loras,
            controlnets=controlnets,
        )
    return load_model(
        model,
        dtype=dtype,
        cached=cached,
        variant=variant,
        loras=loras,
        extra_inputs=extra_inputs,
        controlnets=controlnets,
    )


def load_parts_of(
    model: str,
    clip_skip: int | None = None,
    loras: Sequence[Lora] = (),
    extra_inputs: str | None = None,
) -> Parts:
    """What stands beside the U-Net of ``demo``, a diffusers folder or a hub id.

    Args:
        model: which.
        clip_skip: so many of CLIP's last layers are left out.
        loras: merged into the text encoders.
        extra_inputs: as of ``load_source``.
    """
    from blockcache.export import load_parts

    if model == DEMO:
        from blockcache.tools.demo.parts import demo_parts

        return demo_parts()
    return load_parts(model, clip_skip=clip_skip, loras=loras, extra_inputs=extra_inputs)
