"""ControlNets beside a U-Net: which ones fit, and how strongly each acts at a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from blockcache.runtime.errors import ConfigError, UnsupportedModelError

CONTROL_CLASS = "ControlNetModel"
"""diffusers' class. Others, ControlNetXS and Union among them, compute something else."""

_LIKE_THE_UNET = (
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "addition_embed_type",
    "class_embed_type",
    "num_class_embeds",
)
"""What a ControlNet's config has in common with its U-Net's: it sees the same inputs, and what it
makes is added to the U-Net's skips."""


def check_controlnet(config: Mapping[str, Any], unet_config: Mapping[str, Any]) -> None:
    """Refuse a ControlNet that is not exported exactly, or belongs to another U-Net.

    Raises:
        UnsupportedModelError: another class, or a feature that is not supported, by name.
        ConfigError: its widths or inputs are not those of the U-Net.
    """
    kind = config.get("_class_name", CONTROL_CLASS)
    if kind != CONTROL_CLASS:
        raise UnsupportedModelError(
            f"Expected a {CONTROL_CLASS}, got {kind}, which blockcache does not support: its "
            f"forward differs. ControlNetXS, ControlNetUnion and T2I-Adapters cannot be compiled."
        )
    refusals = {
        "pooled conditions (global_pool_conditions)": config.get("global_pool_conditions"),
        "an image projection (encoder_hid_dim_type)": config.get("encoder_hid_dim_type"),
    }
    for feature, present in refusals.items():
        if present:
            raise UnsupportedModelError(
                f"This ControlNet uses {feature}, which blockcache does not support. Draw with it "
                f"in diffusers."
            )
    for name, mine in _shared(unet_config).items():
        theirs = _plain(config.get(name))
        if theirs != mine:
            raise ConfigError(
                f"Expected a ControlNet for this U-Net, whose {name} is {mine}; got one with "
                f"{theirs}. Take a ControlNet that was trained for the model."
            )


def picture_factor(config: Mapping[str, Any]) -> int:
    """How many pixels of a control picture lie along one latent: 8 for Stable Diffusion."""
    return int(2 ** (len(config["conditioning_embedding_out_channels"]) - 1))


def control_factor(scale: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """What a ControlNet's residuals are multiplied by at a timestep: float32 [N, 1, 1, 1].

    Args:
        scale: [N, 3], float32: the scale, and the timesteps between which it holds, the greater
            first. Outside it is 0.
        timestep: [N].
    """
    factor, first, last = scale.reshape(-1, 3, 1, 1, 1).unbind(1)
    time = timestep.reshape(-1, 1, 1, 1)
    # The product stands last: what only changes the layout would be moved into the loop.
    return factor * ((time <= first) & (time >= last)).to(scale.dtype)


def _shared(unet_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a U-Net's ControlNet has in its config; it sees the sample alone."""
    like = {name: _plain(unet_config.get(name)) for name in _LIKE_THE_UNET}
    return {"in_channels": unet_config.get("out_channels"), **like}


def _plain(value: Any) -> Any:
    """As JSON has it."""
    return list(value) if isinstance(value, list | tuple) else value
