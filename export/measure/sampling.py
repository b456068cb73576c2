"""Sampling: what a measurement runs on, and the one way in which all of them run it.

A measurement takes a ``Sampling`` and its own options. It opens the U-Net, begins with some
(prompt, seed) jobs, and goes from state to state:

    with sampling.cached_unet() as cached:
        denoiser, noise = sampling.begin(cached, jobs)
        for step, state in enumerate(denoiser.trajectory(noise, schedule)):
            ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch

from blockcache.export.measure.calibration import Calibration
from blockcache.export.unet.cached_unet import CachedUNet, Denoiser
from blockcache.export.unet.model import SourceModel
from blockcache.export.unet.precision import rounded
from blockcache.export.unet.scheduler import made_scheduler
from blockcache.export.unet.steps import SchedulerSteps, Steps, TableSteps
from blockcache.export.unet.torch_kernels import on_gpu
from blockcache.runtime.plan import Schedule
from blockcache.runtime.solvers.recorded import DiffusersScheduler, RecordedSolver, timesteps_of
from blockcache.runtime.solvers.solver import solver_tables

Job: TypeAlias = tuple[int, int]
"""One image to draw: the index of its prompt, and a seed."""


def job_seed(job: Job) -> int:
    """What all noise of a job is made from."""
    prompt, seed = job
    return 1_000_003 * seed + prompt


@dataclass
class Tally:
    """How much was computed."""

    evaluations: int = 0  # of the U-Net: one an image and step, whether guided or not


def steps_of(solver: RecordedSolver, seeds: Sequence[int] = ()) -> Steps:
    """The solver's part of the denoising loop; ``seeds``, one an image, are of noise it adds."""
    if isinstance(solver, DiffusersScheduler):
        config = {"_class_name": solver.scheduler, **solver.config}
        return SchedulerSteps(made_scheduler(config, solver.inference_steps), seeds)
    return TableSteps(solver_tables(solver), seeds)


@dataclass(frozen=True)
class Sampling:
    """What a measurement runs on; computed in float32 whatever the precision of the weights."""

    model: SourceModel
    solver: RecordedSolver
    calibration: Calibration
    guidance_scale: float = 5.0  # as in use and in the paper; 1 or less turns it off
    precision: str = "float32"  # what the values of the weights are rounded to
    tally: Tally = field(default_factory=Tally, compare=False)  # of all that is run by it
    image_guidance_scale: float = 1.0  # InstructPix2Pix's second one; 1 turns it off

    @property
    def timesteps(self) -> np.ndarray:
        """What the U-Net is conditioned on at each step, float32 [S]."""
        return timesteps_of(self.solver)

    @property
    def steps(self) -> int:
        """S."""
        return self.solver.steps

    @property
    def rows(self) -> int:
        """Samples an image: two with guidance, three with guidance by an image."""
        guided, by_image = self.guidance_scale > 1, self.image_guidance_scale != 1
        return 1 + guided + (guided and by_image)

    @property
    def uncached(self) -> Schedule:
        """The schedule that recomputes every block at every step."""
        return Schedule.uncached(self.steps, len(self.model.blocks))

    @contextmanager
    def cached_unet(self, outputs: int = 1) -> Iterator[CachedUNet]:
        """The U-Net with cacheable blocks, on the GPU where there is one.

        Args:
            outputs: how many computed outputs of a block are kept: 1, or 2 for history.
        """
        model = rounded(self.model, self.precision)
        with CachedUNet(model, outputs) as cached, on_gpu(cached.call):
            try:
                yield cached
            finally:
                self.tally.evaluations += cached.rows // self.rows

    def begin(self, cached: CachedUNet, jobs: Sequence[Job]) -> tuple[Denoiser, torch.Tensor]:
        """A denoiser for the jobs' prompts, and the noise [N, C, H, W] of their seeds."""
        device = next(cached.model.unet.parameters()).device
        prompts = [prompt for prompt, _ in jobs]
        picked = self.calibration.pick(prompts, self.rows > 1, by_image=self.rows > 2)
        conditions = {name: values.to(device) for name, values in picked.items()}
        steps = steps_of(self.solver, [job_seed(job) for job in jobs])
        scales = (self.guidance_scale, 0.0, self.image_guidance_scale)
        denoiser = Denoiser(cached, steps, conditions, *scales)
        return denoiser, self.noise(jobs).to(device)

    def noise(self, jobs: Sequence[Job]) -> torch.Tensor:
        """Noise [N, C, H, W] of jobs: the same whatever the batching and the device."""
        shape = (self.model.channels, *self.model.sample_size)
        generators = (torch.Generator().manual_seed(job_seed(job)) for job in jobs)
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

    def spread_prompts(self, images: int) -> list[int]:
        """The prompts of so many images, spread evenly over the calibration."""
        return [image * self.calibration.prompts // images for image in range(images)]
