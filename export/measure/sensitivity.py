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

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from blockcache.export.measure.calibration import Calibration, calibration_inputs
from blockcache.export.unet import torch_kernels
from blockcache.export.unet.cached_unet import CachedUNet, Denoiser, State
from blockcache.export.unet.model import SourceModel
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.solver import SolverTables


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions:
    """How much to measure."""

    images: int = 4
    seed: int = 11  # of the noise

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ConfigError(f"Expected at least one image, got {self.images}.")


def measure_sensitivity(
    model: SourceModel,
    tables: SolverTables,
    calibration: Calibration,
    guidance_scale: float,
    options: SensitivityOptions,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Reuse every block at every step, one at a time: float32 [S, K]; row 0 is 0.

    Costs about S * (K + S / 2) evaluations of the U-Net for ``options.images`` images.

    Args:
        model: the U-Net, float32.
        tables: solver and steps.
        calibration: prompts, spread evenly over the images.
        guidance_scale: as in use; 1 means none.
        options: how much to measure.
        progress: called with (steps done, steps in all).
    """
    prompts = [i * calibration.prompts // options.images for i in range(options.images)]
    jobs = [(prompt, options.seed) for prompt in prompts]
    steps = len(tables.timesteps)
    result = np.zeros((steps, len(model.blocks)), np.float32)
    with CachedUNet(model) as cached, torch_kernels.on_gpu(model.unet), torch.no_grad():
        noise, conditions = calibration_inputs(model, calibration, jobs, guidance_scale)
        run = Denoiser(cached, tables, conditions, guidance_scale)
        states = run.trajectory(noise)
        for step in range(1, steps):
            result[step] = _at_step(run, states, step)
            if progress is not None:
                progress(step + 1, steps)
    return result


def _at_step(run: Denoiser, states: list[State], step: int) -> np.ndarray:
    """Sensitivity of every block at one step: float64 [K]."""
    blocks = len(run.cached.blocks)
    run.step(states[step - 1], step - 1)  # every block's output of the step before
    earlier = [block.history for block in run.cached.blocks]
    errors = []
    for k in range(blocks):
        for block, outputs in zip(run.cached.blocks, earlier, strict=True):
            block.history = outputs
        moved = run.step(states[step], step, np.arange(blocks) != k)
        errors.append(moved - states[step + 1])
    norms = np.array([_norm(error.latents) for error in errors])
    total = sum(errors[1:], errors[0])
    end = states[step + 1] + total
    for later in range(step + 1, len(states) - 1):
        end = run.step(end, later)
    moved_by = _norm(end.latents - states[-1].latents)
    gain = moved_by / max(_norm(total.latents), 1e-30)
    return norms * gain / _norm(states[-1].latents)


def _norm(latents: torch.Tensor) -> float:
    return float(latents.double().norm())
