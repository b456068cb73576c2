"""The yardstick: the run that presets come nearer to the finer their steps are."""

from __future__ import annotations

import dataclasses

from blockcache.export import ConvergedOptions
from blockcache.export.graph.time_tables import time_tables
from blockcache.export.measure.converged import converged_solver
from blockcache.runtime import Alignment, Bundle, Preset, Provenance, Schedule, SolverConfig
from blockcache.runtime.solvers.solver import STOCHASTIC, solver_tables

CONVERGED = "converged"


def has_converged_run(preset: Preset) -> bool:
    """Whether more steps lead its solver to one picture: not where it adds noise at every step."""
    return preset.solver["solver"] not in STOCHASTIC


def converged_preset(bundle: Bundle, like: Preset) -> Preset:
    """The uncached run on a grid so fine that more steps change nothing, as a preset.

    Args:
        bundle: whose segments run it.
        like: one of its presets: model, noise schedule and guidance are its own.
    """
    solver = converged_solver(SolverConfig.from_json(like.solver), ConvergedOptions().levels)
    tables = solver_tables(solver)
    channels = tuple(block.channels for block in bundle.model.blocks)
    return dataclasses.replace(
        like,
        name=CONVERGED,
        solver=solver.to_json(),
        schedule=Schedule.uncached(solver.steps, len(channels)),
        alignment=Alignment.identity(solver.steps, channels, like.alignment.outputs),
        time_tables=time_tables(bundle.segments, bundle.folder, tables.timesteps),
        provenance=Provenance(kind="uncached"),
    )
