"""The demo model's text encoder and autoencoder, as parts of a bundle."""

from __future__ import annotations

import hashlib

import torch

from blockcache.export import Parts
from blockcache.export.parts.load import autoencoder_parts
from blockcache.export.parts.part import Part
from blockcache.export.parts.text_encoders import MaskedStates
from blockcache.export.parts.tokenizer import tokenizer_file
from blockcache.export.unet.weights import hash_part
from blockcache.runtime.errors import MissingExtraError
from blockcache.tools.demo import text
from blockcache.tools.demo.config import TOKENS
from blockcache.tools.demo.model import load_autoencoder, weights_dir

FACTOR = 4
"""Pixels a latent, along a side."""


def demo_parts() -> Parts:
    """MiniLM, where its package is installed, and both halves of the autoencoder."""
    refused = {}
    parts: list[Part] = []
    try:
        parts.append(_text_encoder())
    except MissingExtraError as error:
        refused["text_encoder"] = str(error)
    sha256 = hash_part(weights_dir() / "vae")
    parts += autoencoder_parts(
        lambda dtype: _Autoencoder().to(dtype), sha256=sha256, channels=4, factor=FACTOR
    )
    return Parts(parts=tuple(parts), refused=refused)


def _text_encoder() -> Part:
    """MiniLM's token states, scaled as the U-Net was trained with them."""
    folder = text.folder()
    tokenizer, _ = tokenizer_file(folder, TOKENS)
    said = "\n".join([hash_part(folder), tokenizer, str(text.CONTEXT_SCALE)])
    return Part(
        name="text_encoder",
        role="text_encoder",
        sha256=hashlib.sha256(said.encode()).hexdigest(),
        load=lambda dtype: MaskedStates(text.load_model().to(dtype), text.CONTEXT_SCALE),
        inputs={"input_ids": ("batch", TOKENS), "attention_mask": ("batch", TOKENS)},
        outputs={"states": ("batch", TOKENS, 384)},
        tokenizer=tokenizer,
    )


class _Autoencoder(torch.nn.Module):
    """The demo's autoencoder with the interface of diffusers'."""

    def __init__(self) -> None:
        super().__init__()
        self.model = load_autoencoder()
        self.config: dict[str, object] = {}

    def decode(self, latents: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        """[N, 4, h, w] to [N, 3, 4h, 4w]."""
        return (self.model.decode(latents),)

    def encode(self, images: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        """[N, 3, H, W] to [N, 4, H/4, W/4]."""
        return (self.model.encode(images),)
