"""The noise levels of a model's training, equal to diffusers' to the last bit (float32)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blockcache.runtime.solvers.options import check_types, require

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""Formulas of the betas, by diffusers' names."""


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """The training noise schedule, by its betas (Ho et al. 2020, eq. 2).

    ``trained_betas`` replace the formula; ``rescale_zero_snr``: Lin et al. 2024, alg. 1.
    """

    train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_zero_snr: bool = False

    def __post_init__(self) -> None:
        check_types(self, {"beta_schedule": BETA_SCHEDULES})
        if self.trained_betas is not None:
            object.__setattr__(self, "trained_betas", tuple(map(float, self.trained_betas)))
            count, T = len(self.trained_betas), self.train_timesteps
            require(count == T, "trained_betas", f"{T} (train_timesteps)", count, "Correct it.")
        levels = self.alphas_cumprod()
        noisy = levels[:-1] if self.rescale_zero_snr else levels
        falling = np.all((noisy > 0) & (noisy < 1)) and np.all(np.diff(levels) < 0)
        wanted = "1 - beta whose products fall, in float32, from below 1 to above 0"
        require(falling, "noise", wanted, levels[[0, -1]].tolist(), "Correct the betas.")

    def alphas_cumprod(self) -> Float64:
        """Cumulative product of 1 - beta (α²), float64 [T]; the last is 0 at zero terminal SNR."""
        levels = _cumulative_product(self._betas())
        if self.rescale_zero_snr:
            root = np.sqrt(levels)
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
            squared = root * root
            ratios = np.append(squared[:1], squared[1:] / squared[:-1])
            levels = _cumulative_product(np.float32(1) - ratios)
        return levels.astype(np.float64)

    def sigmas(self) -> Float64:
        """Noise-to-signal ratio σ/α, float64 [T]; the last is 4096 at zero terminal SNR."""
        levels = self.alphas_cumprod().astype(np.float32)
        if self.rescale_zero_snr:
            levels[-1] = 2.0**-24  # as diffusers, so that it is finite
        return np.asarray(np.sqrt((np.float32(1) - levels) / levels), dtype=np.float64)

    def _betas(self) -> Float32:
        T = self.train_timesteps
        if self.trained_betas is not None:
            return np.asarray(self.trained_betas, dtype=np.float32)
        if self.beta_schedule == "squaredcos_cap_v2":
            bar = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
            return np.asarray(np.minimum(1 - bar[1:] / bar[:-1], 0.999), dtype=np.float32)
        power = 2 if self.beta_schedule == "scaled_linear" else 1
        root = _linspace32(self.beta_start ** (1 / power), self.beta_end ** (1 / power), T)
        return np.asarray(root**power, dtype=np.float32)


def _cumulative_product(betas: Float32) -> Float32:
    return np.cumprod((np.float32(1) - betas).astype(np.float64)).astype(np.float32)


def _linspace32(start: float, end: float, count: int) -> Float32:
    """torch.linspace in float32: float32 ends and step, each half counted from its own end."""
    first, last, index = np.float32(start), np.float32(end), np.arange(count)
    step = float((last - first) / np.float32(max(count - 1, 1)))
    low, high = float(first) + step * index, float(last) - step * (count - 1 - index)
    return np.where(index < max(count // 2, 1), low, high).astype(np.float32)
