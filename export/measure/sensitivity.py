"""Sensitivity: how far the final latents move when one block is reused at one step.

Change (eq. 6) says how much a block's output differs from the one before, not what that does to
the image: on one model, the blocks at the highest resolution cost a fifth of the deep ones and
disturb the image twenty times as much. So the budget counts in

    loss = sensitivity[s, k] * residual   (see residuals.py)

with ``sensitivity[s, k]`` the relative L2 distance of the final latents to the uncached run's when
block k, and it alone, uses its output of step s - 1 at step s.

Each error is measured right after its step. Carrying all of them to the end would cost S times as
much, so only their sum is carried on, one run a step, and all blocks of a step share its gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from blockcache.export.measure.sampling import Sampling
from blockcache.export.observer import Observer, unobserved
from blockcache.export.unet.cached_unet import Denoiser, State
from blockcache.runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions:
    """How much to measure."""

    images: int = 4
    seed: int = 11  # of the noise

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ConfigError(f"Expected at least one image, got {self.images}.")


@dataclass(frozen=True)
class Sensitivity:
    """What was found; the two depend on step and block, and on the step alone."""

    table: np.ndarray  # float32 [S, K]; row 0 is 0
    gains: np.ndarray  # float64 [S], how an error of the model output moves the final latents


def measure_sensitivity(
    sampling: Sampling, options: SensitivityOptions, *, observer: Observer = unobserved
) -> Sensitivity:
    """Reuse every block at every step, one at a time.

    Costs about S * (K + S / 2) evaluations of the U-Net for ``options.images`` images.

    Args:
        sampling: what to run; the images' prompts are spread evenly over its own.
        options: how much to measure.
        observer: hears the steps done, stage "sensitivity".
    """
    jobs = [(prompt, options.seed) for prompt in sampling.spread_prompts(options.images)]
    table = np.zeros((sampling.steps, len(sampling.model.blocks)), np.float32)
    gains = np.ones(sampling.steps)
    with sampling.cached_unet() as cached, torch.no_grad():
        denoiser, noise = sampling.begin(cached, jobs)
        states = [denoiser.start(noise)]  # before each step, and at the end
        for state in denoiser.trajectory(noise, sampling.uncached):
            states.append(replace(state, kept=()))  # the outputs of all steps would fill the memory
        for step in range(1, sampling.steps):
            table[step], gain = _at_step(denoiser, states, step)
            gains[step] = gain * denoiser.solver.gain(step)
            observer("sensitivity", step + 1, sampling.steps)
    gains[0] = gains[min(1, sampling.steps - 1)]
    return Sensitivity(table, gains)


def _at_step(denoiser: Denoiser, states: Sequence[State], step: int) -> tuple[np.ndarray, float]:
    """Sensitivity of every block at one step, float64 [K]; and how far an error of 1 moves."""
    earlier = denoiser.step(states[step - 1], step - 1).kept
    begin = replace(states[step], kept=earlier)
    blocks = np.arange(len(earlier))
    errors = [denoiser.step(begin, step, blocks != k) - states[step + 1] for k in blocks]
    norms = np.array([_norm(error.latents) for error in errors])
    total = sum(errors[1:], errors[0])
    end = states[step + 1] + total
    for later in range(step + 1, len(states) - 1):
        end = denoiser.step(end, later)
    moved_by = _norm(end.latents - states[-1].latents)
    gain = moved_by / max(_norm(total.latents), 1e-30) / _norm(states[-1].latents)
    return norms * gain, gain


def _norm(latents: torch.Tensor) -> float:
    return float(latents.double().norm())
