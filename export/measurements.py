"""What compile measures on one model: profile, sensitivity, residuals, alignments, trials.

Each measurement is keyed by all that it depends on and kept in the bundle's folder. So presets that
ask for the same one share it, and a compile that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from blockcache.export.align.distil import DistillationOptions, distil
from blockcache.export.align.fit import (
    AlignmentFit,
    AlignmentOptions,
    fit_alignment,
    judge_alignment,
    own_jobs,
)
from blockcache.export.align.solver_fit import Targets
from blockcache.export.choose import grids
from blockcache.export.choose.grid_search import StepCosts, shortest_path, step_costs
from blockcache.export.choose.joint import BranchErrors, step_sizes
from blockcache.export.choose.policies import BRANCH_CUTS, UNCACHED, Needs
from blockcache.export.choose.preset import PresetOptions
from blockcache.export.choose.trials import TrialOptions
from blockcache.export.measure.calibration import Calibration, check_calibration
from blockcache.export.measure.change import Profile, ProfileOptions, measure_change
from blockcache.export.measure.converged import (
    ConvergedOptions,
    ConvergedRun,
    converged_run,
    converged_solver,
    fine_run,
    measure_gains,
)
from blockcache.export.measure.own_pictures import (
    STEPS,
    Coders,
    own_pictures,
    own_pictures_of,
    takes_drawings,
    takes_noise_levels,
)
from blockcache.export.measure.residuals import Moments, ResidualOptions, measure_residuals
from blockcache.export.measure.reuse import HISTORY
from blockcache.export.measure.sampling import Job, Sampling, Tally
from blockcache.export.measure.sensitivity import (
    Sensitivity,
    SensitivityOptions,
    measure_sensitivity,
)
from blockcache.export.observer import Observer, qualified
from blockcache.export.parts.part import Parts
from blockcache.export.stages import RECORDS, StageStore, stage_key
from blockcache.export.unet.model import SourceModel
from blockcache.export.unet.scheduler import recorded_scheduler, scheduler_config
from blockcache.runtime.bundles.tensor_files import read_tensors, write_tensors
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import IMAGE_LATENTS, Alignment, Schedule
from blockcache.runtime.solvers.diffusers_config import solver_from_diffusers
from blockcache.runtime.solvers.grid import Grid
from blockcache.runtime.solvers.recorded import SCHEDULER, RecordedSolver
from blockcache.runtime.solvers.solver import SolverConfig, solver_tables

SENSED_STEPS, SENSED_IMAGES = 16, 2
"""A joint preset's sensitivity is measured with DPM-Solver++ on so many steps of Karras', on at
most so many images: it is the same for all plans, and only ranks them."""

MOST_PAIRS = 1 << 28
"""At most 2^28 entries of a residual table with history: 1 GiB stored, about 3 GiB at peak."""


@dataclass(frozen=True, kw_only=True)
class MeasurementOptions:
    """How much is measured, and with what guidance."""

    guidance_scale: float = 5.0  # as in the paper
    image_guidance_scale: float = 1.5  # of InstructPix2Pix alone, as its pipelines have it
    converged: ConvergedOptions = field(default_factory=ConvergedOptions)
    profile: ProfileOptions = field(default_factory=ProfileOptions)
    sensitivity: SensitivityOptions = field(default_factory=SensitivityOptions)
    residuals: ResidualOptions = field(default_factory=ResidualOptions)
    alignment: AlignmentOptions = field(default_factory=AlignmentOptions)
    distillation: DistillationOptions = field(default_factory=DistillationOptions)
    trials: TrialOptions = field(default_factory=TrialOptions)  # of a joint policy's plans


@dataclass(frozen=True)
class Aligned:
    """What a sweep has fitted to a schedule."""

    alignment: Alignment  # of what may be reused
    solver: RecordedSolver  # fitted, too, where the preset asks for it
    report: str  # a file in the bundle: the errors before and after


class Measurements:
    """Measurements of one model for one bundle, each made once, when it is first asked for.

    Args:
        model: the U-Net, with weights in full.
        precision: what the weights are exported in. What corrects errors of the exported model
            (alignments, trials) is measured on weights that are rounded to it; what only says
            where errors arise (profile, sensitivity, residuals) on the weights in full, so that
            bundles of all precisions share it.
        calibration: prompts to measure with; None where no preset needs any.
        options: how much to measure.
        store: the bundle's stage records.
        observer: hears how far a measurement is.
        parts: of the pipeline; decoder and encoder make the pictures that a calibration lacks.

    Raises:
        ConfigError: a calibration that does not fit the model, or lacks pictures that cannot be
            made.
    """

    def __init__(
        self,
        model: SourceModel,
        precision: str,
        calibration: Calibration | None,
        options: MeasurementOptions,
        store: StageStore,
        observer: Observer,
        parts: Parts | None = None,
    ) -> None:
        if calibration is not None:
            own, guided = own_pictures_of(model), options.guidance_scale != 1.0
            check_calibration(model, calibration, guided, made=own)
            if takes_drawings(model) and own[0] not in calibration.positive:
                _require_coders(model, own, parts)
        self.model = model
        self._precision = precision
        self._calibration = calibration
        self._options = options
        self._store = store
        self._observer = observer
        self._parts = parts
        self.tally = Tally()  # of what was measured, not of what was there already

    @property
    def guidance_scale(self) -> float:
        """As in use."""
        return self._options.guidance_scale

    @property
    def trials(self) -> TrialOptions:
        """How plans of a joint policy are tried."""
        return self._options.trials

    @property
    def branch_cuts(self) -> tuple[int, ...]:
        """Those of ``BRANCH_CUTS`` that the model has."""
        return tuple(cut for cut in BRANCH_CUTS if cut in self.model.depths)

    def check(self, preset: PresetOptions) -> None:
        """Raise ConfigError where a preset's own table does not fit, or prompts are missing."""
        blocks = self.model.part(preset.policy.cuts).blocks
        steps = solver_config(self.model, preset).steps
        preset.policy.check_blocks(steps, len(blocks))
        dtype = str(next(self.model.unet.parameters()).dtype).removeprefix("torch.")
        if preset.calibrated and dtype != "float32":
            raise ConfigError(
                f"Preset {preset.name!r} is made from measurements, which need the weights in "
                f"full: expected a model loaded in float32, got {dtype}. The precision of the "
                f"export is another option."
            )
        if preset.calibrated and self._calibration is None:
            raise ConfigError(
                f"Preset {preset.name!r} is made from measurements and needs prompts to measure "
                f"with: give a calibration (--calibration FILE), or leave out policy and alignment."
            )
        pairs = len(blocks) * steps**3
        if Needs.LOSSES in preset.policy.needs and preset.reuse == HISTORY and pairs > MOST_PAIRS:
            raise ConfigError(
                f"Preset {preset.name!r}: a budget with history looks at all pairs of earlier "
                f"steps, {pairs:.2g} numbers for {steps} steps. Take fewer steps, "
                f"another policy (t1.5, c1.5), or the alignment scale-shift."
            )

    def solver(self, preset: PresetOptions) -> RecordedSolver:
        """The preset's solver on the model's own noise schedule; measures a grid ``auto``."""
        if preset.grid != grids.AUTO:
            return solver_config(self.model, preset)
        own = _table_config(self.model, preset)
        sigmas, _ = shortest_path(self.step_costs(preset), preset.steps)
        grid = grids.grid_of(grids.AUTO, sigmas, own.noise.sigmas())
        return on_grid(self.model, preset, grid)

    def solver_on(self, preset: PresetOptions, grid: Grid) -> SolverConfig:
        """The preset's solver on other levels, and as many steps."""
        return on_grid(self.model, dataclasses.replace(preset, steps=grid.steps), grid)

    def training_sigmas(self, preset: PresetOptions) -> np.ndarray:
        """The training's noise levels, sigma / alpha, rising: float64 [T]."""
        return _table_config(self.model, preset).noise.sigmas()

    def step_costs(self, preset: PresetOptions) -> StepCosts:
        """What DPM-Solver++'s steps between any two levels do wrong, whatever the solver."""
        run, gains = self._converged(_table_config(self.model, preset))
        return step_costs(run.sigmas, run.samples, run.data, gains)

    def branch_errors(self, preset: PresetOptions, costs: StepCosts) -> BranchErrors:
        """What errors of the branches that a joint preset reuses do to the image, at any level.

        Measured on one grid and carried over; ``costs`` are of the converged run.
        """
        sensed = dataclasses.replace(
            preset, solver="dpm", grid="karras", steps=SENSED_STEPS, name=""
        )
        solver = _table_config(self.model, sensed)
        run, _ = self._converged(solver)
        assert solver.grid is not None
        at = costs.nearest(np.asarray(solver.grid.sigmas))
        options = self._options.sensitivity
        options = dataclasses.replace(options, images=min(options.images, SENSED_IMAGES))
        table = self.sensitivity(sensed, options).table
        return BranchErrors.measured(run.moments, table, at, step_sizes(solver_tables(solver)))

    def _converged(self, solver: SolverConfig) -> tuple[ConvergedRun, np.ndarray]:
        """One converged run, and the gains of errors on it: the same for all solvers and steps.

        Its moments are those of the branches that policies reuse.
        """
        options = self._options.converged
        sampling = self._sampling_by(converged_solver(solver, options.levels))
        sampling = dataclasses.replace(sampling, model=self.model.part(self.branch_cuts))
        stage = _Stage.of("converged", sampling, options)
        file = f"{RECORDS}/converged-{stage.key[:12]}.safetensors"

        def measure() -> dict[str, np.ndarray]:
            run = converged_run(sampling, options, observer=self._observer)
            gains = measure_gains(sampling, run, options, observer=self._observer)
            moments = {
                f"{name}_{k}": getattr(own, name)
                for k, own in enumerate(run.moments)
                for name in ("mean", "covariance")
            }
            tables = {"sigmas": run.sigmas, "samples": run.samples, "data": run.data}
            return {**tables, "gains": gains, **moments}

        made = self._once(stage, file, measure)
        moments = tuple(
            Moments(made[f"mean_{k}"], made[f"covariance_{k}"])
            for k in range(len(self.branch_cuts))
        )
        return ConvergedRun(made["sigmas"], made["samples"], made["data"], moments), made["gains"]

    def profile(self, preset: PresetOptions) -> Profile:
        """Change per step and block; shared by presets of the same solver and steps."""
        sampling, options = self._sampling(preset), self._options.profile
        stage = _Stage.of("profile", sampling, options)
        checkpoint = self._store.scratch(f"profile-{stage.key[:12]}")
        file = f"profiles/{preset.sampler}-{stage.key[:8]}.safetensors"

        def measure() -> dict[str, np.ndarray]:
            made = measure_change(
                sampling, options, observer=self._heard_of(preset), checkpoint=checkpoint
            )
            return {"mean": made.mean, "std": made.std, "images": np.array([made.images])}

        made = self._once(stage, file, measure)
        checkpoint.unlink(missing_ok=True)
        return Profile(made["mean"], made["std"], int(made["images"][0]), file)

    def sensitivity(
        self, preset: PresetOptions, options: SensitivityOptions | None = None
    ) -> Sensitivity:
        """What a block's reuse at a step does to the image; ``options`` in place of its own."""
        sampling, options = self._sampling(preset), options or self._options.sensitivity
        stage = _Stage.of("sensitivity", sampling, options)
        file = f"profiles/{preset.sampler}-{stage.key[:8]}.safetensors"

        def measure() -> dict[str, np.ndarray]:
            made = measure_sensitivity(sampling, options, observer=self._heard_of(preset))
            return {"sensitivity": made.table, "gains": made.gains}

        made = self._once(stage, file, measure)
        return Sensitivity(made["sensitivity"], made["gains"])

    def residuals(self, preset: PresetOptions) -> np.ndarray:
        """What the preset's way to reuse leaves of an error: float32 [K, S, S] or [K, S, S, S]."""
        sampling, options = self._sampling(preset), self._options.residuals
        stage = _Stage.of("residuals", sampling, options, reuse=preset.reuse)
        file = f"{RECORDS}/residuals-{stage.key[:12]}.safetensors"

        def measure() -> dict[str, np.ndarray]:
            heard = self._heard_of(preset)
            return {"residuals": measure_residuals(sampling, preset.reuse, options, observer=heard)}

        return self._once(stage, file, measure)["residuals"]

    def alignment(
        self, preset: PresetOptions, schedule: Schedule, solver: RecordedSolver
    ) -> Aligned:
        """A preset's coefficients, on its schedule and the levels of ``solver``.

        Where the preset's solver is to be fitted, the images of the trials, whose converged run is
        known, are among those that all is fitted on.
        """
        sampling = self._sampling(preset, self._precision, solver)
        options = self._options.alignment
        training = self._options.distillation if preset.alignment.endswith("distil") else None
        jobs = self._fit_jobs(preset, sampling)
        stage = _Stage.of(
            "alignment",
            sampling,
            options,
            preset=preset.name,
            schedule=_digest(schedule.recompute),
            outputs=preset.outputs,
            jobs=jobs,
            fitted=self._yardstick_stage(preset).key if preset.fits_solver else None,
            distillation=training and dataclasses.asdict(training),
        )
        file = f"profiles/{preset.name}-alignment-{stage.key[:8]}.safetensors"

        def measure() -> dict[str, np.ndarray]:
            heard = self._heard_of(preset)
            targets = self._targets(preset, solver) if preset.fits_solver else None
            made = self._fit(preset, sampling, schedule, jobs, targets, heard)
            fitted = made.fitted
            if training is not None:
                own = dataclasses.replace(sampling, solver=with_fit(solver, fitted))
                trained = distil(own, schedule, made.alignment, training, observer=heard)
                made = judge_alignment(own, schedule, trained, options, jobs=jobs, observer=heard)
            tables = {f"table_{k}": table for k, table in enumerate(made.alignment.tables)}
            if fitted is not None:
                tables["fitted"] = np.array(fitted)
            return {"before": made.before, "after": made.after, **tables}

        made = self._once(stage, file, measure)
        fitted = made["fitted"].tolist() if "fitted" in made else None
        alignment = Alignment(tuple(made[f"table_{k}"] for k in range(schedule.blocks)))
        return Aligned(alignment, with_fit(solver, fitted), file)

    def tried(
        self, preset: PresetOptions, solver: SolverConfig, schedule: Schedule, images: range
    ) -> np.ndarray:
        """How far a plan ends from the converged run, relative L2: float64 [N].

        All is fitted on the same images; the winner is fitted on more.

        Args:
            preset: whose plan it is.
            solver: with the plan's grid.
            schedule: the plan's.
            images: which ones, of the trials' own.
        """
        sampling = self._sampling(preset, self._precision, solver)
        jobs = self._trial_jobs(sampling)[images.start : images.stop]
        facts = {"schedule": _digest(schedule.recompute), "ridge": self._options.alignment.ridge}
        yardstick = self._yardstick_stage(preset).key
        stage = _Stage.of("trial", sampling, jobs=jobs, yardstick=yardstick, **facts)
        file = f"{RECORDS}/trial-{stage.key[:12]}.safetensors"

        def measure() -> dict[str, np.ndarray]:
            heard = qualified(self._observer, f"{preset.name}, {schedule.steps} steps")
            targets = self._targets(preset, solver, images)
            fit = self._fit(preset, sampling, schedule, jobs, targets, heard)
            return {"latents": fit.latents}

        latents = self._once(stage, file, measure)["latents"]
        return _distances(latents, self._yardstick(preset).latents[images.start : images.stop])

    def _fit(
        self,
        preset: PresetOptions,
        sampling: Sampling,
        schedule: Schedule,
        jobs: Sequence[Job],
        targets: Targets | None,
        heard: Observer,
    ) -> AlignmentFit:
        """All that one sweep fits: the preset's alignment, and the solver where targets are."""
        options = self._options.alignment
        if preset.alignment == "none":
            channels = tuple(block.channels for block in sampling.model.blocks)
            plain = Alignment.identity(schedule.steps, channels)
            return judge_alignment(
                sampling, schedule, plain, options, jobs=jobs, targets=targets, observer=heard
            )
        return fit_alignment(
            sampling, schedule, preset.outputs, options, jobs=jobs, targets=targets, observer=heard
        )

    def _fit_jobs(self, preset: PresetOptions, sampling: Sampling) -> list[Job]:
        """The images that an alignment is fitted on, those of the trials first if it needs them.

        Without reuse there is nothing but the solver to fit, which takes no other images.
        """
        own = own_jobs(sampling, self._options.alignment)
        if not preset.fits_solver:
            return own
        known = self._trial_jobs(sampling)
        return known if preset.alignment == "none" else [*known, *own[len(known) :]]

    def _trial_jobs(self, sampling: Sampling) -> list[Job]:
        """The images that plans are tried on, in random order: any part has any prompts."""
        options = self._options.trials
        prompts = np.random.default_rng(options.seed).permutation(
            sampling.spread_prompts(options.images)
        )
        return [(int(prompt), options.seed + image) for image, prompt in enumerate(prompts)]

    def _targets(
        self, preset: PresetOptions, solver: RecordedSolver, images: range | None = None
    ) -> Targets:
        """Where the images of trials, or some of them, should be at the levels of ``solver``."""
        assert isinstance(solver, SolverConfig)
        assert solver.grid is not None
        run, scale = self._yardstick(preset), np.append(solver_tables(solver).input_scale, 1.0)
        samples = run.samples_at([*solver.grid.sigmas, 0.0])
        samples = samples / scale.astype(np.float32)[:, None, None, None, None]
        return Targets(torch.from_numpy(samples if images is None else samples[:, images]))

    def _yardstick(self, preset: PresetOptions) -> ConvergedRun:
        """The converged run of the images of trials: DPM-Solver++ in many steps."""
        sampling, stage = self._fine(preset), self._yardstick_stage(preset)
        file = f"{RECORDS}/yardstick-{stage.key[:12]}.safetensors"

        def measure() -> dict[str, np.ndarray]:
            run = fine_run(sampling, self._trial_jobs(sampling), observer=self._observer)
            return {"sigmas": run.sigmas, "samples": run.samples, "data": run.data}

        made = self._once(stage, file, measure)
        return ConvergedRun(made["sigmas"], made["samples"], made["data"])

    def _yardstick_stage(self, preset: PresetOptions) -> _Stage:
        sampling = self._fine(preset)
        return _Stage.of("yardstick", sampling, jobs=self._trial_jobs(sampling))

    def _fine(self, preset: PresetOptions) -> Sampling:
        """What the yardstick runs on: the same for all solvers and steps."""
        steps = min(self._options.trials.steps, self._options.converged.levels)
        return self._sampling(
            dataclasses.replace(
                preset, solver="dpm", grid=grids.AUTO, steps=steps, alignment="", policy=UNCACHED,
                name="",
            )
        )  # fmt: skip

    def _once(
        self, stage: _Stage, file: str, measure: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """The tensors of a measurement, which is made unless it is in ``file`` already."""
        if self._store.reuse(stage.name, stage.key) is not None:
            return read_tensors(self._store.folder / file)
        tensors = measure()
        write_tensors(self._store.folder / file, tensors)
        self._store.commit(stage.name, stage.key, [file], {})
        return tensors

    def _sampling(
        self,
        preset: PresetOptions,
        precision: str = "float32",
        solver: RecordedSolver | None = None,
    ) -> Sampling:
        sampling = self._sampling_by(solver or self.solver(preset), precision)
        return dataclasses.replace(sampling, model=self.model.part(preset.policy.cuts))

    def _sampling_by(self, solver: RecordedSolver, precision: str = "float32") -> Sampling:
        by_image = any(c.beside_sample and c.name == IMAGE_LATENTS for c in self.model.conditions)
        return Sampling(
            model=self.model,
            solver=solver,
            calibration=self._complete_calibration,
            guidance_scale=self._options.guidance_scale,
            precision=precision,
            tally=self.tally,
            image_guidance_scale=self._options.image_guidance_scale if by_image else 1.0,
        )

    @cached_property
    def _complete_calibration(self) -> Calibration:
        """With the pictures that the model reads: those that were given, or its own."""
        calibration = self._calibration
        assert calibration is not None  # ``check`` was asked first
        own = own_pictures_of(self.model)
        if not own or own[0] in calibration.positive:
            return calibration
        solver = _table_config(self.model, PresetOptions(solver="dpm", grid="karras", steps=STEPS))
        guidance_scale = self._options.guidance_scale
        sampling = Sampling(self.model, solver, calibration, guidance_scale, tally=self.tally)
        parts = self._parts if takes_drawings(self.model) else None
        halves = () if parts is None else parts.parts
        coders = {part.role: part for part in halves if part.role in ("decoder", "encoder")}
        hashes = {role: part.sha256 for role, part in coders.items()}
        levels = () if parts is None else parts.noise_levels
        stage = _Stage.of("pictures", sampling, parts=hashes, noise_levels=levels)
        file = f"{RECORDS}/pictures-{stage.key[:12]}.safetensors"

        def measure() -> dict[str, np.ndarray]:
            loaded = {role: part.load(torch.float32).eval() for role, part in coders.items()}
            made = Coders(loaded["decoder"], loaded["encoder"], levels) if loaded else None
            return own_pictures(sampling, made, observer=self._observer)

        pictures = self._once(stage, file, measure)
        positive = {**calibration.positive, **pictures}
        return dataclasses.replace(calibration, positive=positive)

    def _heard_of(self, preset: PresetOptions) -> Observer:
        return qualified(self._observer, preset.sampler)


@dataclass(frozen=True)
class _Stage:
    """The record of one measurement: its name is unique in the bundle, its key says of what."""

    name: str
    key: str

    @classmethod
    def of(cls, kind: str, sampling: Sampling, options: Any = None, **more: Any) -> _Stage:
        """The stage of a measurement that depends on ``sampling``, ``options`` and ``more``."""
        if sampling.image_guidance_scale != 1:
            more["image_guidance"] = sampling.image_guidance_scale
        key = stage_key(
            kind,
            model=sampling.model.sha256,
            blocks=[(block.path, block.kind) for block in sampling.model.blocks],
            precision=sampling.precision,
            solver=sampling.solver.to_json(),
            calibration=sampling.calibration.sha256,
            guidance=sampling.guidance_scale,
            options=options and dataclasses.asdict(options),
            **more,
        )
        return cls(f"{kind}-{key[:12]}", key)


def _require_coders(model: SourceModel, pictures: Sequence[str], parts: Parts | None) -> None:
    """Raise ConfigError where pictures to measure with are neither given nor can be drawn."""
    lacking = {"decoder", "encoder"} - {part.role for part in (parts.parts if parts else ())}
    if takes_noise_levels(model) and not (parts and parts.noise_levels):
        lacking.add("low_res_scheduler")
    if lacking:
        raise ConfigError(
            f"Calibration: expected {' and '.join(pictures)}, which {model.name!r} reads, or the "
            f"pipeline's autoencoder, with which such pictures are made of its own drawings; got "
            f"neither (no {', '.join(sorted(lacking))}). Add them, or compile with all parts "
            f"(parts=load_parts(...), --parts all)."
        )


def solver_config(model: SourceModel, preset: PresetOptions) -> RecordedSolver:
    """The preset's solver on the model's own noise schedule.

    A grid ``auto``, which has to be measured, is left out: the scheduler's own stands in.
    """
    if preset.solver == SCHEDULER:
        if preset.scheduler is None:
            return recorded_scheduler(_scheduler_of(model), preset.steps)
        return recorded_scheduler(scheduler_config(preset.scheduler, model.scheduler), preset.steps)
    return _table_config(model, preset)


def _scheduler_of(model: SourceModel) -> Mapping[str, Any]:
    """The model's own config; ConfigError where there is none."""
    if not model.scheduler:
        raise ConfigError(
            f"Expected scheduler/scheduler_config.json beside the U-Net of {model.name!r}: the "
            f"noise schedule it was trained with is in no other place. Save the pipeline's "
            f"scheduler there."
        )
    return model.scheduler


def _table_config(model: SourceModel, preset: PresetOptions) -> SolverConfig:
    """One of our solvers, with the levels that its own config or a named grid gives it."""
    spacing = preset.grid if preset.grid in grids.SPACINGS else None
    own = solver_from_diffusers(
        _scheduler_of(model), solver=preset.solver, steps=preset.steps, spacing=spacing
    )
    if preset.has_own_levels:
        assert preset.grid_name is not None
        levels = preset.own_levels()
        return on_grid(model, preset, grids.grid_of(preset.grid_name, levels, own.noise.sigmas()))
    if preset.grid not in grids.NAMES:
        return own
    return on_grid(model, preset, grids.named_grid(preset.grid, own.noise.sigmas(), preset.steps))


def on_grid(model: SourceModel, preset: PresetOptions, grid: Grid) -> SolverConfig:
    """The preset's solver on levels of its own."""
    return solver_from_diffusers(
        model.scheduler, solver=preset.solver, steps=preset.steps, grid=grid
    )


def with_fit(solver: RecordedSolver, fitted: Sequence[Sequence[float]] | None) -> RecordedSolver:
    """The solver with the coefficients that were fitted to it, where there are any."""
    if fitted is None:
        return solver
    assert isinstance(solver, SolverConfig)
    return dataclasses.replace(solver, fitted=tuple(tuple(row) for row in fitted))


def _distances(latents: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """|latents - reference| / |reference| of every image: float64 [N]."""
    ours, theirs = (x.reshape(len(x), -1).astype(np.float64) for x in (latents, reference))
    return np.asarray(np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1))


def _digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
