"""A solver fitted to its model, grid and schedule, in closed form.

A solver's coefficients assume small steps and know no model. Few large steps of a known model can
do better: the coefficients of each step become numbers that are fitted to it (Shaul et al. 2024,
Bespoke Non-Stationary Solvers, arXiv 2403.01329, who train them; here they are least squares).

The student denoises images whose converged run is known. At each step the coefficients are found
that lead it nearest to where the converged run is at the next level, and the student goes on with
them. So a step also takes back what the steps before it and reused outputs did wrong.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from blockcache.export.unet.steps import Past, TableSteps
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.solvers.solver import FITTED, SolverConfig, solver_tables

RIDGE = 1e-4
"""Pull toward the step of first order, relative to a term's size."""


@dataclass(frozen=True)
class Targets:
    """Where the first n images of a sweep should be, before every step and at the end."""

    samples: torch.Tensor  # float32 [S + 1, n, C, H, W], as the solver counts its sample

    def check(self, steps: int, images: int) -> None:
        """ConfigError where they are not of so many steps, or of more images than there are."""
        if len(self.samples) != steps + 1 or not 1 <= self.samples.shape[1] <= images:
            raise ConfigError(
                f"Expected targets of {steps} steps and the end, for 1 to {images} images; got "
                f"{tuple(self.samples.shape[:2])}."
            )


def first_order(solver: SolverConfig) -> TableSteps:
    """The steps that coefficients are fitted to; all remember x0."""
    none = ((0.0,) * len(FITTED),) * solver.steps
    return TableSteps(solver_tables(dataclasses.replace(solver, fitted=none)))


def fitted_step(
    steps: TableSteps,
    latents: torch.Tensor,
    past: Past,
    output: torch.Tensor,
    step: int,
    target: torch.Tensor,
) -> tuple[torch.Tensor, Past, tuple[float, ...]]:
    """A step with the coefficients that fit it best: where it leads, what is remembered, c0 to c3.

    Args:
        steps: of ``first_order``.
        latents: [N, C, H, W], before the step.
        past: the x0 of up to two steps before, the latest first.
        output: [N, C, H, W], the guided model output.
        step: which one.
        target: [n, C, H, W], where the first n images should be after it.
    """
    landed, remembered = steps.advance(latents, past, output, step)
    x0 = remembered[0]
    terms = [latents, x0]
    terms += [x0 - past[0]] if past else []
    terms += [past[0] - past[1]] if len(past) > 1 else []
    n = len(target)
    columns = torch.stack([term[:n].flatten() for term in terms], dim=1).double()
    products = columns.T @ columns
    # What is zero, as x0 where a model always says 0, gets no weight.
    penalty = RIDGE * products.diagonal() + torch.finfo(torch.float64).tiny
    missed = (target.to(landed) - landed[:n]).flatten().double()
    found = torch.linalg.solve(products + penalty.diag(), columns.T @ missed).float()
    for coefficient, term in zip(found, terms, strict=True):
        landed = landed + coefficient * term
    return landed, remembered, (*found.tolist(), *(0.0,) * (len(FITTED) - len(terms)))
