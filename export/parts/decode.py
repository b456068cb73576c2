"""Latents to pictures in PyTorch, by the VAE of a diffusers pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from blockcache.export.parts.autoencoders import Decoder
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
    decoder = Decoder(load_part(AutoencoderKL, folder))
    with torch.no_grad():
        pixels = (decoder(torch.from_numpy(latents)) * 255).round()
    result: np.ndarray = pixels.to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return result
