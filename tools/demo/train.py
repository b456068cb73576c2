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
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from blockcache.tools.demo import checkpoint, contexts, data, unet
from blockcache.tools.demo.config import Preset, TrainConfig
from blockcache.tools.demo.fit_autoencoder import load_latents
from blockcache.tools.demo.progress import Budget, bar, learning_rate_factor
from blockcache.tools.demo.workers import Workers

FOLDER = "unet"
AVERAGE_EVERY = 4  # steps between updates of the averaged weights
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
    timestep_weights: Tensor  # float32 [1000], how often each timestep is drawn

    def draw(self, size: int, dropout: float, device: str) -> Batch:
        """Random pictures; a fraction `dropout` of the captions is emptied."""
        chosen = torch.multinomial(self.weights, size, replacement=True)
        rows = torch.where(torch.rand(size) < dropout, len(self.contexts) - 1, chosen)
        latents = self.latents[chosen]
        return Batch(
            latents=latents.to(device),
            contexts=self.contexts[rows].float().to(device),
            noise=torch.randn_like(latents).to(device),
            timesteps=torch.multinomial(self.timestep_weights, size, replacement=True).to(device),
        )


class Trainer:
    """Model, average and optimizer of one run, restored from its folder.

    A folder without a checkpoint begins with the weights of `start`, or fresh ones.
    """

    def __init__(
        self, preset: Preset, folder: Path, device: str = "cpu", start: nn.Module | None = None
    ) -> None:
        torch.manual_seed(0)
        self.config: TrainConfig = preset.train
        self.folder = folder
        self.device = device
        model = unet.build(preset.unet, preset.latent_size)
        if start is not None:
            model.load_state_dict(start.state_dict())
        self.model: UNet2DConditionModel = model.to(device, memory_format=torch.channels_last)
        if device == "cpu":  # fused attention's backward pass takes a third of the step here
            self.model.set_attn_processor(AttnProcessor())
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        reached = checkpoint.restore(folder, self.model, self.ema, self.optimizer)
        self.step = reached.step
        self.budget = Budget(self.config.minutes, reached.spent_s)
        self.schedule: DDPMScheduler = unet.noise_schedule()
        self.autocast = device != "cpu" or has_bf16()
        self.workers: Workers[Batch] = Workers(self.model, self.config.workers, self.loss)
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
        loss = self.workers.accumulate(pieces)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.budget.tick()
        if self.step % AVERAGE_EVERY == 0:
            self._average()
        return loss

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Squared error of the predicted velocity."""
        noisy = self.schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
        target = self.schedule.get_velocity(batch.latents, batch.noise, batch.timesteps)
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=self.autocast):
            output = model(
                noisy.contiguous(memory_format=torch.channels_last),
                batch.timesteps,
                encoder_hidden_states=batch.contexts,
            ).sample
        return F.mse_loss(output.float(), target)

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.config.ema_decay, (self.step + 1) / (self.step + 10)) ** AVERAGE_EVERY
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)


def has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 natively; without that, autocast is slower."""
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))


def timestep_weights(alphas_cumprod: Tensor, cap: float) -> Tensor:
    """How often training draws each timestep: float32 [1000], 1 at most.

    The v-error weighs a sample like the x0-error times SNR + 1. As in min-SNR weighting (Hang et
    al., 2023) that factor is capped, so that nearly clean samples do not take all the training;
    unlike there, noisy samples keep their full weight: they decide what the picture shows. A
    timestep of small weight is drawn less often rather than scaled down: no work is wasted on it.
    """
    snr_plus_one = 1 / (1 - alphas_cumprod)
    return (snr_plus_one.clamp(max=cap) / snr_plus_one).float()


def load_source(work: Path, config: TrainConfig) -> Source:
    """Batches of the training pictures under `work`."""
    return Source(
        latents=load_latents(work),
        contexts=contexts.load(work),
        weights=torch.from_numpy(data.load(work).training_weights()),
        timestep_weights=timestep_weights(unet.noise_schedule().alphas_cumprod, config.snr_cap),
    )


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
