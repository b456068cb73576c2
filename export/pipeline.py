"""The order of the stages, once: export, measure, schedule, align, bundle.

``compile_model`` is what ``blockcache compile`` runs. Every stage is keyed by what it depends on
(``stages.py``); the manifest is written last, so that a folder with a manifest is a whole bundle.
"""

from __future__ import annotations

import dataclasses
import errno
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from blockcache.export.choose.joint import candidates, check_reach
from blockcache.export.choose.policies import Evidence, Joint, Needs
from blockcache.export.choose.preset import PresetOptions
from blockcache.export.choose.schedule import total_loss
from blockcache.export.costs.costs import Costs, counted
from blockcache.export.costs.roofline import Processor, predict
from blockcache.export.costs.timings import Timings
from blockcache.export.graph.time_tables import time_tables
from blockcache.export.graph.to_onnx import (
    EXPORT_STAGES,
    ExportOptions,
    default_sizes,
    export_segments,
)
from blockcache.export.measure.calibration import Calibration
from blockcache.export.measurements import (
    CalibrationOptions,
    Measurements,
    solver_config,
)
from blockcache.export.observer import Observer, unobserved
from blockcache.export.stages import RECORDS, StageStore, stage_key
from blockcache.export.unet.model import SourceModel
from blockcache.export.unet.scheduler import other_kind
from blockcache.runtime.bundle import Bundle
from blockcache.runtime.errors import BundleError, ConfigError
from blockcache.runtime.files import write_text
from blockcache.runtime.manifest import (
    MANIFEST,
    Manifest,
    PresetEntry,
    segment_from_plain,
    to_plain,
)
from blockcache.runtime.plan import (
    Alignment,
    BlockFacts,
    Dim,
    ModelFacts,
    Preset,
    Segment,
    TensorSpec,
)
from blockcache.runtime.provenance import Provenance
from blockcache.runtime.solver import solver_tables
from blockcache.runtime.strict_json import Field
from blockcache.runtime.tensor_files import preset_bytes, write_preset


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """Everything ``compile_model`` may be told."""

    presets: tuple[PresetOptions, ...]
    export: ExportOptions = field(default_factory=ExportOptions)
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    timings: Timings | None = None  # what budgets count with; default FLOPs
    processor: Processor | None = None  # in their place: predicted times of one image

    def __post_init__(self) -> None:
        if self.timings is not None and self.processor is not None:
            raise ConfigError(
                "Expected measured timings (--timings) or a GPU to predict them for (--gpu), got "
                "both."
            )
        names = [preset.name for preset in self.presets]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"Expected presets with different names, got {names}.")
        timed = any(Needs.MILLISECONDS in preset.policy.needs for preset in self.presets)
        if timed and not (self.timings or self.processor):
            raise ConfigError(
                "A preset of so many milliseconds needs times. Give measured ones (blockcache "
                "bench BUNDLE --timings FILE, then --timings FILE here), or a GPU to predict them "
                "for (--gpu a100)."
            )
        needed = max(preset.outputs for preset in self.presets)
        if needed > self.export.outputs:
            export = dataclasses.replace(self.export, outputs=needed)
            object.__setattr__(self, "export", export)


def compile_model(
    model: SourceModel,
    folder: Path,
    options: CompileOptions,
    calibration: Calibration | None = None,
    observer: Observer = unobserved,
) -> Bundle:
    """Compile a U-Net into a bundle; resumes where an earlier call was interrupted.

    Args:
        model: as ``load_model`` returned it, float32 where a preset needs a profile.
        folder: the bundle; made if missing.
        options: what to make.
        calibration: prompts to measure with; needed where a preset is ``calibrated``.
        observer: hears how far it is.

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
    if not (folder / RECORDS).is_dir() and any(folder.iterdir()):
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
    store = StageStore(folder)
    measurements = Measurements(
        model, options.export.precision, calibration, options.calibration, store, observer
    )
    for preset in options.presets:  # what cannot work is refused before any work
        solver_tables(solver_config(model, preset))
        measurements.check(preset)
    for solver in sorted({preset.solver for preset in options.presets}):
        told = other_kind(model.name, model.scheduler, solver)
        if told is not None:
            warnings.warn(told, stacklevel=1)  # of this file, which the command line shows
    segments = _export_stage(model, store, options.export, observer)
    facts = _model_facts(model, options.export, segments)
    costs = _costs(segments, folder, options, facts)
    for preset in options.presets:  # what cannot be as fast is refused before any measurement
        check_reach(preset, costs)
    presets = {}
    for done, preset in enumerate(options.presets):
        observer("presets", done, len(options.presets))
        made = _make_preset(measurements, folder, preset, costs, segments, facts)
        name = f"presets/{preset.name}.safetensors"
        path = folder / name
        if not path.is_file() or path.read_bytes() != preset_bytes(made):
            store.invalidate()
            write_preset(path, made)
        store.commit(f"preset-{preset.name}", stage_key("preset", preset=preset), [name], {})
        presets[preset.name] = _preset_entry(name, made, segments)
    observer("presets", len(options.presets), len(options.presets))
    manifest = Manifest(facts, segments, presets, store.files, store.keys)
    write_text(folder / MANIFEST, manifest.to_json())


# -- stages ----------------------------------------------------------------------------------------


def _export_stage(
    model: SourceModel, store: StageStore, options: ExportOptions, observer: Observer
) -> tuple[Segment, ...]:
    """Segments and weights."""
    key = stage_key("export", model=model.sha256, export=dataclasses.asdict(options))
    parts = len(EXPORT_STAGES) + 1  # the last one hashes what the others wrote
    observer("export", 0, parts)
    facts = store.reuse("export", key)
    if facts is None:
        store.invalidate()
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
    found = Field(facts["segments"], "segments", "the record of the export")
    return tuple(segment_from_plain(segment) for segment in found.items())


def _costs(
    segments: Sequence[Segment], folder: Path, options: CompileOptions, facts: ModelFacts
) -> Costs:
    """What a step costs: as measured, as predicted for a GPU, or in GFLOP."""
    timings = options.timings
    guided = options.calibration.guidance_scale != 1.0
    sizes = facts.sizes.for_images(1, guided=guided)
    if options.processor is not None:
        timings = predict(segments, folder / "segments", options.processor, sizes)
    timed = [p.name for p in options.presets if Needs.MILLISECONDS in p.policy.needs]
    if timed and timings is not None and timings.sizes != sizes:
        raise ConfigError(
            f"Preset {timed[0]!r} needs times of one image, at {sizes}; got some at "
            f"{timings.sizes}. "
            + ("Measure with --images 1, or predict" if guided else "Without guidance, predict")
            + " them with --gpu."
        )
    return counted(segments) if timings is None else timings.costs(segments)


def _make_preset(
    measurements: Measurements,
    folder: Path,
    preset: PresetOptions,
    costs: Costs,
    segments: tuple[Segment, ...],
    facts: ModelFacts,
    *,
    trial: bool = False,
) -> Preset:
    """Schedule, alignment and time tables of a preset; a trial's reports are not kept."""
    if isinstance(preset.policy, Joint):
        return _make_joint(measurements, folder, preset, costs, segments, facts)
    needs = preset.policy.needs
    profile = measurements.profile(preset) if Needs.CHANGE in needs and not trial else None
    evidence = Evidence(
        steps=preset.steps,
        paths=[block.path for block in facts.blocks],
        costs=costs,
        change=None if profile is None else profile.mean,
        sensitivity=measurements.sensitivity(preset) if Needs.LOSSES in needs else None,
        residuals=measurements.residuals(preset) if Needs.LOSSES in needs else None,
    )
    schedule = preset.policy.schedule(evidence)
    provenance = Provenance(
        kind=preset.policy.kind,
        value=preset.policy.value,
        costs=costs.source,
        predicted_speedup=round(costs.speedup(schedule), 6),
        predicted_loss=(
            round(total_loss(evidence.losses, schedule), 6) if Needs.LOSSES in needs else None
        ),
        images=None if profile is None else profile.images,
        profile=None if profile is None else profile.file,
    )
    alignment = Alignment.identity(preset.steps, facts.block_channels)
    if preset.alignment != "none" and not schedule.recompute.all():
        fit, report = measurements.alignment(preset, schedule, trial=trial)
        alignment = fit.alignment
        provenance = dataclasses.replace(
            provenance, alignment=preset.alignment, alignment_report=report
        )
    config = solver_config(measurements.model, preset)
    return Preset(
        name=preset.name,
        solver=config.to_json(),
        schedule=schedule,
        alignment=alignment.combining(facts.outputs),
        time_tables=time_tables(segments, folder / "segments", solver_tables(config).timesteps),
        guidance_scale=measurements.guidance_scale,
        provenance=provenance,
    )


def _make_joint(
    measurements: Measurements,
    folder: Path,
    preset: PresetOptions,
    costs: Costs,
    segments: tuple[Segment, ...],
    facts: ModelFacts,
) -> Preset:
    """The candidate that lands nearest to the uncached run of all steps."""
    tried: list[tuple[float, PresetOptions]] = []
    for other in candidates(preset, costs):
        made = _make_preset(measurements, folder, other, costs, segments, facts, trial=True)
        distance = measurements.distance(other, made.schedule, made.alignment, preset)
        if np.isfinite(distance):
            tried.append((distance, other))
    if not tried:
        raise ConfigError(f"Preset {preset.name!r}: no candidate ended in finite latents.")
    distance, best = min(tried, key=lambda pair: pair[0])
    alignment = "none" if best.alignment == "none" else preset.alignment
    winner = dataclasses.replace(best, name=preset.name, alignment=alignment)
    made = _make_preset(measurements, folder, winner, costs, segments, facts)
    provenance = dataclasses.replace(
        made.provenance,
        kind=preset.policy.kind,
        value=preset.policy.value,
        replaced_steps=preset.steps,
        predicted_speedup=round(costs.speedup(made.schedule, preset.steps), 6),
        predicted_loss=round(distance, 6),  # of the trial: fewer steps lose something, too
        tried={other.steps: round(distance, 6) for distance, other in tried},
    )
    return dataclasses.replace(made, provenance=provenance)


# -- what the manifest says ------------------------------------------------------------------------


def _preset_entry(file: str, preset: Preset, segments: Sequence[Segment]) -> PresetEntry:
    flops = np.array([s.flops for s in segments if s.role == "block"], np.float64)
    return PresetEntry(
        file=file,
        steps=preset.schedule.steps,
        computed_fraction=round(preset.schedule.computed_fraction(flops), 6),
        guidance_scale=preset.guidance_scale,
        solver=preset.solver,
        provenance=preset.provenance,
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
