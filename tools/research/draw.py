"""Latents from captions with the demo model in plain PyTorch: guidance and DPM-Solver++."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How pictures are drawn."""

    steps: int = 20
    guidance: float = 3.0
    batch: int = 64
    seed: int = 0
    device: str = "cpu"
    bf16: bool = False  # autocast: faster where the processor multiplies bfloat16 natively


def initial_noise(count: int, size: int, seed: int) -> Tensor:
    """Standard normal latents that depend on the seed only: float32 [count, 4, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, 4, size, size), generator=generator)


@torch.inference_mode()
def sample(
    unet: UNet2DConditionModel,
    scheduler: DPMSolverMultistepScheduler,
    contexts: Tensor,
    empty: Tensor,
    noise: Tensor,
    options: SampleOptions,
    done: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Latents for every context.

    Args:
        unet: the model, on the options' device.
        scheduler: DPM-Solver++ with the model's noise schedule and prediction type.
        contexts: float [N, 20, 384].
        empty: float [20, 384], the empty caption.
        noise: float32 [N, 4, h, w].
        options: steps, guidance, batch, device.
        done: called with the number of finished pictures after each batch.

    Returns:
        float32 [N, 4, h, w] on the CPU.
    """
    finished: list[Tensor] = []
    for start in range(0, len(noise), options.batch):
        part = slice(start, start + options.batch)
        context = contexts[part].float().to(options.device)
        latents = noise[part].to(options.device)
        finished.append(_denoise(unet, scheduler, context, empty, latents, options).cpu())
        done(start + len(latents))
    return torch.cat(finished)


def _denoise(
    unet: UNet2DConditionModel,
    scheduler: DPMSolverMultistepScheduler,
    context: Tensor,
    empty: Tensor,
    latents: Tensor,
    options: SampleOptions,
) -> Tensor:
    scheduler = copy.deepcopy(scheduler)  # its multistep history belongs to one batch
    scheduler.set_timesteps(options.steps)
    both = torch.cat([empty.to(context).expand_as(context), context])
    for timestep in scheduler.timesteps:
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=options.bf16):
            output = unet(torch.cat([latents] * 2), timestep, encoder_hidden_states=both).sample
        without, with_caption = output.float().chunk(2)
        guided = without + options.guidance * (with_caption - without)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    return latents
