"""The solver that a preset records: one of ours, or a scheduler of diffusers, run by the caller."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from blockcache.runtime.errors import ConfigError
from blockcache.runtime.solvers.noise import Float32
from blockcache.runtime.solvers.options import from_mapping, require
from blockcache.runtime.solvers.solver import SolverConfig, solver_tables

SCHEDULER = "scheduler"
"""What stands in a preset for the solver where diffusers has it."""


@dataclass(frozen=True, kw_only=True)
class DiffusersScheduler:
    """A scheduler of diffusers: the runtime knows its timesteps, and nothing of what it does.

    Steps are evaluations of the U-Net: Heun's takes 2 n - 1 for n ``inference_steps``.
    """

    scheduler: str  # the class
    config: Mapping[str, Any] = field(hash=False)  # what ``from_config`` takes
    inference_steps: int  # diffusers' num_inference_steps
    timesteps: tuple[float, ...]  # one an evaluation

    def __post_init__(self) -> None:
        name, config = self.scheduler, self.config
        is_name = isinstance(name, str) and name.isidentifier()
        require(is_name, "scheduler", "the name of a class", name, "Correct it.")
        require(isinstance(config, Mapping), "config", "options by name", config, "Correct it.")
        steps = self.inference_steps
        wanted = "a whole number of 1 or more"
        right = type(steps) is int and steps >= 1
        require(right, "inference_steps", wanted, steps, "Correct it.")
        times = self.timesteps
        right = isinstance(times, list | tuple) and len(times) > 0
        right = right and all(type(t) in (int, float) and math.isfinite(t) for t in times)
        require(right, "timesteps", "finite numbers, one an evaluation", times, "Correct it.")
        object.__setattr__(self, "timesteps", tuple(map(float, times)))
        try:
            json.dumps(dict(config), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"config: expected values that JSON has, got others: {error}."
            ) from None

    @property
    def steps(self) -> int:
        """S, the number of evaluations."""
        return len(self.timesteps)

    def to_json(self) -> dict[str, Any]:
        """As values that JSON has."""
        return {
            "solver": SCHEDULER,
            "steps": self.steps,
            "scheduler": self.scheduler,
            "config": dict(self.config),
            "inference_steps": self.inference_steps,
            "timesteps": list(self.timesteps),
        }

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> DiffusersScheduler:
        """The inverse of ``to_json``; ConfigError for anything else."""
        given = {key: value for key, value in mapping.items() if key not in ("solver", "steps")}
        made = from_mapping(cls, given)
        steps = mapping.get("steps")
        require(steps == made.steps, "steps", f"{made.steps} timesteps", steps, "Correct it.")
        return made


RecordedSolver: TypeAlias = SolverConfig | DiffusersScheduler


def recorded_solver(mapping: Mapping[str, Any]) -> RecordedSolver:
    """What a preset's ``solver`` says; ConfigError where it says nothing that can be."""
    is_theirs = isinstance(mapping, Mapping) and mapping.get("solver") == SCHEDULER
    return DiffusersScheduler.from_json(mapping) if is_theirs else SolverConfig.from_json(mapping)


def timesteps_of(solver: RecordedSolver) -> Float32:
    """What the U-Net is conditioned on at each step, float32 [S]."""
    if isinstance(solver, DiffusersScheduler):
        return np.asarray(solver.timesteps, np.float32)
    return solver_tables(solver).timesteps
