"""The converged run, the yardstick: a grid so fine that more steps change nothing.

It tells three things. Its end is where every faster run wants to arrive. From its samples and data
predictions follows, without another evaluation, what a step of any solver between any two of its
levels does wrong (``choose/grid_search.py``); the *gain* says how far an error at a level moves
the final latents. And from the moments of its branches' outputs follows how well any of them stands
in for a later one (``choose/joint.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from blockcache.export.measure.residuals import Moments, ResidualOptions, sample_of
from blockcache.export.measure.sampling import Job, Sampling
from blockcache.export.observer import Observer, unobserved
from blockcache.export.unet.cached_unet import Denoiser, State
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.solvers.grid import Grid
from blockcache.runtime.solvers.solver import SolverConfig

SAMPLED = ResidualOptions()
"""Which channels and positions of an output are looked at."""

REST = 8
"""To measure a gain, an error is carried to the end in this many steps."""


@dataclass(frozen=True, kw_only=True)
class ConvergedOptions:
    """How fine, and of how many images."""

    levels: int = 100  # M; twice as many end 0.0005 away (relative L2, on the demo model)
    images: int = 4
    gains: int = 8  # levels at which the gain of an error is measured
    carried: int = 2  # images that it is measured on, at most
    seed: int = 71_003  # of the noise

    def __post_init__(self) -> None:
        leasts = {"levels": 20, "images": 1, "gains": 2, "carried": 1, "seed": 0}
        for name, least in leasts.items():
            if getattr(self, name) < least:
                raise ConfigError(f"Expected {name} of {least} or more, got {getattr(self, name)}.")


@dataclass(frozen=True)
class ConvergedRun:
    """What the run saw at its M levels, of N images."""

    sigmas: np.ndarray  # float64 [M], sigma / alpha, falling
    samples: np.ndarray  # float32 [M, N, C, H, W], x in the variance-preserving space
    data: np.ndarray  # float32 [M + 1, N, C, H, W], the data predictions, then the final latents
    moments: tuple[Moments, ...] = ()  # of the output of every block and branch, over the levels

    @property
    def latents(self) -> np.ndarray:
        """Where it ends: float32 [N, C, H, W]."""
        return np.asarray(self.data[-1])

    def samples_at(self, sigmas: Sequence[float]) -> np.ndarray:
        """X at any levels, in the variance-preserving space: float32 [len(sigmas), N, C, H, W].

        Between two of its levels it is where DPM-Solver++ 2M leads from the higher one; at 0, the
        end.
        """
        return np.stack([self._sample_at(sigma) for sigma in sigmas]).astype(np.float32)

    def _sample_at(self, sigma: float) -> np.ndarray:
        if sigma == 0:
            return self.latents
        i = max(int((self.sigmas >= sigma * (1 - 1e-6)).sum()) - 1, 0)
        from_level = self.sigmas[i]
        alpha, alpha_to = (1 / np.sqrt(1 + level**2) for level in (from_level, sigma))
        kept = sigma * alpha_to / (from_level * alpha)
        x0 = self.data[i]
        if 0 < i < len(self.sigmas) - 1:
            length, before = np.log(self.sigmas[[i, i - 1]] / [sigma, from_level])
            x0 = x0 + length / before / 2 * (x0 - self.data[i - 1])
        return np.asarray(kept * self.samples[i] + (alpha_to - alpha * kept) * x0)


def converged_solver(solver: SolverConfig, levels: int) -> SolverConfig:
    """DPM-Solver++ on ``levels`` Karras levels with exact, fractional timesteps."""
    training = solver.noise.sigmas()
    ends = training[[-1, 0]] ** (1 / 7)
    sigmas = np.linspace(ends[0], ends[1], levels) ** 7
    timesteps = np.interp(np.log(sigmas), np.log(training), np.arange(len(training)))
    return _on_levels(solver, sigmas, timesteps)


def _ours(sampling: Sampling) -> SolverConfig:
    """The sampling's solver, which is one of ours: presets with another need no converged run."""
    assert isinstance(sampling.solver, SolverConfig)
    return sampling.solver


def _on_levels(solver: SolverConfig, sigmas: np.ndarray, timesteps: np.ndarray) -> SolverConfig:
    """DPM-Solver++ 2M of the same model on a part of a fine grid."""
    grid = Grid("converged", tuple(sigmas.tolist()), tuple(timesteps.tolist()))
    prediction, noise = solver.prediction, solver.noise
    return SolverConfig(
        solver="dpm", steps=grid.steps, prediction=prediction, noise=noise, grid=grid
    )


def converged_run(
    sampling: Sampling, options: ConvergedOptions, *, observer: Observer = unobserved
) -> ConvergedRun:
    """Run the model on a fine grid.

    Args:
        sampling: model, prompts and guidance; its solver gives the noise schedule only.
        options: how fine, how many images; their prompts are spread evenly.
        observer: hears the levels done, stage "converge".
    """
    solver = converged_solver(_ours(sampling), options.levels)
    fine = replace(sampling, solver=solver)
    samples, data = [], []
    outputs: list[list[np.ndarray]] = [[] for _ in fine.model.blocks]
    with fine.cached_unet() as cached:
        denoiser, noise = fine.begin(cached, converged_jobs(fine, options))
        latents = noise
        for step, state in enumerate(denoiser.trajectory(noise, fine.uncached)):
            samples.append(latents.cpu().numpy())
            data.append(state.past[0].cpu().numpy())
            for own, kept in zip(outputs, state.kept, strict=True):
                own.append(sample_of(kept[0], SAMPLED).cpu().numpy())
            latents = state.latents
            observer("converge", step + 1, fine.steps)
    assert solver.grid is not None
    return ConvergedRun(
        np.array(solver.grid.sigmas),
        np.stack(samples),
        np.stack([*data, latents.cpu().numpy()]),
        tuple(Moments.of(np.stack(own)) for own in outputs),
    )


def fine_run(
    sampling: Sampling, jobs: Sequence[Job], *, observer: Observer = unobserved
) -> ConvergedRun:
    """The same of other images, on the sampling's own grid, which is a fine one; no moments.

    ``observer`` hears the steps done, stage "yardstick".
    """
    samples, data = [], []
    with sampling.cached_unet() as cached:
        denoiser, noise = sampling.begin(cached, jobs)
        latents = noise
        for step, state in enumerate(denoiser.trajectory(noise, sampling.uncached)):
            samples.append(latents.cpu().numpy())
            data.append(state.past[0].cpu().numpy())
            latents = state.latents
            observer("yardstick", step + 1, sampling.steps)
    grid = _ours(sampling).grid
    assert grid is not None
    return ConvergedRun(
        np.array(grid.sigmas), np.stack(samples), np.stack([*data, latents.cpu().numpy()])
    )


def measure_gains(
    sampling: Sampling,
    run: ConvergedRun,
    options: ConvergedOptions,
    *,
    observer: Observer = unobserved,
) -> np.ndarray:
    """How far an error at each level moves the final latents: float64 [M], relative to its size.

    At a few levels, the error that one coarse solver step makes there is put into the run and
    carried to the end in ``REST`` steps; in between, gains are log-linear.

    Args:
        sampling: as of ``converged_run``.
        run: its result.
        options: the same.
        observer: hears the levels done, stage "gains".
    """
    M = len(run.sigmas)
    at = np.unique(np.linspace(2, M - max(REST, M // 8), options.gains).astype(int))
    jobs = converged_jobs(sampling, options)[: options.carried]
    run = replace(run, samples=run.samples[:, : len(jobs)], data=run.data[:, : len(jobs)])
    measured = []
    for done, level in enumerate(at):
        measured.append(_gain(sampling, run, jobs, int(level)))
        observer("gains", done + 1, len(at))
    return np.exp(np.interp(np.arange(M), at, np.log(measured)))


def _gain(sampling: Sampling, run: ConvergedRun, jobs: Sequence[Job], level: int) -> float:
    """The gain at one level, mean over the images."""
    error = _coarse_error(run, max(level - REST, 0), level)
    rest = np.unique(np.linspace(level, len(run.sigmas) - 1, REST).astype(int))
    own = _ours(sampling)
    training = own.noise.sigmas()
    sigmas = run.sigmas[rest]
    timesteps = np.interp(np.log(sigmas), np.log(training), np.arange(len(training)))
    onward = replace(sampling, solver=_on_levels(own, sigmas, timesteps))
    with onward.cached_unet() as cached:
        denoiser, noise = onward.begin(cached, jobs)
        here = torch.from_numpy(run.samples[level]).to(noise.device)
        off = here + torch.from_numpy(error).to(noise.device)
        ends = [_carry(denoiser, latents, onward.steps) for latents in (here, off)]
    moved = (ends[1] - ends[0]).flatten(1).norm(dim=1).cpu().numpy()
    return float((moved / np.linalg.norm(error.reshape(len(error), -1), axis=1)).mean())


def _coarse_error(run: ConvergedRun, start: int, end: int) -> np.ndarray:
    """What a first-order step from one level to another does wrong: float32 [N, C, H, W]."""
    alpha = 1 / np.sqrt(1 + run.sigmas[[start, end]] ** 2)
    sigma = run.sigmas[[start, end]] * alpha
    kept = sigma[1] / sigma[0]
    landed = kept * run.samples[start] + (alpha[1] - alpha[0] * kept) * run.data[start]
    return np.asarray(landed - run.samples[end], np.float32)


@torch.no_grad()
def _carry(denoiser: Denoiser, latents: torch.Tensor, steps: int) -> torch.Tensor:
    """The final latents of a run that begins in the middle."""
    state = State(latents)
    for step in range(steps):
        state = denoiser.step(state, step)
    return state.latents


def converged_jobs(sampling: Sampling, options: ConvergedOptions) -> list[Job]:
    """The images of the run."""
    prompts = sampling.spread_prompts(options.images)
    return [(prompt, options.seed + image) for image, prompt in enumerate(prompts)]
