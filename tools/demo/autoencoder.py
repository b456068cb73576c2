"""The autoencoder: pictures to latents a quarter as wide and high, and back."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

LATENT_LIMIT = 3.0  # latents are squashed into (-3, 3) before normalisation


def to_signed(images: np.ndarray) -> Tensor:
    """uint8 [N, 3, H, W] to float32 in [-1, 1], channels last in memory."""
    signed = torch.from_numpy(images).float() / 127.5 - 1
    return signed.contiguous(memory_format=torch.channels_last)


class Residual(nn.Module):
    """x + conv(silu(conv(silu(norm(x)))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same shape."""
        return x + self.second(F.silu(self.first(F.silu(self.norm(x)))))


class TinyAutoencoder(ModelMixin, ConfigMixin):
    """Works at a half and a quarter of the resolution only, so that a CPU can train it.

    Latents are normalised per channel by `shift` and `scaling`, which live in config.json.
    """

    @register_to_config
    def __init__(
        self,
        wide: int = 128,
        narrow: int = 64,
        latent_channels: int = 4,
        shift: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0),
        scaling: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        self.encoder = _encoder(wide, narrow, latent_channels)
        self.decoder = _decoder(wide, narrow, latent_channels)

    def encode_raw(self, images: Tensor) -> Tensor:
        """Pictures in [-1, 1] [N, 3, H, W] to latents in (-3, 3) [N, 4, H/4, W/4]."""
        return LATENT_LIMIT * torch.tanh(self.encoder(images) / LATENT_LIMIT)

    def encode(self, images: Tensor) -> Tensor:
        """Pictures in [-1, 1] [N, 3, H, W] to normalised latents [N, 4, H/4, W/4]."""
        raw = self.encode_raw(images)
        return (raw - self._row("shift", raw)) / self._row("scaling", raw)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [N, 4, h, w] to pictures in about [-1, 1] [N, 3, 4h, 4w]."""
        return self.decoder(latents * self._row("scaling", latents) + self._row("shift", latents))

    def forward(self, images: Tensor) -> Tensor:
        """Pictures through the bottleneck and back."""
        return self.decode(self.encode(images))

    def normalise(self, raw: Tensor) -> None:
        """Set `shift` and `scaling` from raw latents [N, 4, h, w]."""
        self.register_to_config(
            shift=raw.mean((0, 2, 3)).tolist(), scaling=raw.std((0, 2, 3)).tolist()
        )

    def _row(self, name: str, like: Tensor) -> Tensor:
        values = torch.tensor(self.config[name], dtype=like.dtype, device=like.device)
        return values[None, :, None, None]


def _encoder(wide: int, narrow: int, latent: int) -> nn.Sequential:
    return nn.Sequential(
        nn.PixelUnshuffle(2),
        nn.Conv2d(12, narrow, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(narrow, wide, 3, stride=2, padding=1),
        Residual(wide),
        Residual(wide),
        nn.GroupNorm(8, wide),
        nn.SiLU(),
        nn.Conv2d(wide, latent, 1),
    )


def _decoder(wide: int, narrow: int, latent: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(latent, wide, 3, padding=1),
        Residual(wide),
        Residual(wide),
        Residual(wide),
        nn.Conv2d(wide, 4 * narrow, 1),
        nn.PixelShuffle(2),
        Residual(narrow),
        nn.GroupNorm(8, narrow),
        nn.SiLU(),
        nn.Conv2d(narrow, 12, 3, padding=1),
        nn.PixelShuffle(2),
    )
