"""A grid: the noise levels that a solver visits, and what the model is told at each of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blockcache.runtime.errors import ConfigError


@dataclass(frozen=True)
class Grid:
    """Falling noise levels [S], in the order of the steps; the last step ends at level 0.

    Examples:
        >>> Grid("mine", sigmas=(14.6, 1.5), timesteps=(999.0, 500.0)).steps
        2
    """

    name: str  # "karras", "auto", ...
    sigmas: tuple[float, ...]  # noise over signal, sigma / alpha, as diffusers counts it
    timesteps: tuple[float, ...]  # the scheduler's number that the model is conditioned on

    def __post_init__(self) -> None:
        for field in ("sigmas", "timesteps"):
            values = getattr(self, field)
            if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
                raise ConfigError(f"Grid {self.name!r}: expected {field} as numbers, got {values}.")
            object.__setattr__(self, field, tuple(float(value) for value in values))
        count, told = len(self.sigmas), len(self.timesteps)
        if count < 1 or count != told:
            raise ConfigError(
                f"Grid {self.name!r}: expected as many timesteps as sigmas, at least one; got "
                f"{count} sigmas and {told} timesteps."
            )
        if not all(math.isfinite(value) and value > 0 for value in self.sigmas):
            raise ConfigError(
                f"Grid {self.name!r}: expected finite sigmas above 0 (the end at 0 is added), got "
                f"{self.sigmas}."
            )
        if any(after >= before for before, after in itertools.pairwise(self.sigmas)):
            raise ConfigError(f"Grid {self.name!r}: expected falling sigmas, got {self.sigmas}.")
        if not all(math.isfinite(value) and value >= 0 for value in self.timesteps):
            raise ConfigError(
                f"Grid {self.name!r}: expected finite timesteps of 0 or more, got {self.timesteps}."
            )

    @property
    def steps(self) -> int:
        """S, the number of levels."""
        return len(self.sigmas)

    def to_json(self) -> dict[str, Any]:
        """Name, sigmas and timesteps, as values that JSON has."""
        return {
            "name": self.name,
            "sigmas": list(self.sigmas),
            "timesteps": list(self.timesteps),
        }

    @classmethod
    def from_json(cls, mapping: Any) -> Grid:
        """The inverse of ``to_json``; ConfigError for anything else."""
        wanted = {"name", "sigmas", "timesteps"}
        if not isinstance(mapping, Mapping) or set(mapping) != wanted:
            raise ConfigError(f"Expected a grid with {sorted(wanted)}, got {mapping!r}.")
        lists = (mapping["sigmas"], mapping["timesteps"])
        if not isinstance(mapping["name"], str) or not all(isinstance(x, list) for x in lists):
            raise ConfigError(f"Expected a grid's name and two lists, got {mapping!r}.")
        return cls(mapping["name"], tuple(lists[0]), tuple(lists[1]))
