"""The stages that run the U-Net on calibration prompts: profile, sensitivity, alignment.

Each is keyed by all that it depends on and leaves its tables in the bundle's ``profiles/``, so that
presets which ask for the same measurement share it, and an interrupted compile goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from blockcache.export.align.distil import DistillationOptions, distil
from blockcache.export.align.fit import (
    AlignmentFit,
    AlignmentOptions,
    fit_alignment,
    judge_alignment,
)
from blockcache.export.choose.joint import TrialOptions, mean_distance, measured_for, trial_latents
from blockcache.export.choose.policies import Joint, Needs
from blockcache.export.choose.preset import HISTORY, PresetOptions
from blockcache.export.measure.calibration import Calibration
from blockcache.export.measure.change import Profile, ProfileOptions, measure_change
from blockcache.export.measure.residuals import ResidualOptions, measure_residuals
from blockcache.export.measure.sensitivity import SensitivityOptions, measure_sensitivity
from blockcache.export.observer import Observer
from blockcache.export.stages import RECORDS, StageStore, stage_key
from blockcache.export.unet.model import TORCH_DTYPES, SourceModel
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import Alignment, Schedule
from blockcache.runtime.solver import SolverConfig, solver_tables
from blockcache.runtime.tensor_files import read_tensors, write_tensors

MOST_PAIRS = 1 << 28
"""At most 2^28 entries of a residual table with history: 1 GiB stored, about 3 GiB at peak."""


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """How much is measured, and with what guidance."""

    guidance_scale: float = 5.0  # as in the paper
    profile: ProfileOptions = field(default_factory=ProfileOptions)
    sensitivity: SensitivityOptions = field(default_factory=SensitivityOptions)
    residuals: ResidualOptions = field(default_factory=ResidualOptions)
    alignment: AlignmentOptions = field(default_factory=AlignmentOptions)
    distillation: DistillationOptions = field(default_factory=DistillationOptions)
    trial: TrialOptions = field(default_factory=TrialOptions)


class CalibratedStages:
    """Measurements of one model for one bundle, each made once."""

    def __init__(
        self,
        model: SourceModel,
        store: StageStore,
        options: CalibrationOptions,
        calibration: Calibration | None,
        observer: Observer,
        precision: str,
    ) -> None:
        self.model = model
        self._precision = precision  # of the exported weights
        self._store = store
        self._options = options
        self._calibration = calibration
        self._observer = observer

    @property
    def guidance_scale(self) -> float:
        """As in use."""
        return self._options.guidance_scale

    def check(self, preset: PresetOptions) -> None:
        """Raise ConfigError where a preset's own table does not fit, or prompts are missing."""
        preset.policy.check_blocks(preset.steps, len(self.model.blocks))
        if preset.calibrated and self._calibration is None:
            raise ConfigError(
                f"Preset {preset.name!r} is made from measurements and needs prompts to measure "
                f"with: give a calibration (--calibration FILE), or leave out policy and alignment."
            )
        pairs = len(self.model.blocks) * preset.steps**3
        if Needs.LOSSES in preset.policy.needs and preset.reuse == HISTORY and pairs > MOST_PAIRS:
            raise ConfigError(
                f"Preset {preset.name!r}: a budget with history looks at all pairs of earlier "
                f"steps, {pairs:.2g} numbers for {preset.steps} steps. Take fewer steps, "
                f"another policy (t1.5, c1.5), or the alignment least-squares."
            )

    def measure(self, preset: PresetOptions) -> None:
        """What the preset's schedule needs, measured and stored."""
        if isinstance(preset.policy, Joint):
            for other in measured_for(preset):
                self.sensitivity(other)
                self.residuals(other)
            return
        if Needs.CHANGE in preset.policy.needs:
            self.profile(preset)
        if Needs.LOSSES in preset.policy.needs:
            self.sensitivity(preset)
            self.residuals(preset)

    def profile(self, preset: PresetOptions) -> Profile:
        """Change per step and block; shared by presets of the same solver and steps."""
        key = self._key(preset, profile=self._options.profile)
        name = f"profiles/{preset.solver}-{preset.steps}-{key[:8]}.safetensors"

        def measure() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            # A joint preset's winner is known after the export only, which converts the weights.
            torch.nn.Module.to(self.model.unet, torch.float32)
            made = measure_change(
                *self._inputs(preset),
                self._options.profile,
                progress=self._progress("profile", preset),
                checkpoint=self._store.scratch(f"profile-{key[:12]}"),
            )
            return {"mean": made.mean, "std": made.std}, {"images": made.images}

        tensors, facts = self._stage("profile", key, name, measure)
        return Profile(tensors["mean"], tensors["std"], int(facts["images"]), name)

    def sensitivity(self, preset: PresetOptions) -> np.ndarray:
        """What a block's reuse at a step does to the image: float32 [S, K]."""
        key = self._key(preset, sensitivity=self._options.sensitivity)
        name = f"profiles/{preset.solver}-{preset.steps}-{key[:8]}.safetensors"

        def measure() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            made = measure_sensitivity(
                *self._inputs(preset),
                self._options.sensitivity,
                progress=self._progress("sensitivity", preset),
            )
            return {"sensitivity": made}, {}

        return self._stage("sensitivity", key, name, measure)[0]["sensitivity"]

    def residuals(self, preset: PresetOptions) -> np.ndarray:
        """What the preset's way to reuse leaves of an error: float32 [K, S, S] or [K, S, S, S]."""
        key = self._key(preset, residuals=self._options.residuals, reuse=preset.reuse)
        name = f"{RECORDS}/residuals-{key[:12]}.safetensors"

        def measure() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            made = measure_residuals(
                *self._inputs(preset),
                preset.reuse,
                self._options.residuals,
                progress=self._progress("residuals", preset),
            )
            return {"residuals": made}, {}

        return self._stage("residuals", key, name, measure)[0]["residuals"]

    def alignment(
        self, preset: PresetOptions, schedule: Schedule, *, trial: bool = False
    ) -> tuple[AlignmentFit, str]:
        """Coefficients of a preset's reused outputs, and the report's name in the bundle.

        For a trial the fit takes as few images as the trial, and the report is not kept.
        """
        options = self._options.alignment
        if trial:
            images = min(options.images, self._options.trial.images)
            options = dataclasses.replace(options, images=images)
        distilled = preset.alignment.endswith("distil")
        key = self._key(
            preset,
            schedule=_digest(schedule.recompute),
            alignment=options,
            kind=preset.alignment,
            precision=self._precision,
            distillation=self._options.distillation if distilled else None,
        )
        name = f"{RECORDS if trial else 'profiles'}/{preset.name}-alignment.safetensors"

        def measure() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            fit = self._fit(preset, schedule, options, distilled)
            tables = {f"table_{k}": table for k, table in enumerate(fit.alignment.tables)}
            return {"before": fit.before, "after": fit.after, **tables}, {}

        tensors, _ = self._stage(f"alignment-{preset.name}", key, name, measure)
        tables = tuple(tensors[f"table_{k}"] for k in range(schedule.blocks))
        return AlignmentFit(Alignment(tables), tensors["before"], tensors["after"]), name

    def distance(
        self, tried: PresetOptions, schedule: Schedule, alignment: Alignment, full: PresetOptions
    ) -> float:
        """How far a candidate's latents end from the uncached run of ``full``: relative, mean."""
        reference = self._trial(full, Schedule.uncached(full.steps, schedule.blocks), None)
        return mean_distance(self._trial(tried, schedule, alignment), reference)

    def _trial(
        self, preset: PresetOptions, schedule: Schedule, alignment: Alignment | None
    ) -> np.ndarray:
        """Final latents of a few images from noise of their own: float32 [N, C, H, W]."""
        tables = () if alignment is None else alignment.tables
        key = self._key(
            preset,
            trial=self._options.trial,
            precision=self._precision,
            schedule=_digest(schedule.recompute),
            coefficients=_digest(*tables),
        )
        name = f"{RECORDS}/trial-{key[:12]}.safetensors"

        def measure() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            model, solver, calibration, guidance_scale = self._inputs(preset)
            self._round_weights()
            made = trial_latents(
                model,
                solver,
                schedule,
                alignment,
                calibration,
                guidance_scale,
                self._options.trial,
                progress=self._progress("try", preset),
            )
            return {"latents": made}, {}

        return self._stage("trial", key, name, measure)[0]["latents"]

    def _round_weights(self) -> None:
        """Give the U-Net the weights as they are exported, computed in float32."""
        for dtype in (TORCH_DTYPES[self._precision], torch.float32):
            torch.nn.Module.to(self.model.unet, dtype)

    def _fit(
        self,
        preset: PresetOptions,
        schedule: Schedule,
        options: AlignmentOptions,
        distilled: bool,
    ) -> AlignmentFit:
        model, tables, calibration, guidance_scale = self._inputs(preset)
        self._round_weights()  # the student has the exported weights
        fit = fit_alignment(
            model,
            tables,
            schedule,
            calibration,
            guidance_scale,
            preset.outputs,
            options,
            progress=self._progress("align", preset),
        )
        if not distilled:
            return fit
        alignment = distil(
            model,
            tables,
            schedule,
            fit.alignment,
            calibration,
            guidance_scale,
            self._options.distillation,
            progress=self._progress("distil", preset),
        )
        return judge_alignment(
            model, tables, schedule, alignment, calibration, guidance_scale, options
        )

    # -- what all of them share ----------------------------------------------------------------

    def _stage(
        self,
        kind: str,
        key: str,
        name: str,
        measure: Callable[[], tuple[dict[str, np.ndarray], dict[str, Any]]],
    ) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
        """The tensors and facts of a stage, measured unless they are there already."""
        stage = f"{kind}-{key[:12]}"
        found = self._store.reuse(stage, key)
        if found is not None:
            return read_tensors(self._store.folder / name), found
        tensors, facts = measure()
        self._store.invalidate()
        write_tensors(self._store.folder / name, tensors)
        self._store.commit(stage, key, [name], facts)
        self._store.scratch(stage).unlink(missing_ok=True)
        return tensors, facts

    def _inputs(self, preset: PresetOptions) -> tuple[SourceModel, Any, Calibration, float]:
        assert self._calibration is not None
        tables = solver_tables(solver_config(self.model, preset))
        return self.model, tables, self._calibration, self._options.guidance_scale

    def _key(self, preset: PresetOptions, **parts: Any) -> str:
        assert self._calibration is not None  # ``check`` was asked first
        plain = {
            name: part if part is None or isinstance(part, str) else dataclasses.asdict(part)
            for name, part in parts.items()
        }
        return stage_key(
            model=self.model.sha256,
            solver=solver_config(self.model, preset).to_json(),
            guidance=self._options.guidance_scale,
            calibration=_hash(self._calibration),
            **plain,
        )

    def _progress(self, stage: str, preset: PresetOptions) -> Callable[[int, int], None]:
        title = f"{stage} {preset.solver}-{preset.steps}"
        return lambda done, total: self._observer(title, done, total)


def solver_config(model: SourceModel, preset: PresetOptions) -> SolverConfig:
    """The preset's solver on the model's own noise schedule."""
    if not model.scheduler:
        raise ConfigError(
            f"Expected scheduler/scheduler_config.json beside the U-Net of {model.name!r}: the "
            f"noise schedule it was trained with is in no other place. Save the pipeline's "
            f"scheduler there."
        )
    return SolverConfig.from_diffusers(model.scheduler, solver=preset.solver, steps=preset.steps)


def _digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def _hash(calibration: Calibration) -> str:
    digest = hashlib.sha256()
    for side in (calibration.positive, calibration.negative):
        for name, values in sorted(side.items()):
            digest.update(f"{name} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
