"""Residuals: what is left of a reuse's error, by the step whose output is reused.

A budget must know what the image loses when a block's output is reused for many steps, after the
alignment has repaired what it can. Accumulated change (eq. 7) does not tell: it adds up the steps
in between as if each moved the output in a new direction, and it leaves alignment out. So compile
runs a few images once, keeps samples of every block's output at every step, and fits each later
output by the earlier ones in closed form, as the alignment will:

    ratio[k, s, a] = |C_s - estimate(C_a)| / |C_s - C_{s-1}|

or ``[k, s, a, b]`` where the output computed before, C_b, takes part. Times the sensitivity, which
measures what reusing C_{s-1} at step s does to the image, that is what any reuse does to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from blockcache.export.measure.reuse import HISTORY, PLAIN, REUSES, SCALE_SHIFT
from blockcache.export.measure.sampling import Sampling
from blockcache.export.observer import Observer, unobserved
from blockcache.runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ResidualOptions:
    """How much to measure."""

    images: int = 8
    channels: int = 64  # sampled of a block's output, at most
    positions: int = 64  # sampled of an image, at most
    seed: int = 13  # of noise and samples

    def __post_init__(self) -> None:
        if min(self.images, self.channels, self.positions) < 1:
            raise ConfigError(f"Expected an image, channel and position at least; got {self}.")


def measure_residuals(
    sampling: Sampling, reuse: str, options: ResidualOptions, *, observer: Observer = unobserved
) -> np.ndarray:
    """Run the uncached loop and fit every output by earlier ones.

    Args:
        sampling: what to run; the images' prompts are spread evenly over its own.
        reuse: ``PLAIN``, ``SCALE_SHIFT`` or ``HISTORY``: what takes the place of the output.
        options: how much to measure.
        observer: hears the steps done, stage "residuals".

    Returns:
        ``ratio[k, s, a]``, float32 [K, S, S], defined for a < s; with history
        ``ratio[k, s, a, b]``, [K, S, S, S], for b <= a < s, where b = a stands for no earlier
        output. 0 elsewhere.
    """
    prompts = sampling.spread_prompts(options.images)
    jobs = [(prompt, options.seed + image) for image, prompt in enumerate(prompts)]
    samples: list[list[torch.Tensor]] = [[] for _ in sampling.model.blocks]
    with sampling.cached_unet() as cached:
        denoiser, noise = sampling.begin(cached, jobs)
        for step, state in enumerate(denoiser.trajectory(noise, sampling.uncached)):
            for sampled, outputs in zip(samples, state.kept, strict=True):
                sampled.append(sample_of(outputs[0], options))
            observer("residuals", step + 1, sampling.steps)
    return np.stack([ratios(torch.stack(sampled).cpu().numpy(), reuse) for sampled in samples])


def sample_of(output: torch.Tensor, options: ResidualOptions) -> torch.Tensor:
    """The same channels and positions at every step: [B, C, H, W] to float32 [c, B * p]."""
    random = torch.Generator().manual_seed(options.seed)
    values = output.flatten(2)
    for axis, most in ((1, options.channels), (2, options.positions)):
        chosen = torch.randperm(values.shape[axis], generator=random)[:most]
        values = values.index_select(axis, chosen.to(values.device))
    return values.transpose(0, 1).flatten(1).float()


def ratios(outputs: np.ndarray, reuse: str) -> np.ndarray:
    """``ratio`` of one block from samples of its output: float32 [S, S] or [S, S, S].

    Args:
        outputs: float [S, C, N], N samples of every channel at every step.
        reuse: as of ``measure_residuals``.
    """
    steps, moments = len(outputs), Moments.of(outputs)
    covariance = moments.covariance
    plain = np.maximum(_difference(covariance, moments.mean), 0.0)
    if reuse == PLAIN:
        squares = plain
    elif reuse == SCALE_SHIFT:
        squares = _after_one(covariance).sum(axis=0)
    elif reuse == HISTORY:
        squares = errors_by_two(covariance) ** 2
    else:
        raise ConfigError(f"Expected a reuse of {REUSES}, got {reuse!r}.")
    change = moments.changes()
    # Where a block hardly changes, divide by a tenth of the mean: the quotient would say nothing.
    floor = 0.1 * change[1:].mean() if steps > 1 else 1.0
    scale = np.maximum(np.maximum(change, floor), 1e-30)
    table = np.sqrt(np.maximum(squares, 0.0)) / scale.reshape(-1, *[1] * (squares.ndim - 1))
    result: np.ndarray = np.where(_earlier(squares.shape), table, 0.0).astype(np.float32)
    return result


@dataclass(frozen=True)
class Moments:
    """First and second moments of one output over steps, per channel: all that fits need."""

    mean: np.ndarray  # float64 [C, S]
    covariance: np.ndarray  # float64 [C, S, S]

    @classmethod
    def of(cls, outputs: np.ndarray) -> Moments:
        """Of samples: float [S, C, N], N samples of every channel at every step."""
        flat = outputs.astype(np.float64).transpose(1, 0, 2)
        mean = flat.mean(axis=2)
        centred = flat - mean[:, :, None]
        return cls(mean, centred @ centred.transpose(0, 2, 1) / outputs.shape[2])

    def at(self, steps: Sequence[int]) -> Moments:
        """Of some of the steps."""
        chosen = np.asarray(steps)
        return Moments(self.mean[:, chosen], self.covariance[:, chosen[:, None], chosen])

    def changes(self) -> np.ndarray:
        """|C_s - C_{s-1}|, 0 at the first step: float64 [S]."""
        plain = _difference(self.covariance, self.mean).diagonal(-1)
        return np.asarray(np.sqrt(np.append(0.0, np.maximum(plain, 0.0))))


def errors_by_two(covariance: np.ndarray) -> np.ndarray:
    """|C_s - estimate(C_a, C_b)| with history, per step s, a, b: [C, S, S] to float64 [S, S, S]."""
    squares = np.stack([_after_two(covariance, s) for s in range(covariance.shape[1])])
    return np.asarray(np.sqrt(np.maximum(squares, 0.0)))


def _difference(covariance: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Sum over channels of the mean of (C_s - C_a)^2: [S, S]."""
    second = (covariance + mean[:, :, None] * mean[:, None, :]).sum(axis=0)
    size = second.diagonal()
    difference: np.ndarray = size[:, None] + size[None, :] - 2 * second
    return difference


def _after_one(covariance: np.ndarray) -> np.ndarray:
    """Variance of C_s that a scale of C_a and a shift leave, per channel: [C, S, S]."""
    variance = np.einsum("css->cs", covariance)
    explained = covariance**2 / np.maximum(variance, 1e-30)[:, None, :]
    left: np.ndarray = variance[:, :, None] - explained
    return left


def _after_two(covariance: np.ndarray, step: int) -> np.ndarray:
    """The same for one step s with C_a - C_b as another predictor, all channels: [S, S].

    Both are first freed of what C_a explains: stable where C_a and C_b are nearly the same.
    """
    variance = np.maximum(np.einsum("css->cs", covariance), 1e-30)
    left = variance[:, step, None] - covariance[:, step] ** 2 / variance  # [C, a]
    slope = covariance[:, step] / variance  # of C_s on C_a, [C, a]
    # C_a - C_b less its projection on C_a is C_b less its own, up to the sign.
    own = variance[:, None, :] - covariance**2 / variance[:, :, None]  # [C, a, b]
    shared = covariance[:, step, None, :] - slope[:, :, None] * covariance
    resolved = own > 1e-6 * variance[:, None, :]  # else rounding
    gain = np.where(resolved, shared**2 / np.where(resolved, own, 1.0), 0.0)
    total: np.ndarray = (left[:, :, None] - np.minimum(gain, left[:, :, None])).sum(axis=0)
    return total


def _earlier(shape: tuple[int, ...]) -> np.ndarray:
    """Where a < s, and b <= a."""
    index = np.indices(shape)
    inside: np.ndarray = index[1] < index[0]
    return inside if len(shape) == 2 else inside & (index[2] <= index[1])
