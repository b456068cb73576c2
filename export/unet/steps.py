"""What a solver does between two evaluations of the U-Net: by tables, or by diffusers' scheduler.

Both keep no state. A step takes the latents and the *past*, the tensors that the solver remembers,
and returns the next of both, so that it may be taken again and in any order.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from blockcache.runtime.errors import ConfigError
from blockcache.runtime.solvers.philox import standard_normal
from blockcache.runtime.solvers.solver import SolverTables

Past: TypeAlias = tuple[torch.Tensor, ...]
"""What a solver remembers, each [N, C, H, W]."""


class Steps(Protocol):
    """A solver's part of the denoising loop."""

    @property
    def timesteps(self) -> np.ndarray:
        """What the U-Net is conditioned on, float [S]."""

    def start(
        self, noise: torch.Tensor, image_latents: torch.Tensor | None, step: int
    ) -> torch.Tensor:
        """The latents that the first executed step sees."""

    def model_input(self, latents: torch.Tensor, past: Past, step: int) -> torch.Tensor:
        """The latents as the U-Net takes them."""

    def advance(
        self, latents: torch.Tensor, past: Past, output: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, Past]:
        """The latents after the step, and what is remembered then; linear in all three."""

    def gain(self, step: int) -> float:
        """How far an error of 1 of the model output moves the latents right after the step."""


class TableSteps:
    """One of our solvers, by the tables that the runtime has.

    Args:
        tables: the solver's coefficients.
        seeds: one an image, of the noise that a solver adds at every step.
    """

    def __init__(self, tables: SolverTables, seeds: Sequence[int] = ()) -> None:
        self._tables, self._seeds = tables, np.array(seeds, np.uint64)
        self.timesteps = tables.timesteps

    def start(
        self, noise: torch.Tensor, image_latents: torch.Tensor | None, step: int
    ) -> torch.Tensor:
        """Scaled noise, or the image noised to the step's level."""
        if image_latents is None:
            return noise * self._tables.initial_scale
        signal, spread = (float(value) for value in self._tables.noising[step])
        return signal * image_latents + spread * noise

    def model_input(self, latents: torch.Tensor, past: Past, step: int) -> torch.Tensor:
        """Scaled."""
        return latents * float(self._tables.input_scale[step])

    def advance(
        self, latents: torch.Tensor, past: Past, output: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, Past]:
        """The table's row; remembered are the last two x0, the latest first."""
        tables = (self._tables.first, self._tables.second, self._tables.coefficients)
        row = [float(value) for value in tables[len(past)][step]]
        following = row[0] * latents + row[1] * output
        for coefficient, x0 in zip(row[2:4], past, strict=False):
            following = following + coefficient * x0
        if row[7]:
            noise = standard_normal(self._seeds, step, latents[0].numel())
            noise_here = torch.from_numpy(noise).reshape(latents.shape).to(latents)
            following = following + row[7] * noise_here
        return following, (row[4] * latents + row[5] * output, *past[:1])

    def gain(self, step: int) -> float:
        """The row's coefficient of the model output."""
        return abs(float(self._tables.coefficients[step, 1]))


class SchedulerSteps:
    """A scheduler of diffusers, evaluation by evaluation.

    A scheduler counts and remembers as it goes. So one run on dummies is made, and of each of its
    steps a copy is kept; to take a step, a copy's remembered tensors are replaced by the past.

    Args:
        scheduler: after ``set_timesteps``.
        seeds: one an image, of the noise that it adds.
    """

    def __init__(self, scheduler: Any, seeds: Sequence[int] = ()) -> None:
        self._seeds = list(seeds)
        self._draws = "generator" in inspect.signature(scheduler.step).parameters
        self._times = scheduler.timesteps
        self.timesteps = np.asarray(self._times.double())
        self._before = []  # the scheduler before each step
        dummy = torch.ones(1, 1, 1, 1)
        for step, time in enumerate(self._times):
            self._before.append(copy.deepcopy(scheduler))
            scheduler.scale_model_input(dummy, time)
            dummy = scheduler.step(dummy, time, dummy, **self._noise(step, 1)).prev_sample

    def start(
        self, noise: torch.Tensor, image_latents: torch.Tensor | None, step: int
    ) -> torch.Tensor:
        """Scaled noise; ConfigError for image-to-image, which no measurement needs."""
        if image_latents is not None or step:
            raise ConfigError(
                "With a scheduler of diffusers the reference starts from noise alone."
            )
        return noise * float(self._before[0].init_noise_sigma)

    def model_input(self, latents: torch.Tensor, past: Past, step: int) -> torch.Tensor:
        """By ``scale_model_input``."""
        scheduler = _with_past(self._before[step], past)
        scaled: torch.Tensor = scheduler.scale_model_input(latents, self._times[step])
        return scaled

    def advance(
        self, latents: torch.Tensor, past: Past, output: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, Past]:
        """By ``step``."""
        scheduler, time = _with_past(self._before[step], past), self._times[step]
        scheduler.scale_model_input(latents, time)  # some insist on it
        noise = self._noise(step, len(latents))
        following: torch.Tensor = scheduler.step(output, time, latents, **noise).prev_sample
        return following, tuple(tensor for _, _, tensor in _remembered(scheduler))

    def gain(self, step: int) -> float:
        """By difference: a step is linear."""
        past = tuple(torch.zeros(1, 1, 1, 1) for _ in _remembered(self._before[step]))
        at = torch.zeros(1, 1, 1, 1)
        moved, kept = (self.advance(at, past, at + error, step)[0] for error in (1.0, 0.0))
        return abs(float(moved - kept))

    def _noise(self, step: int, images: int) -> dict[str, Any]:
        """The generators of a step's noise: an image's own, whatever the batch."""
        if not self._draws:
            return {}
        seeds = self._seeds if len(self._seeds) == images else range(images)
        made = [torch.Generator().manual_seed((seed << 16) + step) for seed in seeds]
        return {"generator": made}


def _with_past(scheduler: Any, past: Past) -> Any:
    """A copy of a scheduler that remembers these tensors."""
    made = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, list):
            setattr(made, name, list(value))
    slots = list(_remembered(made))
    assert len(slots) == len(past), "the scheduler remembers more or less than at this step"
    for (holder, key, _), tensor in zip(slots, past, strict=True):
        holder[key] = tensor.clone()  # some schedulers add to what they remember in place
    return made


def _remembered(scheduler: Any) -> Iterator[tuple[Any, Any, torch.Tensor]]:
    """(holder, key, tensor) of every tensor [N, C, H, W] among a scheduler's attributes."""
    for name in sorted(vars(scheduler)):
        value = vars(scheduler)[name]
        if isinstance(value, list):
            yield from ((value, i, v) for i, v in enumerate(value) if _is_image(v))
        elif _is_image(value):
            yield vars(scheduler), name, value


def _is_image(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 4
