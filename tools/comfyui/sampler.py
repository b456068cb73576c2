"""A preset's own solver as a sampler of ComfyUI: the tables of ``Session.denoise``.

ComfyUI's samplers hold x = x0 + σ n, where σ is noise over signal, and are given x0. Our tables
hold α x (Euler's: x) and take the model's output g; both are linear in each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from blockcache.runtime.solvers.philox import standard_normal
from blockcache.runtime.solvers.solver import SCALED, SolverConfig, solver_tables


class PresetSampler:
    """A function of k-diffusion's form: ``sampler(model, x, sigmas, extra_args=...)``.

    Noise that the solver adds is of ``seed + n`` for image n of the batch, as in
    ``Session.denoise`` with those seeds.
    """

    __name__ = "blockcache"  # ComfyUI logs it

    def __init__(self, config: SolverConfig) -> None:
        self._tables, self._scaled = solver_tables(config), config.solver in SCALED
        self._of_velocity = config.prediction == "v_prediction"
        signal, noise = self._tables.noising.T
        self._levels = noise / signal

    def __call__(
        self,
        model: Callable[..., torch.Tensor],
        x: torch.Tensor,
        sigmas: torch.Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
    ) -> torch.Tensor:
        """Denoise x [N, C, H, W] over sigmas [S + 1], the preset's or a part of them."""
        extra = dict(extra_args or {})
        past: tuple[torch.Tensor, ...] = ()
        first = int(np.argmin(np.abs(self._levels - float(sigmas[0]))))
        for i in range(len(sigmas) - 1):
            denoised = model(x, sigmas[i] * x.new_ones([len(x)]), **extra)
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i],
                          "denoised": denoised})  # fmt: skip
            ends = float(sigmas[i]), float(sigmas[i + 1])
            x, past = self._step(first + i, ends, x, denoised, past, extra.get("seed") or 0)
        return x

    def _step(
        self,
        step: int,
        ends: tuple[float, float],
        x: torch.Tensor,
        x0: torch.Tensor,
        past: tuple[torch.Tensor, ...],
        seed: int,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The next x, and the last two x0, the latest first."""
        tables = self._tables
        row = (tables.first, tables.second, tables.coefficients)[len(past)][step].tolist()
        alpha, alpha_to = (1 / (1 + sigma * sigma) ** 0.5 for sigma in ends)
        held = x if self._scaled else alpha * x
        output = self._output(ends[0], alpha, x, x0)
        following = row[0] * held + row[1] * output
        for coefficient, before in zip(row[2:4], past, strict=False):
            following = following + coefficient * before
        if row[7]:
            seeds = np.arange(seed, seed + len(x), dtype=np.uint64)
            noise = standard_normal(seeds, step, x[0].numel())
            following = following + row[7] * torch.from_numpy(noise).reshape(x.shape).to(x)
        return following if self._scaled else following / alpha_to, (x0, *past[:1])

    def _output(
        self, sigma: float, alpha: float, x: torch.Tensor, x0: torch.Tensor
    ) -> torch.Tensor:
        """What the model said, from its x0: the noise n, or v = α n - α σ x0."""
        noise = (x - x0) / sigma
        return alpha * (noise - sigma * x0) if self._of_velocity else noise
