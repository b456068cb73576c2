"""Where models, prompts and pictures come from: the demo model by name, diffusers by folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from blockcache.runtime.errors import ConfigError

if TYPE_CHECKING:
    from blockcache.export.measure.calibration import Calibration
    from blockcache.export.unet.model import SourceModel

DEMO = "demo"
"""The name under which the shipped demo model is known."""


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
        from blockcache.export.unet.model import decode_latents

        return decode_latents(self._folder, latents)


def codec_for(model: str) -> Codec:
    """The codec of ``demo`` or of a diffusers folder."""
    if model == DEMO:
        return DemoCodec()
    folder = Path(model)
    if not folder.is_dir():
        raise ConfigError(f"Expected 'demo' or a diffusers folder, got {model!r}.")
    return DiffusersCodec(folder)


def load_source(model: str, dtype: str = "float32", cached: str = "transformers") -> SourceModel:
    """The source model of ``demo``, a diffusers folder or a hub id.

    ``cached`` says what its blocks are: "transformers" or "resnets".
    """
    from blockcache.export.unet.model import load_model

    if model == DEMO:
        from blockcache.tools.demo.model import MODEL_DIR

        return load_model(MODEL_DIR, dtype=dtype, name=DEMO, cached=cached)
    return load_model(model, dtype=dtype, cached=cached)


def calibration_for(model: str, file: Path | None, prompts: Path | None) -> Calibration:
    """Encoded prompts from a file, from the demo model, or from the model's text encoders."""
    from blockcache.export.measure import calibration

    if file is not None:
        return calibration.read_calibration(file)
    texts = read_prompts(prompts) if prompts is not None else None
    if model == DEMO:
        from blockcache.tools.demo.model import default_prompts

        codec = DemoCodec()
        return calibration.Calibration(codec.encode(texts or default_prompts()), codec.encode([""]))
    return calibration.encode_prompts(model, texts or calibration.PROMPTS)


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file, one a line, empty lines left out."""
    if not file.is_file():
        raise ConfigError(f"Expected a file of prompts at {file}, found none.")
    lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"Expected one prompt a line in {file}, it has none.")
    return lines
