"""The grid ``auto``: the levels whose steps, together, err the least (a shortest path).

One converged run of a few images is known: its sample x_i and data prediction d_i at M fine levels.
From them follows, without another evaluation of the U-Net, how far any single solver step i -> j
lands beside the run: DPM-Solver++ (2M) computes

    x'_j = kept x_i + w ((1 + k) d_i - k d_p),      kept = s_j / s_i,  w = a_j - a_i s_j / s_i,

with p the level before i, and the error is x'_j - x_j. The squared norm of such a combination is a
quadratic form in the inner products of all x and d, so that the price of every triple (p, i, j) is
arithmetic on [M, M, M] numbers, whatever the size of a latent.

An error at level j moves the final latents by its *gain*, measured at a few levels. The grid is the
shortest path over pairs of levels, where an edge costs (gain_j * error)^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from blockcache.runtime.errors import ConfigError


@dataclass(frozen=True)
class StepCosts:
    """What every solver step between fine levels adds to the error of the final latents.

    A cost is a relative L2 distance: of the final latents, mean over images.
    """

    sigmas: np.ndarray  # float64 [M], falling: the fine levels
    steps: np.ndarray  # float64 [M, M, M]: from i to j after p; [i, i, j]: without a level before
    last: np.ndarray  # float64 [M]: the step of first order from i to 0

    def predicted(self, chain: list[int]) -> float:
        """The error of a grid, given as indices of fine levels."""
        steps = [self.steps[chain[0], chain[0], chain[1]]] if len(chain) > 1 else []
        steps += [self.steps[p, i, j] for p, i, j in zip(chain, chain[1:], chain[2:], strict=False)]
        return float(np.sqrt(np.square(steps).sum() + self.last[chain[-1]] ** 2))

    def nearest(self, sigmas: np.ndarray) -> list[int]:
        """The fine levels nearest to other ones, in the logarithm."""
        apart = np.log(self.sigmas)[:, None] - np.log(sigmas)[None]
        return [int(index) for index in np.abs(apart).argmin(0)]


def step_costs(
    sigmas: np.ndarray, samples: np.ndarray, data: np.ndarray, gains: np.ndarray
) -> StepCosts:
    """The costs of all steps between the levels of a converged run.

    Args:
        sigmas: float64 [M], sigma / alpha, falling.
        samples: float [M, N, ...], x at each level, in the variance-preserving space.
        data: float [M + 1, N, ...], the data prediction at each level, then the final latents.
        gains: float64 [M], how an error at a level moves the final latents.
    """
    M, N = samples.shape[:2]
    total = np.zeros((M, M, M))
    last = np.zeros(M)
    for image in range(N):
        x = samples[:, image].reshape(M, -1).astype(np.float64)
        d = data[:, image].reshape(M + 1, -1).astype(np.float64)
        size = np.linalg.norm(d[-1])
        total += np.sqrt(_squared_errors(sigmas, x, d[:-1])) / size
        last += np.linalg.norm(d[:-1] - d[-1], axis=1) / size
    later = np.arange(M)[:, None] < np.arange(M)[None]  # i before j
    possible = later[None] & (np.arange(M)[:, None] <= np.arange(M)[None])[:, :, None]  # p <= i < j
    costs = np.where(possible, total / N * gains, np.inf)
    return StepCosts(np.asarray(sigmas, np.float64), costs, last / N)


def _squared_errors(sigmas: np.ndarray, x: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Squared norm of x'_j - x_j for every (p, i, j): float64 [M, M, M]."""
    a = 1 / np.sqrt(1 + np.asarray(sigmas, np.float64) ** 2)
    s = sigmas * a
    kept = s[None] / s[:, None]  # [i, j]
    weight = a[None] - a[:, None] * kept
    # The error is r[i, j] - w k (d_p - d_i), where r is that of the step of first order.
    xx, xd, dd = x @ x.T, x @ d.T, d @ d.T
    diagonal = np.diag
    r_r = diagonal(xx)[None] + kept**2 * diagonal(xx)[:, None] + weight**2 * diagonal(dd)[:, None]
    r_r += -2 * kept * xx - 2 * weight * xd.T + 2 * kept * weight * diagonal(xd)[:, None]
    logs = np.log(sigmas)
    step = logs[:, None] - logs[None]  # [i, j]
    before = logs[:, None] - logs[None]  # [p, i]
    with np.errstate(divide="ignore", invalid="ignore"):
        k = np.where(before[:, :, None] > 0, step[None] / before[:, :, None] / 2, 0.0)
    # Inner products of r[i, j] = kept x_i + w d_i - x_j with d_p, then with d_p - d_i.
    r_d = kept[None] * xd.T[:, :, None] + weight[None] * dd[:, :, None] - xd.T[:, None]  # [p, i, j]
    own = np.einsum("iij->ij", r_d)
    apart = diagonal(dd)[:, None] - 2 * dd + diagonal(dd)[None]  # |d_p - d_i|^2
    factor = weight[None] * k
    squared: np.ndarray = r_r[None] - 2 * factor * (r_d - own[None]) + factor**2 * apart[:, :, None]
    return squared.clip(min=0)


def shortest_path(costs: StepCosts, steps: int) -> tuple[np.ndarray, float]:
    """The best grid of ``steps`` levels: sigmas float64 [S], and its predicted error.

    It begins at the first fine level: all the noise. Dynamic programming over pairs of levels.

    Raises:
        ConfigError: fewer fine levels than steps.
    """
    M = len(costs.sigmas)
    if not 1 <= steps <= M:
        raise ConfigError(f"Expected 1 to {M} steps for a grid chosen among {M}, got {steps}.")
    if steps == 1:
        return costs.sigmas[:1].copy(), costs.predicted([0])
    squared = costs.steps**2
    best = np.full((M, M), np.inf)  # [i, j]: the cheapest chain that ends in i, j
    best[0] = squared[0, 0]
    came_from = []
    free = squared.copy()
    free[np.arange(M), np.arange(M)] = np.inf  # a step without a level before it starts a chain
    for _ in range(steps - 2):
        total = best[:, :, None] + free
        came_from.append(total.argmin(0))
        best = total.min(0)
    best = best + costs.last[None] ** 2
    i, j = np.unravel_index(int(best.argmin()), best.shape)
    chain = [int(j), int(i)]
    for origin in reversed(came_from):
        chain.append(int(origin[chain[-1], chain[-2]]))
    chain.reverse()
    return costs.sigmas[chain].copy(), float(np.sqrt(best[i, j]))
