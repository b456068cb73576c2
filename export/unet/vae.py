"""Latents to pictures, by the VAE of a diffusers folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from blockcache.runtime.errors import ConfigError


def decode_latents(folder: Path, latents: np.ndarray) -> np.ndarray:
    """Decode latents float32 [N, C, h, w] with the folder's VAE: uint8 [N, H, W, 3]."""
    from diffusers import AutoencoderKL

    if not (folder / "vae").is_dir():
        raise ConfigError(
            f"Expected a VAE in {folder}/vae, found none. Save latents instead: --out FILE.npy."
        )
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    with torch.no_grad():
        images = vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor + shift).sample
    pixels = (images.clamp(-1, 1) + 1) * 127.5
    result: np.ndarray = pixels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return result
