"""Build: a bundle's segments become TensorRT engines for a target.

``build_engines`` is what ``blockcache build`` runs. Engines that did not change are kept, and an
interrupted build resumes. New engines are written beside the old ones; ``engines.json`` then lists
the new ones in place of the old, which are deleted last. So a build that stops anywhere, by an
error or a kill, leaves the engines that were there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from blockcache.export.engines.cache import EngineStore, engine_key, segment_weights
from blockcache.export.engines.engine import BuiltEngine, Recipe
from blockcache.export.engines.report import BuildReport, fusion_facts
from blockcache.export.engines.targets import ANY, CURRENT, Target
from blockcache.export.engines.workers import Job, run_jobs
from blockcache.export.observer import Observer, unobserved
from blockcache.export.sole_writer import sole_writer
from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.bundles.manifest import MANIFEST, FileEntry, Manifest
from blockcache.runtime.engines.files import (
    EngineEntry,
    EngineSet,
    ShapeProfile,
    engines_folder,
    write_engines,
)
from blockcache.runtime.engines.tensorrt_library import INSTEAD_OF_RTX, TensorRT, load_library
from blockcache.runtime.errors import BlockCacheError, ConfigError
from blockcache.runtime.plan import PART_ROLES, ModelFacts, Role, Segment

BUILT_ROLES: tuple[Role, ...] = ("prompt", "condition", "trunk", "block", *PART_ROLES)
WEIGHTS = {"included": (), "refittable": ("REFIT",), "stripped": ("REFIT", "STRIP_PLAN")}
"""Builder flags by what ``BuildOptions.weights`` says."""


@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """The sizes that engines accept; batch is the engine's: two per image with guidance."""

    min_batch: int = 1
    opt_batch: int = 2
    max_batch: int = 8
    resolutions: tuple[tuple[int, int], ...] = ()  # latent (height, width); () is the model's own
    dynamic: bool = False  # one profile from the smallest to the largest resolution

    def __post_init__(self) -> None:
        if not 1 <= self.min_batch <= self.opt_batch <= self.max_batch:
            raise ConfigError(
                f"Expected 1 <= min_batch <= opt_batch <= max_batch, got {self.min_batch}, "
                f"{self.opt_batch}, {self.max_batch}."
            )
        if self.dynamic and len(self.resolutions) < 2:
            raise ConfigError(
                "Dynamic shapes range over resolutions: give at least the smallest and the largest "
                f"(the first is the usual one), got {list(self.resolutions)}."
            )

    def profiles(self, model: ModelFacts) -> tuple[ShapeProfile, ...]:
        """One profile a resolution, or one for all of them."""
        usual = (model.sizes.height, model.sizes.width)
        chosen = self.resolutions or (usual,)
        for height, width in chosen:
            if height < 1 or width < 1 or height % model.downsampling or width % model.downsampling:
                raise ConfigError(
                    f"Expected latent sizes divisible by {model.downsampling}, got "
                    f"{height} x {width}. Choose the next multiples."
                )
        if self.dynamic:
            heights, widths = zip(*chosen, strict=True)
            low, high = (min(heights), min(widths)), (max(heights), max(widths))
            return (self._profile(model, low, chosen[0], high),)
        return tuple(self._profile(model, each, each, each) for each in dict.fromkeys(chosen))

    def _profile(self, model: ModelFacts, *resolutions: tuple[int, int]) -> ShapeProfile:
        batches = (self.min_batch, self.opt_batch, self.max_batch)
        sizes = [
            dataclasses.replace(model.sizes, batch=batch, height=height, width=width)
            for batch, (height, width) in zip(batches, resolutions, strict=True)
        ]
        return ShapeProfile(*sizes)


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How engines are built."""

    library: str = "auto"  # tensorrt_rtx, tensorrt, or the first that is installed
    shapes: ShapeOptions = field(default_factory=ShapeOptions)
    weights: str = "included"  # in the plan; or "refittable", "stripped" (need a CUDA driver)
    whole: bool = False  # also the uncut model as one engine, to know the split tax
    level: int = 3  # builder optimisation level, 0..5
    jobs: int = 0  # engines built at a time, each in a process of its own; 0: in this process
    memory_gb: float = 12.0  # engines are built side by side only where this is enough

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ConfigError(f"Expected weights of {list(WEIGHTS)}, got {self.weights!r}.")
        if not 0 <= self.level <= 5 or self.jobs < 0 or self.memory_gb <= 0:
            raise ConfigError(
                f"Expected a level of 0 to 5, no negative jobs and memory above 0; got {self}."
            )


def build_engines(
    bundle: Bundle,
    target: Target,
    options: BuildOptions | None = None,
    observer: Observer = unobserved,
) -> BuildReport:
    """Build a bundle's engines for ``target``; keeps what is there and did not change.

    Args:
        bundle: as opened.
        target: what to build for.
        options: how; default bfloat16 or whatever the bundle holds, static resolution, batch 1..8.
        observer: hears how many engines of ``target`` are there.

    Raises:
        ConfigError: a target or option that the library does not have, or a folder in use.
        MissingExtraError: no TensorRT is installed.
        ExportError: a node that the parser does not understand.
        EngineError: the builder failed.
        BundlePathError: a link leads out of the bundle.
    """
    options = options or BuildOptions()
    library = load_library(options.library)
    capabilities = _check_target(library, target, bundle.model.precision)
    folder = engines_folder(bundle, target.name)
    folder.mkdir(parents=True, exist_ok=True)
    with sole_writer(folder, "build"):
        return _build(bundle, target, capabilities, options, library, observer)


def _check_target(library: TensorRT, target: Target, precision: str) -> tuple[str, ...]:
    """The dotted compute capabilities that the engines will be for."""
    for_all = target.capabilities == (ANY,)
    if library.capabilities:
        known = (*library.capabilities, CURRENT, ANY)
        missing = [name for name in target.capabilities if name not in known]
        if missing:
            raise ConfigError(
                f"Expected compute capabilities of {list(library.capabilities)}, which are those "
                f"{library.name} {library.version} builds for; got {missing}. {INSTEAD_OF_RTX}"
            )
        if precision == "bfloat16" and "SM75" in target.capabilities:
            raise ConfigError("SM75 has no bfloat16. Compile the bundle with --precision float16.")
        if for_all or target.dotted:
            return _all_gpus(library, precision) if for_all else target.dotted
    from blockcache.runtime.devices.cuda_driver import device_capability

    device = device_capability()
    if problem := library.gpu_problem(device):
        raise ConfigError(problem)
    if for_all or (target.dotted and target.dotted != (device,)):
        raise ConfigError(
            f"{library.name} builds for the GPU of this machine ({device}) only, got "
            f"{target.name!r}. Build on that GPU, or with the library 'tensorrt_rtx'."
        )
    return (device,)


def _all_gpus(library: TensorRT, precision: str) -> tuple[str, ...]:
    """The dotted compute capabilities that an engine without a named one runs on."""
    lacking = "7.5" if precision == "bfloat16" else ""
    return tuple(each for each in library.dotted_capabilities if each != lacking)


def _build(
    bundle: Bundle,
    target: Target,
    capabilities: tuple[str, ...],
    options: BuildOptions,
    library: TensorRT,
    observer: Observer,
) -> BuildReport:
    begin = time.perf_counter()
    store = EngineStore(engines_folder(bundle, target.name))
    roles = (*BUILT_ROLES, "whole") if options.whole else BUILT_ROLES
    everything = (*bundle.segments, *bundle.manifest.parts)
    segments = tuple(segment for segment in everything if segment.role in roles)
    recipes = [_recipe(bundle, segment, target, options, library) for segment in segments]
    stage, peaks = f"engines {target.name}", [0]

    def finished(job: Job, built: BuiltEngine) -> None:
        name = job.recipe.segment.name
        peaks.append(built.peak_rss_bytes)
        entries[name] = _entry(bundle, job, built)
        store.commit(name, entries[name])
        observer(stage, len(entries), len(segments))

    store.remove_partials()
    with _until_exported_anew(bundle):
        entries, jobs = _plan_jobs(bundle, store, recipes, library.version)
        reused = frozenset(entries)
        observer(stage, len(entries), len(segments))
        try:
            run_jobs(jobs, options.jobs, int(options.memory_gb * 1e9), finished)
        finally:  # a worker that is killed cannot delete what it was writing
            store.remove_partials()
    engines = EngineSet(
        target=target.name,
        library=library.name,
        version=library.version,
        capabilities=capabilities,
        precision=bundle.model.precision,
        weights=options.weights,
        weights_sha256=bundle.weights.sha256,
        profiles=options.shapes.profiles(bundle.model),
        engines={segment.name: entries[segment.name] for segment in segments},
    )
    write_engines(bundle, engines)
    store.remove_others(engines.engines.values())
    return BuildReport(engines, segments, reused, time.perf_counter() - begin, max(peaks))


@contextlib.contextmanager
def _until_exported_anew(bundle: Bundle) -> Iterator[None]:
    """Say so where a compile has put other segments in place meanwhile, and deleted these.

    Raises:
        ConfigError: it has.
    """
    try:
        yield
    except (OSError, BlockCacheError):
        _require_same_segments(bundle)
        raise
    _require_same_segments(bundle)


def _require_same_segments(bundle: Bundle) -> None:
    now = Manifest.from_json((bundle.folder / MANIFEST).read_bytes()).files
    segments = (*bundle.segments, *bundle.manifest.parts)
    names = {name for segment in segments for name in bundle.segment_files(segment)}
    if any(now.get(name) != bundle.manifest.files[name] for name in names):
        raise ConfigError(
            f"A compile has replaced the segments of {bundle.folder} while their engines were "
            f"built. Run the same command again: engines whose graphs are the same are kept."
        )


def _recipe(
    bundle: Bundle, segment: Segment, target: Target, options: BuildOptions, library: TensorRT
) -> Recipe:
    flags = WEIGHTS[options.weights]
    if library.has_flag("REQUIRE_USER_ALLOCATION"):  # else no CUDA graph can hold the engine
        flags = (*flags, "REQUIRE_USER_ALLOCATION")
    return Recipe(
        segment=segment,
        onnx=bundle.segment_path(segment).absolute(),
        library=library.name,
        capabilities=target.capabilities,
        profiles=options.shapes.profiles(bundle.model),
        flags=flags,
        level=options.level,
        threads=4 // max(options.jobs, 1) or 1,
    )


def _plan_jobs(
    bundle: Bundle, store: EngineStore, recipes: Sequence[Recipe], version: str
) -> tuple[dict[str, EngineEntry], list[Job]]:
    """Engines to keep, and those to build, the largest first."""
    kept: dict[str, EngineEntry] = {}
    jobs = []
    fixed = not any("REFIT" in recipe.flags for recipe in recipes)
    for recipe in recipes:
        name = recipe.segment.name
        weights = segment_weights(recipe.onnx)
        onnx = bundle.manifest.files[recipe.segment.file].sha256
        key = engine_key(recipe, version, onnx, weights.sha256 if fixed else "")
        entry = store.reuse(name, key)
        if entry is None:
            jobs.append(Job(recipe, store.plan(name, key), key, weights.bytes))
        else:
            kept[name] = entry
    return kept, sorted(jobs, key=lambda job: -job.weight_bytes)


def _entry(bundle: Bundle, job: Job, built: BuiltEngine) -> EngineEntry:
    segment = job.recipe.segment
    seen = fusion_facts(segment, built.layers, _attentions(job.recipe.onnx))
    file = FileEntry.of(job.plan)
    return EngineEntry(
        file=job.plan.name,
        key=job.key,
        bytes=file.bytes,
        sha256=file.sha256,
        onnx_sha256=bundle.manifest.files[segment.file].sha256,
        weights_file_sha256=bundle.weights_of(segment).sha256,
        seconds=round(built.seconds, 3),
        formats=built.formats,
        kernels=seen.kernels,
        scratch_bytes=built.scratch_bytes,
        facts=seen.counts,
        copied=seen.copied,
    )


def _attentions(onnx: Path) -> int:
    """Attentions of a graph: each has one Softmax."""
    return sum(node.op_type in ("Softmax", "Attention") for node in ir.load(onnx).graph)
