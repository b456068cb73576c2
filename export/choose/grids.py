"""Grids by name, as diffusers and the literature have them, and grids of one's own.

| name | the levels |
|---|---|
| ``karras`` | Karras et al. 2022, eq. 5, rho = 7 |
| ``exponential`` | evenly spaced in the logarithm |
| ``lu`` | Lu et al. 2022, rho = 1: the exponential levels with other timesteps |
| ``beta`` | quantiles of a Beta(0.6, 0.6) distribution, spread over sigma |
| ``ays-sd15``, ``ays-sdxl`` | Align Your Steps (Sabour et al. 2024), log-linear between its ten |
| ``FILE.json`` | a list of one's own: sigma / alpha of every step, falling, all above 0 |

The timesteps are those that diffusers' DPMSolverMultistepScheduler gives the model at these levels:
it rounds Karras' and Lu's, and cuts off the fractions of the exponential and beta ones. The grids
``linspace``, ``leading`` and ``trailing`` are a scheduler's ``timestep_spacing``; ``SolverConfig``
has them. The grid ``auto`` is measured (``grid_search.py``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from blockcache.runtime.errors import ConfigError, MissingExtraError
from blockcache.runtime.solvers.grid import Grid

SPACINGS = ("linspace", "leading", "trailing")
AUTO = "auto"

ALIGN_YOUR_STEPS = {
    "ays-sd15": (
        *(14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092),
        *(0.9642583904, 0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582),
    ),
    "ays-sdxl": (
        *(14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141),
        *(0.5550693289, 0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582),
    ),
}
"""Levels of the published ten steps; where the last one ends stands for 0."""


def _karras(high: float, low: float, steps: int) -> np.ndarray:
    high, low = high ** (1 / 7), low ** (1 / 7)
    return np.asarray((high + np.linspace(0, 1, steps) * (low - high)) ** 7)


def _exponential(high: float, low: float, steps: int) -> np.ndarray:
    return np.asarray(np.exp(np.linspace(np.log(high), np.log(low), steps)))


def _beta(high: float, low: float, steps: int) -> np.ndarray:
    try:
        from scipy.stats import beta
    except ImportError as error:
        raise MissingExtraError("The grid 'beta' needs scipy: pip install scipy.") from error
    return np.asarray(low + beta.ppf(1 - np.linspace(0, 1, steps), 0.6, 0.6) * (high - low))


_FORMULAS: dict[str, tuple[Callable[[float, float, int], np.ndarray], Callable[..., np.ndarray]]]
_FORMULAS = {
    "karras": (_karras, np.round),
    "exponential": (_exponential, np.trunc),
    "lu": (_exponential, np.round),
    "beta": (_beta, np.trunc),
}
NAMES = (*_FORMULAS, *ALIGN_YOUR_STEPS)
"""What ``named_grid`` knows."""


def named_grid(name: str, training: np.ndarray, steps: int) -> Grid:
    """The grid of this name with ``steps`` levels.

    Args:
        name: one of ``NAMES``.
        training: float64 [T], sigma / alpha of every training timestep, rising.
        steps: S.

    Raises:
        ConfigError: an unknown name.
        MissingExtraError: ``beta`` without scipy.
    """
    if name in ALIGN_YOUR_STEPS:
        return grid_of(name, interpolated(ALIGN_YOUR_STEPS[name], steps), training)
    if name not in _FORMULAS:
        known = ", ".join((AUTO, *SPACINGS, *NAMES))
        raise ConfigError(f"Expected a grid of {known}; got {name!r}.")
    levels, whole = _FORMULAS[name]
    sigmas = levels(float(training[-1]), float(training[0]), steps)
    timesteps = whole(timesteps_of(sigmas, training))
    return Grid(name, _float32(sigmas), tuple(timesteps.tolist()))


def grid_of(name: str, sigmas: Sequence[float] | np.ndarray, training: np.ndarray) -> Grid:
    """A grid of levels that somebody chose, with the nearest whole timesteps.

    Whole numbers cost nothing that can be seen in a picture, and code that looks a timestep up in a
    table finds it.
    """
    timesteps = np.round(timesteps_of(np.asarray(sigmas, np.float64), training))
    return Grid(name, _float32(sigmas), tuple(timesteps.tolist()))


def read_levels(file: Path, steps: int) -> tuple[float, ...]:
    """A list of one's own: JSON, as many falling levels above 0 as there are steps.

    Raises:
        ConfigError: no such file, or anything else in it.
    """
    if not file.is_file():
        raise ConfigError(f"Expected a list of noise levels at {file}, found no such file.")
    try:
        levels = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"Expected JSON in {file}, got: {error}.") from error
    wanted = (
        f"{steps} falling numbers above 0 in {file} (sigma / alpha of every step, no 0 at the end)"
    )
    if not isinstance(levels, list) or len(levels) != steps:
        got = f"{len(levels)}" if isinstance(levels, list) else type(levels).__name__
        raise ConfigError(f"Expected {wanted}, got {got}.")
    try:
        return Grid(file.stem, tuple(levels), (0.0,) * steps).sigmas
    except ConfigError as error:
        raise ConfigError(f"Expected {wanted}. {error}") from None


def interpolated(levels: Sequence[float], steps: int) -> np.ndarray:
    """Levels [S] of a published table of n + 1 levels, log-linear in the step's number."""
    places = np.linspace(0, 1, steps + 1)
    table = np.log(np.asarray(levels, np.float64))
    found = np.exp(np.interp(places, np.linspace(0, 1, len(table)), table))
    return np.asarray(found[:-1])  # the last level of a table stands for 0


def timesteps_of(sigmas: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Timesteps [S], fractional, at which training has these levels; linear in log sigma."""
    known = np.log(training.astype(np.float32))
    return np.asarray(np.interp(np.log(np.maximum(sigmas, 1e-10)), known, np.arange(len(known))))


def _float32(sigmas: Sequence[float] | np.ndarray) -> tuple[float, ...]:
    """To float32 and back: the solvers hold levels so, and equal grids are then equal."""
    return tuple(np.asarray(sigmas, np.float64).astype(np.float32).astype(np.float64).tolist())
