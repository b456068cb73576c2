"""A model under evaluation: the shipped format, or the two-file start this project began with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from blockcache.tools.demo import model, unet
from blockcache.tools.demo.autoencoder import Residual
from blockcache.tools.demo.fit_autoencoder import to_signed
from blockcache.tools.demo.model import to_uint8

DECODE_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A U-Net with its decoder; contexts and noise schedule are common to all."""

    name: str
    unet: UNet2DConditionModel
    scheduler: DPMSolverMultistepScheduler
    decoder: Callable[[Tensor], Tensor]
    encoder: Callable[[Tensor], Tensor] | None = None  # None: not part of the format

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents float32 [N, 4, h, w] to pictures uint8 [N, 3, 4h, 4w]."""
        images = [self.decoder(chunk).numpy() for chunk in latents.split(DECODE_BATCH)]
        return to_uint8(np.concatenate(images))

    @torch.inference_mode()
    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Pictures uint8 [N, 3, H, W] through the autoencoder and back."""
        if self.encoder is None:
            raise ValueError(f"expected a model with an encoder, {self.name} has none")
        latents = [self.encoder(to_signed(i)) for i in np.split(images, _cuts(images))]
        return self.decode(torch.cat(latents))

    def parameters(self) -> int:
        """Parameters of the U-Net."""
        return sum(p.numel() for p in self.unet.parameters())


def load(folder: Path, name: str) -> Contender:
    """Either format, told apart by what lies in the folder."""
    starter = (folder / "autoencoder.safetensors").exists()
    return _starter(folder, name) if starter else _shipped(folder, name)


def _shipped(folder: Path, name: str) -> Contender:
    autoencoder = model.load_autoencoder(folder)
    return Contender(
        name=name,
        unet=model.load_unet(folder),
        scheduler=model.load_scheduler(folder),
        decoder=autoencoder.decode,
        encoder=autoencoder.encode,
    )


def _cuts(images: np.ndarray) -> range:
    return range(DECODE_BATCH, len(images), DECODE_BATCH)


def _starter(folder: Path, name: str) -> Contender:
    tensors = load_file(folder / "autoencoder.safetensors")
    decoder = _starter_decoder(tensors)
    shift = tensors["latent_mean"].float()[None, :, None, None]
    scaling = tensors["latent_std"].float()[None, :, None, None]
    return Contender(
        name=name,
        unet=model.load_unet(folder),
        scheduler=DPMSolverMultistepScheduler(**unet.SCHEDULE),
        decoder=lambda latents: decoder(latents * scaling + shift),
    )


def _starter_decoder(tensors: dict[str, Tensor]) -> nn.Sequential:
    wide, latent = tensors["dec.0.weight"].shape[:2]
    narrow = tensors["dec.8.weight"].shape[0]
    decoder = nn.Sequential(
        nn.Conv2d(latent, wide, 3, padding=1),
        *(Residual(wide) for _ in range(3)),
        nn.Conv2d(wide, 4 * narrow, 1),
        nn.PixelShuffle(2),
        *(Residual(narrow) for _ in range(2)),
        nn.GroupNorm(8, narrow),
        nn.SiLU(),
        nn.Conv2d(narrow, 12, 3, padding=1),
        nn.PixelShuffle(2),
    )
    names = {"n": "norm", "a": "first", "b": "second"}
    renamed = {
        ".".join(names.get(part, part) for part in key.split(".")[1:]): tensor.float()
        for key, tensor in tensors.items()
        if key.startswith("dec.")
    }
    decoder.load_state_dict(renamed)
    return decoder.eval()
