"""Latents to pictures, by the VAE of a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blockcache.export.unet.hub import local_folder
from blockcache.export.unet.weights import load_part
from blockcache.runtime.errors import ConfigError


def decode_latents(source: str | Path, latents: np.ndarray) -> np.ndarray:
    """Decode latents float32 [N, C, h, w] with the source's VAE: uint8 [N, H, W, 3].

    Raises:
        ConfigError: no VAE there, or weights that are not whole.
    """
    from diffusers import AutoencoderKL

    folder = local_folder(source, ("vae",)) / "vae"
    if not folder.is_dir():
        raise ConfigError(
            f"Expected a VAE in {folder}, found none. Save latents instead: --out FILE.npy."
        )
    vae = load_part(AutoencoderKL, folder)
    with torch.no_grad():
        images = vae.decode(_unscaled(torch.from_numpy(latents), dict(vae.config))).sample
    pixels = (images * 0.5 + 0.5).clamp(0, 1) * 255
    result: np.ndarray = pixels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return result


def _unscaled(latents: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """Latents as the decoder takes them: a scale and a shift, in some models for each channel."""
    factor, shift = float(config["scaling_factor"]), float(config.get("shift_factor") or 0.0)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return latents / factor + shift
    return latents * torch.tensor(std)[:, None, None] / factor + torch.tensor(mean)[:, None, None]
