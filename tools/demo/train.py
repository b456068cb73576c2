"""Training of the U-Net: v-prediction within a wall-clock budget, resumable at any time."""

from __future__ import annotations

import copy
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from blockcache.tools.demo import checkpoint, contexts, data, unet
from blockcache.tools.demo.config import TIMESTEPS, Preset, TrainConfig
from blockcache.tools.demo.fit_autoencoder import load_latents
from blockcache.tools.demo.progress import Budget, bar, learning_rate_factor
from blockcache.tools.demo.workers import Workers

FOLDER = "unet"
LOG_EVERY = 10  # steps between lines of the log


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Clean latents, their captions, and the noise to learn from."""

    latents: Tensor  # float32 [B, 4, h, w]
    contexts: Tensor  # float32 [B, 20, 384]
    noise: Tensor  # float32 [B, 4, h, w]
    timesteps: Tensor  # int64 [B]

    def pieces(self, size: int) -> list[Batch]:
        """The batch in parts of at most `size`."""
        names = ("latents", "contexts", "noise", "timesteps")
        parts = zip(*(getattr(self, name).split(size) for name in names), strict=True)
        return [Batch(**dict(zip(names, part, strict=True))) for part in parts]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where batches come from; the last context is the empty caption."""

    latents: Tensor  # float32 [N, 4, h, w]
    contexts: Tensor  # float16 [N + 1, 20, 384]
    weights: Tensor  # float64 [N]

    def draw(self, size: int, dropout: float, device: str) -> Batch:
        """Random pictures; a fraction `dropout` of the captions is emptied."""
        chosen = torch.multinomial(self.weights, size, replacement=True)
        rows = torch.where(torch.rand(size) < dropout, len(self.contexts) - 1, chosen)
        latents = self.latents[chosen]
        return Batch(
            latents=latents.to(device),
            contexts=self.contexts[rows].float().to(device),
            noise=torch.randn_like(latents).to(device),
            timesteps=torch.randint(0, TIMESTEPS, (size,)).to(device),
        )


class Trainer:
    """Model, average and optimizer of one run, restored from its folder."""

    def __init__(self, preset: Preset, folder: Path, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.config: TrainConfig = preset.train
        self.folder = folder
        self.device = device
        model = unet.build(preset.unet, preset.latent_size)
        self.model: UNet2DConditionModel = model.to(device, memory_format=torch.channels_last)
        self.workers: Workers[Batch] = Workers(self.model, self.config.workers)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        reached = checkpoint.restore(folder, self.model, self.ema, self.optimizer)
        self.step = reached.step
        self.budget = Budget(self.config.minutes, reached.spent_s)
        self.schedule: DDPMScheduler = unet.noise_schedule()
        self.weights = loss_weights(self.schedule.alphas_cumprod, self.config.snr_cap).to(device)
        torch.manual_seed(1 + self.step)

    def save(self) -> None:
        """Write a checkpoint."""
        reached = checkpoint.Progress(step=self.step, spent_s=self.budget.spent_s)
        checkpoint.save(self.folder, self.model, self.ema, self.optimizer, reached)

    def update(self, batch: Batch) -> float:
        """One optimizer step; gives the loss."""
        factor = learning_rate_factor(self.step, self.config.warmup_steps, self.budget.fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor
        self.optimizer.zero_grad()
        pieces = batch.pieces(self.config.piece or len(batch.latents))
        loss = self.workers.accumulate(pieces, self.loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self._average()
        return loss

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Weighted squared error of the predicted velocity."""
        noisy = self.schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
        target = self.schedule.get_velocity(batch.latents, batch.noise, batch.timesteps)
        on_gpu = noisy.is_cuda  # a CPU without bf16 instructions is slower with autocast
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=on_gpu):
            output = model(
                noisy.contiguous(memory_format=torch.channels_last),
                batch.timesteps,
                encoder_hidden_states=batch.contexts,
            ).sample
        error = F.mse_loss(output.float(), target, reduction="none").mean((1, 2, 3))
        return (self.weights[batch.timesteps] * error).mean()

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.config.ema_decay, (self.step + 1) / (self.step + 10))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)


def loss_weights(alphas_cumprod: Tensor, cap: float) -> Tensor:
    """Weight of the v-prediction error at each timestep: float32 [1000].

    The v-error weighs a sample like the x0-error times SNR + 1. As in min-SNR weighting (Hang et
    al., 2023) that factor is capped, so that nearly clean samples do not take all the training;
    unlike there, noisy samples keep their full weight: they decide what the picture shows.
    """
    snr_plus_one = 1 / (1 - alphas_cumprod)
    return (snr_plus_one.clamp(max=cap) / snr_plus_one).float()


def load_source(work: Path) -> Source:
    """Batches of the training pictures under `work`."""
    weights = torch.from_numpy(data.load(work).training_weights())
    return Source(latents=load_latents(work), contexts=contexts.load(work), weights=weights)


def run(trainer: Trainer, source: Source) -> None:
    """Train until the budget is spent; checkpoints on the way, on interrupt and at the end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` runs
    smooth, saved_s = None, trainer.budget.spent_s
    with bar() as progress:
        task = progress.add_task("unet", total=trainer.budget.total_s, note="")
        try:
            while trainer.budget.fraction < 1:
                config = trainer.config
                loss = trainer.update(
                    source.draw(config.batch, config.caption_dropout, trainer.device)
                )
                smooth = loss if smooth is None else 0.99 * smooth + 0.01 * loss
                spent_s = trainer.budget.spent_s
                note = f"step {trainer.step} loss {smooth:.4f}"
                progress.update(task, completed=spent_s, note=note)
                if trainer.step % LOG_EVERY == 0:
                    _log(trainer, smooth)
                if spent_s - saved_s > 60 * config.checkpoint_minutes:
                    trainer.save()
                    saved_s = spent_s
        finally:
            trainer.save()


def _log(trainer: Trainer, loss: float) -> None:
    trainer.folder.mkdir(parents=True, exist_ok=True)
    with (trainer.folder / "log.csv").open("a") as file:
        file.write(f"{trainer.step},{trainer.budget.spent_s:.1f},{loss:.5f}\n")
