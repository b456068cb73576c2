"""What presets are compared with: the same without caching, and the model without cuts."""

from __future__ import annotations

import dataclasses

from blockcache.runtime import Alignment, Bundle, ConfigError, Preset, Schedule
from blockcache.runtime.solvers.recorded import recorded_solver, timesteps_of


def whole_bundle(bundle: Bundle) -> Bundle:
    """The bundle as if it held the uncut model only: one trunk segment and no block."""
    uncut = [segment for segment in bundle.segments if segment.role == "whole"]
    if not uncut:
        raise ConfigError("This bundle holds no whole model to compare with. Compile it again.")
    model = dataclasses.replace(bundle.model, blocks=(), outputs=1)
    manifest = dataclasses.replace(
        bundle.manifest, model=model, segments=(dataclasses.replace(uncut[0], role="trunk"),)
    )
    return dataclasses.replace(bundle, manifest=manifest)


def whole_preset(preset: Preset) -> Preset:
    """The preset for ``whole_bundle``: the model reads the timestep itself."""
    timesteps = timesteps_of(recorded_solver(preset.solver))
    return dataclasses.replace(
        preset,
        schedule=Schedule.uncached(preset.schedule.steps, 1),
        alignment=Alignment.identity(preset.schedule.steps, (1,)),
        time_tables={"timestep": timesteps[:, None]},
    )


def uncached(preset: Preset) -> Preset:
    """The preset with every block recomputed at every step."""
    channels = tuple(table.shape[2] for table in preset.alignment.tables)
    steps, blocks = preset.schedule.steps, preset.schedule.blocks
    return dataclasses.replace(
        preset,
        schedule=Schedule.uncached(steps, blocks),
        alignment=Alignment.identity(steps, channels, preset.alignment.outputs),
    )
