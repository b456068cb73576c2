"""Alignment by distillation, as the paper trains it (section 3.4, Fig. 5).

The student denoises with caching. At every step the teacher, the same U-Net without caching, sees
the student's own latents, and its output is the student's target. A linear layer on the timestep
embedding per block gives the coefficients; all else is frozen. It starts from coefficients that
are fitted already, and is folded into the same table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from blockcache.export.measure.sampling import Sampling
from blockcache.export.observer import Observer, unobserved
from blockcache.export.unet.cached_unet import CachedUNet, Denoiser
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import Alignment, Schedule


@dataclass(frozen=True, kw_only=True)
class DistillationOptions:
    """How long and how fast to train (paper: 15,000 iterations on eight GPUs)."""

    iterations: int = 40  # whole trajectories of one batch
    images_at_once: int = 4
    learning_rate: float = 3e-3  # of Adam; falls to 0 along a cosine
    seed: int = 1000  # of the noise

    def __post_init__(self) -> None:
        if min(self.iterations, self.images_at_once) < 1 or not self.learning_rate > 0:
            raise ConfigError(f"Expected iterations, images and a rate above 0; got {self}.")


class _Adjustment(torch.nn.Module):
    """Per block a linear layer on the timestep embedding, added to a table; zero at first."""

    def __init__(self, start: Alignment, schedule: Schedule, embeddings: torch.Tensor) -> None:
        super().__init__()
        self._start = [torch.from_numpy(table) for table in start.tables]
        self._reused = torch.from_numpy(~schedule.recompute)
        self._embeddings = embeddings / embeddings.norm(dim=1, keepdim=True)  # [S, E]
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(embeddings.shape[1], table[0].numel()) for table in self._start
        )
        for parameter in self.layers.parameters():
            torch.nn.init.zeros_(parameter)

    def rows(self, step: int) -> list[torch.Tensor]:
        """The coefficients of every block at a step, [2 or 3, C_k]."""
        embedding = self._embeddings[step]
        return [
            table[step] + self._reused[step, k] * layer(embedding).view_as(table[step])
            for k, (table, layer) in enumerate(zip(self._start, self.layers, strict=True))
        ]

    @torch.no_grad()
    def folded(self) -> Alignment:
        """All rows as a table."""
        rows = [self.rows(step) for step in range(len(self._reused))]
        return Alignment(tuple(torch.stack(table).numpy() for table in zip(*rows, strict=True)))


def distil(
    sampling: Sampling,
    schedule: Schedule,
    start: Alignment,
    options: DistillationOptions,
    *,
    observer: Observer = unobserved,
) -> Alignment:
    """Train the coefficients of every reused block and step.

    Args:
        sampling: what to run; prompts are drawn at random.
        schedule: which block is reused when.
        start: coefficients to start from; ``Alignment.identity`` for the paper's training.
        options: how long and how fast.
        observer: hears the iterations done, stage "distil".
    """
    random = np.random.default_rng(options.seed)
    with sampling.cached_unet(start.outputs) as cached:
        adjustment = _Adjustment(start, schedule, _timestep_embeddings(cached, sampling.timesteps))
        optimizer = torch.optim.Adam(adjustment.parameters(), lr=options.learning_rate)
        for iteration in range(options.iterations):
            observer("distil", iteration, options.iterations)
            rate = 0.5 * (1 + math.cos(math.pi * iteration / options.iterations))
            optimizer.param_groups[0]["lr"] = options.learning_rate * rate
            prompts = random.integers(0, sampling.calibration.prompts, options.images_at_once)
            jobs = [(prompt, options.seed + iteration) for prompt in prompts.tolist()]
            denoiser, noise = sampling.begin(cached, jobs)
            optimizer.zero_grad()
            _accumulate_gradients(denoiser, schedule, adjustment, noise)
            optimizer.step()
    observer("distil", options.iterations, options.iterations)
    return adjustment.folded()


def _accumulate_gradients(
    denoiser: Denoiser, schedule: Schedule, adjustment: _Adjustment, noise: torch.Tensor
) -> None:
    """One trajectory of the student; every step's loss is relative to its target's size."""
    state = denoiser.start(noise)
    for step, recompute in enumerate(schedule.recompute):
        with torch.no_grad():
            target, kept = denoiser.output(state, step)
        if recompute.all():
            state = denoiser.advance(state, target, kept, step)
            continue
        output, kept = denoiser.output(state, step, recompute, adjustment.rows(step))
        loss = (output - target).square().mean() / target.square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        # A step's gradient ends with the step.
        kept = tuple(tuple(each.detach() for each in outputs) for outputs in kept)
        state = denoiser.advance(state, output.detach(), kept, step)


@torch.no_grad()
def _timestep_embeddings(cached: CachedUNet, timesteps: np.ndarray) -> torch.Tensor:
    """What the U-Net makes of every step's timestep: float32 [S, E], on the CPU."""
    unet = cached.model.unet
    device = next(unet.parameters()).device
    told = torch.as_tensor(np.asarray(timesteps), dtype=torch.float32, device=device)
    embeddings: torch.Tensor = unet.time_embedding(unet.time_proj(told))
    return embeddings.cpu()
