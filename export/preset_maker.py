"""From a preset as it is asked for to its tables: measure, choose, align, tabulate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blockcache.export.choose.joint import (
    Candidate,
    Planner,
    grids_to_try,
    step_counts,
)
from blockcache.export.choose.policies import Chosen, Evidence, Needs
from blockcache.export.choose.preset import MOST_STEPS, PresetOptions
from blockcache.export.choose.trials import improved, nearest, trials
from blockcache.export.costs.costs import Costs
from blockcache.export.graph.time_tables import time_tables
from blockcache.export.measurements import Measurements
from blockcache.export.observer import Observer, unobserved
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
from blockcache.runtime.solvers.recorded import RecordedSolver, timesteps_of
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
    observer: Observer = unobserved

    def make(self, preset: PresetOptions) -> Preset:
        """Schedule, alignment and time tables of a preset.

        Raises:
            ConfigError: a budget that no schedule keeps.
        """
        if isinstance(preset.policy, Chosen):
            return self._make_chosen(preset, preset.policy)
        needs, part = preset.policy.needs, self._part(preset)
        profile = self.measurements.profile(preset) if Needs.CHANGE in needs else None
        found = self.measurements.sensitivity(preset) if Needs.LOSSES in needs else None
        solver = self.measurements.solver(preset)
        evidence = Evidence(
            steps=solver.steps,
            paths=[self.facts.blocks[k].path for k in part],
            costs=self.costs,
            change=None if profile is None else profile.mean,
            sensitivity=None if found is None else found.table,
            gains=None if found is None else found.gains,
            residuals=self.measurements.residuals(preset) if Needs.LOSSES in needs else None,
        )
        chosen = preset.policy.schedule(evidence)  # of the part, as all that is measured
        provenance = Provenance(
            kind=preset.policy.kind,
            value=preset.policy.value,
            costs=self.costs.source,
            predicted_speedup=round(self.costs.speedup(self._whole(chosen, part)), 6),
            predicted_loss=(
                round(preset.policy.loss(evidence, chosen), 6) if Needs.LOSSES in needs else None
            ),
            images=None if profile is None else profile.images,
            profile=None if profile is None else profile.file,
        )
        return self._preset(preset, solver, chosen, provenance)

    def _preset(
        self,
        preset: PresetOptions,
        solver: RecordedSolver,
        chosen: Schedule,
        provenance: Provenance,
    ) -> Preset:
        """With the schedule that was chosen for its part, aligned."""
        part = self._part(preset)
        schedule = self._whole(chosen, part)
        alignment = Alignment.identity(schedule.steps, self.facts.block_channels)
        aligns = preset.alignment != "none" and not schedule.recompute.all()
        if aligns or preset.fits_solver:
            made = self.measurements.alignment(preset, chosen, solver)
            solver = made.solver
        if aligns:
            tables = list(alignment.combining(made.alignment.outputs).tables)
            for k, table in zip(part, made.alignment.tables, strict=True):
                tables[k] = table
            alignment = Alignment(tuple(tables))
            provenance = dataclasses.replace(
                provenance, alignment=preset.alignment, alignment_report=made.report
            )
        return Preset(
            name=preset.name,
            solver=solver.to_json(),
            schedule=schedule,
            alignment=alignment.combining(self.facts.outputs),
            time_tables=time_tables(self.segments, self.folder, timesteps_of(solver)),
            guidance_scale=self.measurements.guidance_scale,
            provenance=provenance,
        )

    def _whole(self, chosen: Schedule, part: Sequence[int]) -> Schedule:
        """A schedule of the part as one of everything: the rest runs at every step."""
        recompute = np.ones((chosen.steps, len(self.facts.blocks)), np.bool_)
        recompute[:, part] = chosen.recompute
        return Schedule(recompute)

    def _part(self, preset: PresetOptions) -> list[int]:
        """What the preset may reuse: the blocks, or the branches that its policy names."""
        cuts = preset.policy.cuts
        return [k for k, block in enumerate(self.facts.blocks) if _is_part(block, cuts)]

    def _make_chosen(self, preset: PresetOptions, policy: Chosen) -> Preset:
        """The candidate that ends nearest to the converged run."""
        measured = self.measurements
        planner = self._planner(preset, policy)
        candidates = self._candidates(preset, planner)
        options = measured.trials
        done, total = 0, trials(len(candidates), options)

        def distances(candidate: Candidate, images: range) -> np.ndarray:
            nonlocal done
            self.observer(f"trials of {preset.name}", done, total)
            done = min(done + 1, total)
            solver = measured.solver_on(preset, candidate.grid)
            return measured.tried(preset, solver, candidate.schedule, images)

        def neighbours(candidate: Candidate) -> list[Candidate]:
            solver = measured.solver_on(preset, candidate.grid)
            return planner.neighbours(candidate, solver_tables(solver))

        try:
            index, means = nearest(candidates, options.images, distances)
        except ConfigError as error:
            raise ConfigError(f"Preset {preset.name!r}: {error}") from None
        best, distance = candidates[index], means[index]
        if options.moves:
            best, distance = improved(best, options.images, options.moves, neighbours, distances)
        schedule = self._whole(best.schedule, self._part(preset))
        provenance = Provenance(
            kind=policy.kind,
            value=policy.value,
            costs=self.costs.source,
            predicted_speedup=round(self.costs.speedup(schedule, preset.steps), 6),
            predicted_loss=round(distance, 6),  # to the converged run
            replaced_steps=preset.steps,
            tried={
                candidate.name: round(mean, 6)
                for candidate, mean in zip(candidates, means, strict=True)
                if np.isfinite(mean)
            },
        )
        solver = measured.solver_on(preset, best.grid)
        return self._preset(preset, solver, best.schedule, provenance)

    def _planner(self, preset: PresetOptions, policy: Chosen) -> Planner:
        costs = self.measurements.step_costs(preset)
        errors = self.measurements.branch_errors(preset, costs)
        spend = policy.spend(preset.steps, self.costs)
        return Planner(errors, costs, self.costs.by_cut, spend)

    def _candidates(self, preset: PresetOptions, planner: Planner) -> list[Candidate]:
        """The best by prediction, as many as are tried."""
        measured = self.measurements
        most = min(MOST_STEPS, len(planner.costs.sigmas) // 2)
        counts = step_counts(planner.spend / float(planner.by_cut[-1]), most)
        training = measured.training_sigmas(preset)
        found = []
        for grid in grids_to_try(preset.grid, counts, planner.costs, training):
            candidate = planner.best(grid, solver_tables(measured.solver_on(preset, grid)))
            found += [] if candidate is None else [candidate]
        if not found:
            raise ConfigError(
                f"Preset {preset.name!r}: no grid of {counts} steps has a schedule that is cheap "
                f"enough. Ask for less."
            )
        found.sort(key=lambda candidate: candidate.predicted)
        return found[: measured.trials.candidates]
