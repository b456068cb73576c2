"""The order of the stages, once: profile, schedule, export, preset, bundle.

``compile_model`` is what ``blockcache compile`` runs. Every stage is keyed by what it depends on
(``stages.py``); the manifest is written last, so that a folder with a manifest is a whole bundle.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock, Timeout

from blockcache.export.calibration import Calibration
from blockcache.export.change import Profile, ProfileOptions, measure_change
from blockcache.export.model import SourceModel
from blockcache.export.schedule import threshold
from blockcache.export.stages import StageStore, stage_key
from blockcache.export.time_tables import time_tables
from blockcache.export.to_onnx import EXPORT_STAGES, ExportOptions, default_sizes, export_segments
from blockcache.runtime.bundle import (
    MANIFEST,
    Bundle,
    Manifest,
    PresetEntry,
    preset_bytes,
    read_tensors,
    segment_from_plain,
    to_plain,
    write_preset,
    write_tensors,
    write_text,
)
from blockcache.runtime.errors import BundleError, ConfigError
from blockcache.runtime.plan import (
    Alignment,
    BlockFacts,
    Dim,
    ModelFacts,
    Preset,
    Schedule,
    Segment,
    TensorSpec,
)
from blockcache.runtime.solver import SolverConfig, SolverTables, solver_tables


class Observer(Protocol):
    """Hears how far a compile is; ``total`` is 0 where the length is not known."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` units of ``stage`` are finished."""


SOLVERS = ("dpm", "ddim", "euler")


@dataclass(frozen=True, kw_only=True)
class PresetOptions:
    """One preset to make: ``dpm:20:0.5`` is 20 steps of DPM-Solver++ with delta 0.5."""

    solver: str
    steps: int
    delta: float | None = None  # threshold of eq. 7; None recomputes everything
    name: str = ""

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ConfigError(f"Expected a solver of {SOLVERS}, got {self.solver!r}.")
        if self.steps < 1 or (self.delta is not None and not self.delta >= 0):
            raise ConfigError(f"Expected steps of 1 or more and a delta of 0 or more; got {self}.")
        if not self.name:
            suffix = "" if self.delta is None else f"-d{self.delta:g}".replace("+", "")
            object.__setattr__(self, "name", f"{self.solver}-{self.steps}{suffix}")

    @classmethod
    def parse(cls, text: str) -> PresetOptions:
        """Read ``SOLVER:STEPS[:DELTA]``."""
        parts = text.split(":")
        try:
            if len(parts) not in (2, 3):
                raise ValueError
            delta = float(parts[2]) if len(parts) == 3 else None
            return cls(solver=parts[0], steps=int(parts[1]), delta=delta)
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"Expected a preset SOLVER:STEPS[:DELTA] such as dpm:20:0.5, got {text!r}."
            ) from error


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """Everything ``compile_model`` may be told."""

    presets: tuple[PresetOptions, ...]
    export: ExportOptions = field(default_factory=ExportOptions)
    profile: ProfileOptions = field(default_factory=ProfileOptions)
    guidance_scale: float = 5.0  # as in the paper

    def __post_init__(self) -> None:
        names = [preset.name for preset in self.presets]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"Expected presets with different names, got {names}.")


def compile_model(
    model: SourceModel,
    folder: Path,
    options: CompileOptions,
    calibration: Calibration | None = None,
    observer: Observer = lambda stage, done, total: None,
) -> Bundle:
    """Compile a U-Net into a bundle; resumes where an earlier call was interrupted.

    Args:
        model: as ``load_model`` returned it, float32 where a preset needs a profile.
        folder: the bundle; made if missing.
        options: what to make.
        calibration: prompts to profile with; needed where a preset has a delta.
        observer: progress.

    Raises:
        ConfigError: options that do not fit the model, or a folder in use by another compile.
        BundleError: the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_foreign(folder)
    try:
        with FileLock(folder / ".lock", timeout=0):
            _compile(model, folder, options, calibration, observer)
    except Timeout as error:
        raise ConfigError(
            f"Another compile is writing to {folder}. Wait for it, or choose another folder."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free
        raise BundleError(
            f"The disk is full ({free / 1e9:.1f} GB free at {folder}). Free some space and run "
            f"the same command again: it resumes."
        ) from error
    return Bundle.open(folder, verify=False)


def _refuse_foreign(folder: Path) -> None:
    """Do not mix a bundle into a folder that holds something else."""
    if not (folder / ".stages").is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"Expected an empty folder or a bundle at {folder}, it holds other files. "
            f"Choose another folder."
        )


def _compile(
    model: SourceModel,
    folder: Path,
    options: CompileOptions,
    calibration: Calibration | None,
    observer: Observer,
) -> None:
    for preset in options.presets:  # what cannot work is refused before any work
        solver_tables(_solver_config(model, preset))
    store = StageStore(folder)
    profiles = {
        preset.name: _profile_stage(model, store, preset, options, calibration, observer)
        for preset in options.presets
    }
    segments = _export_stage(model, store, options.export, observer)
    facts = _model_facts(model, options.export, segments)
    presets = {}
    for done, preset in enumerate(options.presets):
        observer("presets", done, len(options.presets))
        made = _make_preset(model, folder, preset, options, profiles[preset.name], segments, facts)
        name = f"presets/{preset.name}.safetensors"
        path = folder / name
        if not path.is_file() or path.read_bytes() != preset_bytes(made):
            # From here on the folder is not a bundle until the new manifest is written.
            (folder / MANIFEST).unlink(missing_ok=True)
            write_preset(path, made)
        store.commit(f"preset-{preset.name}", stage_key(preset=preset), [name], {})
        presets[preset.name] = _preset_entry(name, made, segments)
    observer("presets", len(options.presets), len(options.presets))
    manifest = Manifest(facts, segments, presets, store.files, store.keys)
    write_text(folder / MANIFEST, manifest.to_json())


# -- stages ----------------------------------------------------------------------------------------


def _export_stage(
    model: SourceModel, store: StageStore, options: ExportOptions, observer: Observer
) -> tuple[Segment, ...]:
    """Segments and weights."""
    key = stage_key(model=model.sha256, export=dataclasses.asdict(options))
    parts = len(EXPORT_STAGES) + 1  # the last one hashes what the others wrote
    observer("export", 0, parts)
    facts = store.reuse("export", key)
    if facts is None:
        # As for presets: no manifest while its files change.
        (store.folder / MANIFEST).unlink(missing_ok=True)
        target = store.folder / "segments"
        shutil.rmtree(target, ignore_errors=True)

        def entered(part: str) -> None:
            observer("export", EXPORT_STAGES.index(part), parts)

        segments = export_segments(model, target, options, entered)
        observer("export", len(EXPORT_STAGES), parts)
        facts = {"segments": [to_plain(segment) for segment in segments]}
        names = sorted(f"segments/{path.name}" for path in target.iterdir())
        store.commit("export", key, names, facts)
    observer("export", parts, parts)
    return tuple(segment_from_plain(entry) for entry in facts["segments"])


def _profile_stage(
    model: SourceModel,
    store: StageStore,
    preset: PresetOptions,
    options: CompileOptions,
    calibration: Calibration | None,
    observer: Observer,
) -> Profile | None:
    """Measured change of a preset's solver and steps; shared by presets that differ in delta."""
    if preset.delta is None:
        return None
    if calibration is None:
        raise ConfigError(
            f"Preset {preset.name!r} derives its schedule from measurements and needs prompts to "
            f"measure with: give a calibration (--calibration FILE), or leave out the delta."
        )
    config = _solver_config(model, preset)
    key = stage_key(
        model=model.sha256,
        solver=config.to_json(),
        profile=dataclasses.asdict(options.profile),
        guidance=options.guidance_scale,
        calibration=_hash_calibration(calibration),
    )
    stage = f"profile-{key[:12]}"
    name = f"profiles/{preset.solver}-{preset.steps}-{key[:8]}.safetensors"
    facts = store.reuse(stage, key)
    path = store.folder / name
    if facts is None:
        profile = measure_change(
            model,
            solver_tables(config),
            calibration,
            options.guidance_scale,
            options.profile,
            progress=lambda done, total: observer(
                f"profile {preset.solver}-{preset.steps}", done, total
            ),
            checkpoint=store.scratch(stage),
        )
        write_tensors(path, {"mean": profile.mean, "std": profile.std})
        store.commit(stage, key, [name], {"images": profile.images})
        store.scratch(stage).unlink(missing_ok=True)
        return dataclasses.replace(profile, file=name)
    tensors = read_tensors(path)
    return Profile(tensors["mean"], tensors["std"], int(facts["images"]), name)


def _make_preset(
    model: SourceModel,
    folder: Path,
    preset: PresetOptions,
    options: CompileOptions,
    profile: Profile | None,
    segments: tuple[Segment, ...],
    facts: ModelFacts,
) -> Preset:
    """Schedule, identity alignment and time tables of a preset."""
    config = _solver_config(model, preset)
    tables: SolverTables = solver_tables(config)
    if profile is None or preset.delta is None:
        schedule = Schedule.uncached(preset.steps, len(model.blocks))
        policy: dict[str, object] = {"kind": "uncached"}
    else:
        schedule = threshold(profile.mean, preset.delta)
        policy = {
            "kind": "threshold",
            "delta": preset.delta,
            "images": profile.images,
            "profile": profile.file,
        }
    return Preset(
        name=preset.name,
        solver=config.to_json(),
        schedule=schedule,
        alignment=Alignment.identity(preset.steps, facts.block_channels, facts.outputs),
        time_tables=time_tables(segments, folder / "segments", tables.timesteps),
        guidance_scale=options.guidance_scale,
        policy=policy,
    )


# -- what the manifest says ------------------------------------------------------------------------


def _preset_entry(file: str, preset: Preset, segments: Sequence[Segment]) -> PresetEntry:
    flops = np.array([s.flops for s in segments if s.role == "block"], np.float64)
    return PresetEntry(
        file=file,
        steps=preset.schedule.steps,
        computed_fraction=round(preset.schedule.computed_fraction(flops), 6),
        guidance_scale=preset.guidance_scale,
        solver=preset.solver,
        policy=preset.policy,
    )


def _model_facts(
    model: SourceModel, options: ExportOptions, segments: Sequence[Segment]
) -> ModelFacts:
    dtypes = {"model": options.precision, "int64": "int64"}
    return ModelFacts(
        name=model.name,
        sha256=model.sha256,
        precision=options.precision,
        channels=int(model.unet.config.in_channels),
        downsampling=model.downsampling,
        outputs=options.outputs,
        blocks=tuple(BlockFacts(block.path, block.channels) for block in model.blocks),
        sizes=default_sizes(model),
        conditions=tuple(
            TensorSpec(c.name, dtypes[c.dtype], tuple(Dim.parse(size) for size in c.shape))
            for c in model.conditions
        ),
    )


def _solver_config(model: SourceModel, preset: PresetOptions) -> SolverConfig:
    if not model.scheduler:
        raise ConfigError(
            f"Expected scheduler/scheduler_config.json beside the U-Net of {model.name!r}: the "
            f"noise schedule it was trained with is in no other place. Save the pipeline's "
            f"scheduler there."
        )
    return SolverConfig.from_diffusers(model.scheduler, solver=preset.solver, steps=preset.steps)


def _hash_calibration(calibration: Calibration) -> str:
    digest = hashlib.sha256()
    sides: tuple[Mapping[str, Any], ...] = (calibration.positive, calibration.negative)
    for side in sides:
        for name, values in sorted(side.items()):
            digest.update(f"{name} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
