"""Autoencoders as graphs: latents to pictures, and pictures to latents.

A pipeline scales latents before it decodes and shifts pixels after; both stand in the graph, in
float32 whatever the model computes in, so that the runtime has nothing to know of either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Decoder(nn.Module):
    """Latents float32 [N, C, h, w] to pictures float32 [N, 3, H, W] in 0..1."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.spread, self.factor, self.shift = _scaling(vae)

    def forward(self, latents: Tensor) -> Tensor:
        """Unscale, decode, and bring -1..1 to 0..1."""
        raw = latents * self.spread / self.factor + self.shift
        image = self.vae.decode(raw.to(_dtype(self.vae)), return_dict=False)[0]
        pixels: Tensor = (image.float() * 0.5 + 0.5).clamp(0, 1)
        return pixels


class Encoder(nn.Module):
    """Pictures float32 [N, 3, H, W] in -1..1 to latents float32 [N, C, h, w]: the posterior's mode.

    diffusers draws from the posterior by default. Its deviation is far below the noise that an
    image-to-image run starts with. InstructPix2Pix takes the mode, and does not scale it.
    """

    def __init__(self, vae: Any, *, scaled: bool = True) -> None:
        super().__init__()
        self.vae = vae
        self.spread, self.factor, self.shift = _scaling(vae, scaled=scaled)

    def forward(self, image: Tensor) -> Tensor:
        """Encode, and scale."""
        found = self.vae.encode(image.to(_dtype(self.vae)), return_dict=False)[0]
        raw = (found if isinstance(found, Tensor) else found.mode()).float()
        latents: Tensor = (raw - self.shift) * self.factor / self.spread
        return latents


def _dtype(vae: Any) -> torch.dtype:
    return next(vae.parameters()).dtype  # type: ignore[no-any-return]


def _scaling(vae: Any, *, scaled: bool = True) -> tuple[Any, float, Any]:
    """What latents are multiplied by, divided by, and what is added then, to be decoded.

    The first and the last are numbers, or in some models rows with one for each channel.
    """
    if not scaled:
        return 1.0, 1.0, 0.0
    config = vae.config
    factor = float(config.get("scaling_factor") or 1.0)
    shift = float(config.get("shift_factor") or 0.0)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return 1.0, factor, shift
    rows = [torch.tensor(row, dtype=torch.float32)[None, :, None, None] for row in (std, mean)]
    return rows[0], factor, rows[1]
