"""Training of the autoencoder, and the latents it makes of all pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blockcache.runtime.errors import ConfigError
from blockcache.runtime.files import replacing, replacing_folder, write_text
from blockcache.tools.demo.autoencoder import TinyAutoencoder, to_signed
from blockcache.tools.demo.config import LATENT_CHANNELS, AutoencoderConfig
from blockcache.tools.demo.data import Dataset
from blockcache.tools.demo.progress import Budget, bar, learning_rate_factor

FOLDER = "autoencoder"
LATENTS = "latents.safetensors"


def psnr_db(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of pictures in [-1, 1]."""
    return 10 * math.log10(4 / float((a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean()))


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + L2 + half the L1 of the gradients."""
    error = output - target
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * (across + down)


def random_batches(dataset: Dataset, size: int, seed: int = 0) -> Iterator[Tensor]:
    """Endless random training pictures, half of them mirrored: float32 [size, 3, H, W]."""
    random = np.random.default_rng(seed)
    weights = dataset.training_weights()
    while True:
        chosen = random.choice(len(weights), size, p=weights / weights.sum())
        images = to_signed(dataset.images[chosen])
        yield images.flip(3) if random.random() < 0.5 else images


def fit(
    dataset: Dataset, config: AutoencoderConfig, work: Path, device: str = "cpu"
) -> TinyAutoencoder:
    """Train for the configured minutes; stores the model and all latents under `work`."""
    torch.manual_seed(0)
    model = TinyAutoencoder(config.wide, config.narrow, LATENT_CHANNELS)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    _loop(model, optimizer, dataset, config, device)
    chunks = _chunks(dataset)
    with torch.inference_mode():
        raw = [model.encode_raw(to_signed(c).to(device)).cpu() for c in chunks]
    model.normalise(torch.cat(raw))
    adopt(model, dataset, work, device)
    return model


def refine(
    model: TinyAutoencoder, dataset: Dataset, config: AutoencoderConfig, work: Path, device: str
) -> TinyAutoencoder:
    """Train the decoder alone for the configured minutes: latents, and U-Nets on them, stay valid.

    Half the learning rate of `fit`: it goes on from there. Stores what `fit` does.
    """
    torch.manual_seed(0)
    config = replace(config, learning_rate=config.learning_rate / 2)
    model = model.to(device, memory_format=torch.channels_last)
    model.encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.decoder.parameters(), config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    _loop(model, optimizer, dataset, config, device)
    adopt(model, dataset, work, device)
    return model


def _loop(
    model: TinyAutoencoder,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    config: AutoencoderConfig,
    device: str,
) -> None:
    budget = Budget(config.minutes)
    with bar() as progress:
        task = progress.add_task("autoencoder", total=budget.total_s, note="")
        for step, images in enumerate(random_batches(dataset, config.batch)):
            if budget.fraction >= 1:
                break
            factor = learning_rate_factor(step, 100, budget.fraction)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor
            loss, psnr = _step(model, optimizer, images.to(device), config.latent_noise)
            budget.tick()
            note = f"step {step} loss {loss:.4f} PSNR {psnr:.2f} dB"
            progress.update(task, completed=budget.spent_s, note=note)
    model.eval()


def _step(
    model: TinyAutoencoder, optimizer: torch.optim.Optimizer, images: Tensor, noise: float
) -> tuple[float, float]:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        raw = model.encode_raw(images)
        output = model.decoder(raw + noise * torch.randn_like(raw)).float()
    loss = reconstruction_loss(output, images)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach()), psnr_db(output.detach(), images)


def _chunks(dataset: Dataset) -> list[np.ndarray]:
    return [dataset.images[i : i + 128] for i in range(0, len(dataset.images), 128)]


@torch.inference_mode()
def adopt(model: TinyAutoencoder, dataset: Dataset, work: Path, device: str = "cpu") -> None:
    """Encode all pictures with a trained autoencoder; stores it and the latents under `work`."""
    latents = [model.encode(to_signed(c).to(device)).half().cpu() for c in _chunks(dataset)]
    with replacing_folder(work / FOLDER) as folder:
        model.save_pretrained(folder)
    with replacing(work / LATENTS) as file:
        save_file({"latents": torch.cat(latents).contiguous()}, file.name)
    held_out = np.array([p.held_out for p in dataset.pictures])
    images = to_signed(dataset.images[held_out]).to(device)
    quality = psnr_db(model(images), images)
    write_text(work / "autoencoder.txt", f"held-out PSNR {quality:.2f} dB\n")


def load_autoencoder(work: Path) -> TinyAutoencoder:
    """The trained autoencoder."""
    return TinyAutoencoder.from_pretrained(work / FOLDER).eval()


def load_latents(work: Path) -> Tensor:
    """Normalised latents of all pictures: float32 [N, 4, h, w]."""
    if not (work / LATENTS).exists():
        raise ConfigError(
            f"Expected {LATENTS} in {work}, found none. Run the command autoencoder first."
        )
    return load_file(work / LATENTS)["latents"].float()
