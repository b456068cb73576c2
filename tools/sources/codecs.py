"""Text to conditions, and latents to pictures, by the parts of a model outside the U-Net."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from blockcache.runtime.errors import ConfigError
from blockcache.tools.sources.models import DEMO


class Codec(Protocol):
    """Text to conditions, and latents to pictures."""

    def encode(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """The model's conditions by name, float32 [N, ...]."""

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """float32 [N, C, h, w] to uint8 [N, H, W, 3]."""


class DemoCodec:
    """Text encoder and autoencoder of the demo model."""

    def encode(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Shipped embeddings for the default prompts, MiniLM for others."""
        from blockcache.tools.demo.model import prompt_embeddings

        return {"encoder_hidden_states": prompt_embeddings(prompts)}

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """The demo autoencoder's decoder."""
        from blockcache.tools.demo.model import decode

        return decode(latents)


class DiffusersCodec:
    """Text encoders and VAE of a diffusers pipeline folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def encode(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """The pipeline's own text encoders."""
        from blockcache.export.measure.calibration import encode_prompts

        return dict(encode_prompts(self._folder, prompts).positive)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """The pipeline's VAE."""
        from blockcache.export.unet.vae import decode_latents

        return decode_latents(self._folder, latents)


def codec_for(model: str) -> Codec:
    """The codec of ``demo`` or of a diffusers folder."""
    if model == DEMO:
        return DemoCodec()
    folder = Path(model)
    if not folder.is_dir():
        raise ConfigError(f"Expected 'demo' or a diffusers folder, got {model!r}.")
    return DiffusersCodec(folder)
