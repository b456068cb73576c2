"""Text to conditions, and latents to pictures, by the parts of a model outside the U-Net."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np

from blockcache.tools.sources.models import DEMO

Conditions: TypeAlias = dict[str, np.ndarray]


class Codec(Protocol):
    """Text to conditions, and latents to pictures."""

    def encode(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None
    ) -> tuple[Conditions, Conditions]:
        """Conditions by name, float32: [N, ...] of prompts, [1, ...] of the unconditional half.

        ``size`` is the latent (height, width) of the pictures; default the model's own.
        """

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """float32 [N, C, h, w] to uint8 [N, H, W, 3]."""


class DemoCodec:
    """Text encoder and autoencoder of the demo model."""

    def encode(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None
    ) -> tuple[Conditions, Conditions]:
        """Shipped embeddings for the default prompts, MiniLM for others, at any size."""
        from blockcache.tools.demo.model import prompt_embeddings

        return (
            {"encoder_hidden_states": prompt_embeddings(prompts)},
            {"encoder_hidden_states": prompt_embeddings([""])},
        )

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """The demo autoencoder's decoder."""
        from blockcache.tools.demo.model import decode

        return decode(latents)


class DiffusersCodec:
    """Text encoders and VAE of a diffusers pipeline, a folder or a hub id."""

    def __init__(self, source: str) -> None:
        self._source = source

    def encode(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None
    ) -> tuple[Conditions, Conditions]:
        """What the pipeline itself makes of the prompts."""
        from blockcache.export import encode_text

        return encode_text(self._source, prompts, size)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """The pipeline's VAE."""
        from blockcache.export.parts.decode import decode_latents

        return decode_latents(self._source, latents)


def codec_for(model: str) -> Codec:
    """The codec of ``demo``, of a diffusers folder or of a hub id."""
    return DemoCodec() if model == DEMO else DiffusersCodec(model)
