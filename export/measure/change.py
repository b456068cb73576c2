"""Profile: how much every block changes from step to step (eq. 6), streaming.

Full sampling for P prompts x R seeds with guidance as in use. Of each block only the last two
outputs are held. The result is mean and standard deviation over images of ``change[S, K]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from blockcache.export.measure.sampling import Job, Sampling
from blockcache.export.observer import Observer, unobserved
from blockcache.export.unet import torch_kernels
from blockcache.export.unet.cached_unet import CachedUNet
from blockcache.runtime.bundles.tensor_files import read_tensors, write_tensors
from blockcache.runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """How much to measure (paper, section 3.2: 32 prompts x 2 seeds)."""

    prompts: int = 32
    seeds: int = 2
    images_at_once: int = 8

    def __post_init__(self) -> None:
        if min(self.prompts, self.seeds, self.images_at_once) < 1:
            raise ConfigError(f"Profile at least one prompt, seed and image at once; got {self}.")


@dataclass(frozen=True)
class Profile:
    """Measured change, eq. 6."""

    mean: np.ndarray  # float32 [S, K]; row 0 is 0
    std: np.ndarray  # float32 [S, K], over images
    images: int
    file: str = ""  # inside the bundle, once it is written


class _Accumulator:
    """Sums over images of the change and its square: all that a profile keeps."""

    def __init__(self, steps: int, blocks: int) -> None:
        self.sums = np.zeros((2, steps, blocks))  # of change, of its square
        self.images = 0

    def profile(self) -> Profile:
        mean, square = self.sums / max(self.images, 1)
        std = np.sqrt(np.maximum(square - mean**2, 0.0))
        return Profile(mean.astype(np.float32), std.astype(np.float32), self.images)

    def save(self, path: Path) -> None:
        write_tensors(path, {"sums": self.sums, "images": np.array([self.images], np.int64)})

    def load(self, path: Path) -> None:
        tensors = read_tensors(path)
        if tensors["sums"].shape == self.sums.shape:
            self.sums, self.images = tensors["sums"], int(tensors["images"][0])


def relative_change(fresh: torch.Tensor, previous: torch.Tensor, images: int) -> np.ndarray:
    """L1_rel of eq. 6 per image: float64 [images].

    An image's entries in the batch (its conditional and unconditional halves) are taken together.
    """
    fused = torch_kernels.relative_change(fresh, previous, images)
    if fused is not None:
        return fused
    batch = fresh.shape[0]
    difference = (fresh - previous).abs().double().reshape(batch, -1).sum(1)
    norm = fresh.abs().double().reshape(batch, -1).sum(1)
    # Halves come one after the other: entry i and entry images + i belong to image i.
    difference, norm = (t.reshape(-1, images).sum(0) for t in (difference, norm))
    return (difference / norm.clamp_min(torch.finfo(torch.float64).tiny)).cpu().numpy()


def measure_change(
    sampling: Sampling,
    options: ProfileOptions,
    *,
    observer: Observer = unobserved,
    checkpoint: Path | None = None,
) -> Profile:
    """Run full sampling and measure every block at every step.

    Args:
        sampling: what to run; the first ``options.prompts`` of its prompts are used.
        options: how much to measure.
        observer: hears the images done, stage "profile".
        checkpoint: a file that holds the sums so far; a run that finds it goes on from there.
    """
    prompts = min(options.prompts, sampling.calibration.prompts)
    jobs = [(prompt, seed) for seed in range(options.seeds) for prompt in range(prompts)]
    accumulator = _Accumulator(sampling.steps, len(sampling.model.blocks))
    if checkpoint is not None and checkpoint.is_file():
        accumulator.load(checkpoint)
    with sampling.cached_unet(outputs=2) as cached:
        while accumulator.images < len(jobs):
            observer("profile", accumulator.images, len(jobs))
            batch = jobs[accumulator.images : accumulator.images + options.images_at_once]
            _measure_batch(sampling, cached, batch, accumulator)
            if checkpoint is not None:
                accumulator.save(checkpoint)
    observer("profile", len(jobs), len(jobs))
    return accumulator.profile()


def _measure_batch(
    sampling: Sampling, cached: CachedUNet, jobs: Sequence[Job], accumulator: _Accumulator
) -> None:
    """Sample one batch of jobs and add its change to the sums."""
    denoiser, noise = sampling.begin(cached, jobs)
    for step, state in enumerate(denoiser.trajectory(noise, sampling.uncached)):
        for k, outputs in enumerate(state.kept):
            if len(outputs) == 2:  # of this step and of the one before
                change = relative_change(*outputs, len(jobs))
                accumulator.sums[:, step, k] += change.sum(), (change**2).sum()
    accumulator.images += len(jobs)
