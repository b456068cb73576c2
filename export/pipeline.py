"""The order of the stages, once: export, measure, schedule, align, bundle.

``compile_model`` is what ``blockcache compile`` runs; ``_compile`` is the list. Every stage is
keyed by what it depends on (``stages.py``); the new bundle takes the old one's place at the end
(``bundle_writer.py``), with the presets that stay (``earlier.py``).
"""

from __future__ import annotations

import dataclasses
import errno
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blockcache.export.bundle_writer import (
    PARTS,
    SEGMENTS,
    check_folders,
    collect,
    place,
    placed,
    preset_entry,
    remove_leftovers,
    switch,
    write_preset,
)
from blockcache.export.choose.policies import Needs
from blockcache.export.choose.preset import PresetOptions
from blockcache.export.costs.costs import Costs, counted
from blockcache.export.costs.roofline import Processor, predict
from blockcache.export.costs.timings import Timings
from blockcache.export.earlier import (
    Earlier,
    KeptPresets,
    check_like,
    keep_presets,
    take_presets,
)
from blockcache.export.graph.to_onnx import (
    EXPORT_PARTS,
    ExportOptions,
    export_segments,
)
from blockcache.export.measure.calibration import Calibration
from blockcache.export.measurements import (
    MeasurementOptions,
    Measurements,
    solver_config,
)
from blockcache.export.observer import Observer, unobserved
from blockcache.export.parts.part import Parts
from blockcache.export.parts.to_onnx import export_part
from blockcache.export.preset_maker import PresetMaker
from blockcache.export.sole_writer import LOCK, sole_writer
from blockcache.export.stages import RECORDS, StageStore, stage_key
from blockcache.export.unet.model import BRANCH, SourceModel
from blockcache.export.unet.scheduler import other_kind
from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.bundles.bundle_files import hash_files
from blockcache.runtime.bundles.manifest import (
    MANIFEST,
    Manifest,
    PresetEntry,
    pipeline_from_plain,
    segment_from_plain,
    to_plain,
)
from blockcache.runtime.bundles.strict_json import Field
from blockcache.runtime.errors import BundleError, ConfigError, ExportError
from blockcache.runtime.files import new_folder, write_text
from blockcache.runtime.plan import (
    BlockFacts,
    ModelFacts,
    PipelineFacts,
    Segment,
    TensorSpec,
)
from blockcache.runtime.solvers.recorded import SCHEDULER, timesteps_of


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """Everything ``compile_model`` may be told."""

    presets: tuple[PresetOptions, ...]
    export: ExportOptions = field(default_factory=ExportOptions)
    measurement: MeasurementOptions = field(default_factory=MeasurementOptions)
    timings: Timings | None = None  # what budgets count with; default FLOPs
    processor: Processor | None = None  # in their place: predicted times of one image
    recommended: str | None = None  # a preset's name; default the first given that caches
    like: Bundle | None = None  # of the same U-Net: its presets are taken as they are

    def __post_init__(self) -> None:
        if self.timings is not None and self.processor is not None:
            raise ConfigError(
                "Expected measured timings (--timings) or a GPU to predict them for (--gpu), got "
                "both."
            )
        names = [preset.name for preset in self.presets]
        if not (names or self.like) or len(set(names)) != len(names):
            raise ConfigError(f"Expected presets with different names, got {names}.")
        timed = any(Needs.MILLISECONDS in preset.policy.needs for preset in self.presets)
        if timed and not (self.timings or self.processor):
            raise ConfigError(
                "A preset of so many milliseconds needs times. Give measured ones (blockcache "
                "bench BUNDLE --timings FILE, then --timings FILE here), or a GPU to predict them "
                "for (--gpu a100)."
            )


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What ``compile_model`` made of a folder: the bundle, and what became of its presets."""

    bundle: Bundle
    added: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()  # made again, with another content
    kept: tuple[str, ...] = ()  # as they were before
    removed: Mapping[str, str] = field(default_factory=dict)  # name -> why it could not stay
    unreadable: str = ""  # why a bundle that was there gave nothing
    evaluations: int = 0  # of the U-Net: one an image and step, whether guided or not


def compile_model(
    model: SourceModel,
    folder: str | Path,
    options: CompileOptions,
    calibration: Calibration | None = None,
    observer: Observer = unobserved,
    parts: Parts | None = None,
) -> Compiled:
    """Compile a U-Net into a bundle, or add presets to one.

    Until the new bundle is whole the one that is there opens and runs as before, also where this
    call fails or is killed; the same call then resumes. Presets that are there stay where they
    still fit the model.

    Args:
        model: as ``load_model`` returned it, float32 where a preset needs a profile.
        folder: the bundle; made if missing.
        options: what to make.
        calibration: prompts to measure with; needed where a preset is ``calibrated``. Pictures
            that the U-Net reads may be missing where ``parts`` has an autoencoder to draw them.
        observer: hears how far it is.
        parts: what stands beside the U-Net, of ``load_parts``; a warning names those that cannot
            be exported. By default the bundle keeps the parts that it has.

    Raises:
        ConfigError: options that do not fit the model, or a folder in use by another compile.
        BundleError: the disk is full, or a folder of the bundle is a link to somewhere else.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_foreign(folder)
    try:
        with sole_writer(folder, "compile"):
            return _compile(model, folder, options, calibration, observer, parts)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free
        raise BundleError(
            f"The disk is full ({free / 1e9:.1f} GB free at {folder}). Free some space and run "
            f"the same command again: it resumes."
        ) from error


def _refuse_foreign(folder: Path) -> None:
    """Do not mix a bundle into a folder that holds something else."""
    ours = (folder / RECORDS).is_dir() or (folder / MANIFEST).is_file()
    if not ours and any(path.name != LOCK for path in folder.iterdir()):
        raise ConfigError(
            f"Expected an empty folder or a bundle at {folder}, it holds other files. "
            f"Choose another folder."
        )
    check_folders(folder)


def _compile(
    model: SourceModel,
    folder: Path,
    options: CompileOptions,
    calibration: Calibration | None,
    observer: Observer,
    parts: Parts | None,
) -> Compiled:
    """The stages, in order; each takes what those before it made."""
    remove_leftovers(folder)
    store = StageStore(folder)
    earlier = Earlier.read(folder)
    export = _export_options(options, earlier, model)
    model = model.cut_at(export.cuts)
    measurements = Measurements(
        model, export.precision, calibration, options.measurement, store, observer, parts
    )
    _check(model, options, measurements, earlier)
    facts = _model_facts(model, export)
    if options.like is not None:
        check_like(options.like, facts)
    segments = _export_stage(model, store, export, observer)
    pipeline = _parts_stage(parts, facts, store, earlier, observer)
    costs = _costs(segments, folder, options, facts)
    for preset in options.presets:  # what cannot be as fast is refused before any measurement
        preset.policy.check_costs(preset.steps, costs)
    maker = PresetMaker(measurements, costs, facts, segments, folder, observer)
    made = _preset_stage(maker, options.presets, observer)
    like = options.like
    taken = KeptPresets() if like is None else take_presets(like, folder, facts, segments)
    kept = keep_presets(earlier, folder, facts, segments, {**taken.entries, **made})
    presets = _in_order(earlier, {**kept.entries, **taken.entries, **made})
    manifest = Manifest(
        model=facts,
        segments=segments,
        recommended=_recommended(options, earlier, presets),
        presets=presets,
        files={
            **kept.files,
            **taken.files,
            **store.files,
            **(earlier.part_files if parts is None else {}),
            **hash_files(folder, _tables(made)),
        },
        unet_config=model.config,
        pipeline=pipeline,
        loras=model.loras,
    )
    bundle = Bundle.of(folder, manifest, verify=False)  # what does not open replaces nothing
    switch(folder, manifest)
    collect(folder, {*manifest.files, *store.recorded_files()})
    return _compiled(bundle, earlier, kept, measurements.tally.evaluations)


def _check(
    model: SourceModel, options: CompileOptions, measurements: Measurements, earlier: Earlier
) -> None:
    """Refuse what cannot work before any work; warn of what may surprise."""
    theirs = () if options.like is None else options.like.preset_names
    names = [*earlier.preset_names, *theirs, *(preset.name for preset in options.presets)]
    _check_recommended(options, names)
    for preset in options.presets:
        timesteps_of(solver_config(model, preset))
        measurements.check(preset)
    for solver in sorted({preset.solver for preset in options.presets} - {SCHEDULER}):
        told = other_kind(model.name, model.scheduler, solver)
        if told is not None:
            warnings.warn(told, stacklevel=1)  # of this file, which the command line shows


# -- stages ----------------------------------------------------------------------------------------


def _export_stage(
    model: SourceModel, store: StageStore, options: ExportOptions, observer: Observer
) -> tuple[Segment, ...]:
    """Segments and weights."""
    key = stage_key("export", model=model.sha256, export=dataclasses.asdict(options))
    parts = len(EXPORT_PARTS)
    observer("export", 0, parts)
    facts = store.reuse("export", key)
    if facts is None:
        with new_folder(store.folder / SEGMENTS) as fresh:
            made = export_segments(model, fresh, options, observer)
            observer("export", EXPORT_PARTS.index("hash"), parts)
            home = place(store.folder, SEGMENTS, fresh)
        facts = {"segments": [to_plain(segment) for segment in placed(made, home)]}
        store.commit("export", key, _files_in(store, home), facts)
    observer("export", parts, parts)
    found = Field(facts["segments"], "segments", "the record of the export")
    return tuple(segment_from_plain(segment) for segment in found.items())


def _parts_stage(
    parts: Parts | None,
    model: ModelFacts,
    store: StageStore,
    earlier: Earlier,
    observer: Observer,
) -> PipelineFacts | None:
    """Text encoders, tokenizers and autoencoder; those that are there where none are given."""
    if parts is None:
        return None if earlier.bundle is None else earlier.bundle.pipeline
    if not parts.parts:
        _warn_of_lacking(parts.refused)
        return None
    hashes = {part.name: part.sha256 for part in parts.parts}
    zeros = parts.zeros_without_negative
    sizes = model.sizes.for_images(1, guided=False)
    further = {"noise_levels": parts.noise_levels} if parts.noise_levels else {}
    key = stage_key(
        "parts",
        parts=hashes,
        precision=model.precision,
        zeros=zeros,
        sizes=sizes.to_json(),
        **further,
    )
    total = len(parts.parts)
    facts = store.reuse("parts", key)
    if facts is None:
        made: list[Segment] = []
        tokenizers: dict[str, str] = {}
        untraced: dict[str, str] = {}
        with new_folder(store.folder / PARTS) as fresh:
            for done, part in enumerate(parts.parts):
                observer("parts", done, total)
                try:
                    made.append(export_part(part, fresh, model.precision, sizes))
                except ExportError as error:
                    untraced[part.name] = str(error)
                    continue
                if part.tokenizer:
                    tokenizers[part.name] = f"{part.name}.tokenizer.json"
                    write_text(fresh / tokenizers[part.name], part.tokenizer)
            home = place(store.folder, PARTS, fresh)
        pipeline = PipelineFacts(
            parts=placed(made, home),
            tokenizers={name: f"{home}/{file}" for name, file in tokenizers.items()},
            zeros_without_negative=zeros,
            noise_levels=parts.noise_levels,
        )
        facts = {"pipeline": to_plain(pipeline), "untraced": untraced}
        store.commit("parts", key, _files_in(store, home), facts)
    observer("parts", total, total)
    _warn_of_lacking({**parts.refused, **facts["untraced"]})
    return pipeline_from_plain(Field(facts["pipeline"], "pipeline", "the record of the parts"))


def _warn_of_lacking(parts: Mapping[str, str]) -> None:
    """Say which parts the bundle does not get, and why."""
    for name, reason in parts.items():
        warnings.warn(f"The bundle gets no {name}. {reason}", stacklevel=1)


def _files_in(store: StageStore, home: str) -> list[str]:
    """The files of a folder of the bundle, as the manifest names them."""
    return sorted(f"{home}/{path.name}" for path in (store.folder / home).iterdir())


def _costs(
    segments: Sequence[Segment], folder: Path, options: CompileOptions, facts: ModelFacts
) -> Costs:
    """What a step costs: as measured, as predicted for a GPU, or in GFLOP."""
    timings = options.timings
    guided = options.measurement.guidance_scale != 1.0
    sizes = facts.sizes.for_images(1, guided=guided)
    by_image = guided and facts.most_rows > 2 and options.measurement.image_guidance_scale != 1.0
    if by_image:
        sizes = dataclasses.replace(sizes, batch=facts.most_rows)
    if options.processor is not None:
        timings = predict(segments, folder, options.processor, sizes)
    timed = [p.name for p in options.presets if Needs.MILLISECONDS in p.policy.needs]
    if timed and timings is not None and timings.sizes != sizes:
        raise ConfigError(
            f"Preset {timed[0]!r} needs times of one image, at {sizes}; got some at "
            f"{timings.sizes}. "
            + (
                "With guidance by an image, predict"
                if by_image
                else "Measure with --images 1, or predict"
                if guided
                else "Without guidance, predict"
            )
            + " them with --gpu."
        )
    return counted(segments) if timings is None else timings.costs(segments)


def _preset_stage(
    maker: PresetMaker, wanted: Sequence[PresetOptions], observer: Observer
) -> dict[str, PresetEntry]:
    """The presets that were asked for, written; their lines of the manifest by name."""
    entries = {}
    for done, preset in enumerate(wanted):
        observer("presets", done, len(wanted))
        made = maker.make(preset)
        entries[made.name] = preset_entry(write_preset(maker.folder, made), made, maker.segments)
    observer("presets", len(wanted), len(wanted))
    return entries


# -- what the manifest says ------------------------------------------------------------------------


def _check_recommended(options: CompileOptions, known: Collection[str]) -> None:
    if options.recommended is not None and options.recommended not in known:
        raise ConfigError(
            f"Expected a recommended preset of {list(known)}, got {options.recommended!r}."
        )


def _export_options(options: CompileOptions, earlier: Earlier, model: SourceModel) -> ExportOptions:
    """With as many outputs and cuts as any preset needs, whether it is made now or stays."""
    needed = [preset.outputs for preset in options.presets]
    if options.like is not None:
        needed.append(options.like.model.outputs)
    outputs = max(options.export.outputs, earlier.outputs(model.sha256), *needed)
    theirs = () if options.like is None else options.like.model.blocks
    cuts = earlier.cuts(model.sha256).union(
        options.export.cuts,
        (block.cut for block in theirs if block.cut is not None),
        *(preset.policy.cuts for preset in options.presets),
    )
    return dataclasses.replace(options.export, outputs=outputs, cuts=tuple(sorted(cuts)))


def _in_order(earlier: Earlier, presets: Mapping[str, PresetEntry]) -> dict[str, PresetEntry]:
    """Presets that were there before first, in the order that they had."""
    before = [name for name in earlier.preset_names if name in presets]
    names = dict.fromkeys([*before, *presets])
    return {name: presets[name] for name in names}


def _recommended(
    options: CompileOptions, earlier: Earlier, presets: Mapping[str, PresetEntry]
) -> str:
    """The preset asked for; else the one recommended before; else the first that caches."""
    _check_recommended(options, presets)  # one of the earlier bundle's may not have stayed
    if options.recommended is not None:
        return options.recommended
    before = [each.recommended for each in (earlier.bundle, options.like) if each is not None]
    given = [preset.name for preset in options.presets]
    names = [name for name in (*before, *given, *presets) if name in presets]
    return next((name for name in names if presets[name].computed_fraction < 1), names[0])


def _tables(presets: Mapping[str, PresetEntry]) -> list[str]:
    return [entry.file for entry in presets.values()]


def _compiled(bundle: Bundle, earlier: Earlier, kept: KeptPresets, evaluations: int) -> Compiled:
    """What became of every preset, old and new."""
    before = {} if earlier.bundle is None else earlier.bundle.manifest.presets
    now = bundle.manifest.presets
    common = [name for name in now if name in before]
    same = [name for name in common if name in kept.entries or now[name] == before[name]]
    return Compiled(
        bundle=bundle,
        added=tuple(name for name in now if name not in before),
        replaced=tuple(name for name in common if name not in same),
        kept=tuple(same),
        removed=kept.removed,
        unreadable=earlier.unreadable,
        evaluations=evaluations,
    )


def _takes_classes(model: SourceModel) -> bool:
    """Whether a request names a class by its number."""
    return any(c.name == "class_labels" and c.dtype == "int64" for c in model.conditions)


def _model_facts(model: SourceModel, options: ExportOptions) -> ModelFacts:
    dtypes = {"model": options.precision, "float32": "float32", "int64": "int64"}
    return ModelFacts(
        name=model.name,
        sha256=model.sha256,
        precision=options.precision,
        channels=model.channels,
        downsampling=model.downsampling,
        outputs=options.outputs,
        blocks=tuple(
            BlockFacts(block.path, block.channels, block.depth if block.kind == BRANCH else None)
            for block in model.blocks
        ),
        sizes=model.sizes(),
        conditions=tuple(TensorSpec(c.name, dtypes[c.dtype], c.dims) for c in model.conditions),
        extra_inputs=tuple(c.name for c in model.conditions if c.beside_sample),
        classes=int(model.unet.config.num_class_embeds) if _takes_classes(model) else 0,
    )
