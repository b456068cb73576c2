"""From a preset as it is asked for to its tables: measure, choose, align, tabulate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blockcache.export.choose.joint import candidates
from blockcache.export.choose.policies import Evidence, Joint, Needs
from blockcache.export.choose.preset import PresetOptions
from blockcache.export.costs.costs import Costs
from blockcache.export.graph.time_tables import time_tables
from blockcache.export.measurements import Measurements
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import (
    Alignment,
    BlockFacts,
    ModelFacts,
    Preset,
    Schedule,
    Segment,
)
from blockcache.runtime.provenance import Provenance
from blockcache.runtime.solvers.solver import solver_tables


def _is_part(block: BlockFacts, cuts: Sequence[int]) -> bool:
    return block.cut in cuts if cuts else block.cut is None


@dataclass(frozen=True)
class PresetMaker:
    """What the presets of one compile are made from."""

    measurements: Measurements
    costs: Costs
    facts: ModelFacts
    segments: tuple[Segment, ...]
    folder: Path  # the bundle's, where the segments' files lie

    def make(self, preset: PresetOptions, *, trial: bool = False) -> Preset:
        """Schedule, alignment and time tables of a preset; a trial's reports are not kept.

        Raises:
            ConfigError: a budget that no schedule keeps.
        """
        if isinstance(preset.policy, Joint):
            return self._make_joint(preset)
        needs, part = preset.policy.needs, self._part(preset)
        profile = self.measurements.profile(preset) if Needs.CHANGE in needs and not trial else None
        found = self.measurements.sensitivity(preset) if Needs.LOSSES in needs else None
        evidence = Evidence(
            steps=preset.steps,
            paths=[self.facts.blocks[k].path for k in part],
            costs=self.costs,
            change=None if profile is None else profile.mean,
            sensitivity=None if found is None else found.table,
            gains=None if found is None else found.gains,
            residuals=self.measurements.residuals(preset) if Needs.LOSSES in needs else None,
        )
        chosen = preset.policy.schedule(evidence)  # of the part, as all that is measured
        recompute = np.ones((preset.steps, len(self.facts.blocks)), np.bool_)
        recompute[:, part] = chosen.recompute
        schedule = Schedule(recompute)
        provenance = Provenance(
            kind=preset.policy.kind,
            value=preset.policy.value,
            costs=self.costs.source,
            predicted_speedup=round(self.costs.speedup(schedule), 6),
            predicted_loss=(
                round(preset.policy.loss(evidence, chosen), 6) if Needs.LOSSES in needs else None
            ),
            images=None if profile is None else profile.images,
            profile=None if profile is None else profile.file,
        )
        alignment = Alignment.identity(preset.steps, self.facts.block_channels)
        if preset.alignment != "none" and not schedule.recompute.all():
            fit, report = self.measurements.alignment(preset, chosen, trial=trial)
            tables = list(alignment.combining(fit.alignment.outputs).tables)
            for k, table in zip(part, fit.alignment.tables, strict=True):
                tables[k] = table
            alignment = Alignment(tuple(tables))
            provenance = dataclasses.replace(
                provenance, alignment=preset.alignment, alignment_report=report
            )
        config = self.measurements.solver(preset)
        return Preset(
            name=preset.name,
            solver=config.to_json(),
            schedule=schedule,
            alignment=alignment.combining(self.facts.outputs),
            time_tables=time_tables(self.segments, self.folder, solver_tables(config).timesteps),
            guidance_scale=self.measurements.guidance_scale,
            provenance=provenance,
        )

    def _part(self, preset: PresetOptions) -> list[int]:
        """What the preset may reuse: the blocks, or the branches that its policy names."""
        cuts = preset.policy.cuts
        return [k for k, block in enumerate(self.facts.blocks) if _is_part(block, cuts)]

    def _make_joint(self, preset: PresetOptions) -> Preset:
        """The candidate that lands nearest to the uncached run of all steps."""
        tried: list[tuple[float, PresetOptions]] = []
        for other in candidates(preset, self.costs):
            made = self.make(other, trial=True)
            distance = self.measurements.distance(other, made.schedule, made.alignment, preset)
            if np.isfinite(distance):
                tried.append((distance, other))
        if not tried:
            raise ConfigError(f"Preset {preset.name!r}: no candidate ended in finite latents.")
        distance, best = min(tried, key=lambda pair: pair[0])
        alignment = "none" if best.alignment == "none" else preset.alignment
        winner = dataclasses.replace(best, name=preset.name, alignment=alignment)
        made = self.make(winner)
        provenance = dataclasses.replace(
            made.provenance,
            kind=preset.policy.kind,
            value=preset.policy.value,
            replaced_steps=preset.steps,
            predicted_speedup=round(self.costs.speedup(made.schedule, preset.steps), 6),
            predicted_loss=round(distance, 6),  # of the trial: fewer steps lose something, too
            tried={other.steps: round(distance, 6) for distance, other in tried},
        )
        return dataclasses.replace(made, provenance=provenance)
