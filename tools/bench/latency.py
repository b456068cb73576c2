"""Latency of a bundle beside everything that its user could run instead, in one run.

Figures are medians over rounds in which all take turns; a ratio is the median of the ratios of each
round. Speed-ups are over the uncut model on the same engine at the steps that a preset replaces;
for other projects' caches, over PyTorch.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from blockcache.export import Observer, Timings
from blockcache.export.observer import unobserved
from blockcache.runtime import Bundle, ConfigError, Preset
from blockcache.runtime.engines.choice import make_backend
from blockcache.runtime.plan import Sizes
from blockcache.tools.bench.contestants import OTHER, PARTS, Contestant, Entry, Lineup
from blockcache.tools.bench.pictures import PictureRow, bundle_parts, picture_rows
from blockcache.tools.bench.promises import Promise, promises
from blockcache.tools.bench.segment_times import segment_times
from blockcache.tools.bench.sessions import (
    base_name,
    base_presets,
    bundle_contestants,
    host_cost_us,
    is_cached,
)
from blockcache.tools.report.machine import Steadiness, machine_facts
from blockcache.tools.report.spread import Spread

RUNTIME_ENGINES = ("ort", "ort-cuda", "ort-tensorrt", "trt")
PEER_ENGINES = ("torch", "torch-compile", "deepcache", "diffusers-pab")


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to time, and how often."""

    presets: tuple[str, ...] = ()  # of the bundle; () for all
    engines: tuple[str, ...] = ()  # of RUNTIME_ENGINES and PEER_ENGINES; () for all there are
    model: str = ""  # where the peers get their U-Net: "demo", a folder, a hub id; "" for none
    images: int = 1  # in one call
    rounds: int = 7  # timed
    warm_up: bool = True  # a first call of each and an untimed round
    threads: int | None = None  # of the CPU engines
    cpu_time: bool = False  # of all threads, in place of wall time: on a CPU that others use too

    def __post_init__(self) -> None:
        unknown = set(self.engines) - {*RUNTIME_ENGINES, *PEER_ENGINES}
        if unknown:
            raise ConfigError(
                f"Expected engines of {[*RUNTIME_ENGINES, *PEER_ENGINES]}, got {sorted(unknown)}."
            )
        if self.images < 1 or self.rounds < 1:
            raise ConfigError(f"Expected 1 image and 1 round or more, got {self}.")


@dataclass(frozen=True)
class Row:
    """One contestant's figures: a line of the paper's Table 1, and what it takes to get there."""

    engine: str
    kind: str
    preset: str
    base: str
    steps: int
    computed_fraction: float
    seconds: Spread  # one call
    images_per_s: float
    speedup: Spread | None  # over the uncut model; None where that did not run
    open_s: float
    first_s: float
    memory: Mapping[str, int]  # bytes by use


@dataclass(frozen=True)
class LatencyReport:
    """Result of ``measure_latency``."""

    model: str
    sizes: Sizes
    images: int
    rounds: int
    rows: tuple[Row, ...]
    pictures: tuple[PictureRow, ...]  # from prompt to picture; () where no engine has the parts
    promises: tuple[Promise, ...]
    timings: Mapping[str, Timings]  # by engine: median of every segment
    host_us_per_launch: float  # on engines that do nothing
    absent: Mapping[str, str]  # who did not run, and why
    machine: Mapping[str, str]
    steadiness: Mapping[str, str] = field(default_factory=dict)
    warm_up: bool = True  # whether untimed calls came first
    cpu_time: bool = False  # whether seconds are of the CPU, all threads; first_s never are


def own_timings(report: LatencyReport) -> Timings:
    """The segments' times of the first engine, of the bundle itself and not of another one."""
    own = [times for engine, times in report.timings.items() if OTHER not in engine]
    if not own:
        raise ConfigError(
            "Expected times of the bundle's segments, no engine has run them: "
            + "; ".join(f"{who}: {why}" for who, why in report.absent.items())
        )
    return own[0]


def measure_latency(
    bundle: Bundle,
    options: BenchOptions,
    observer: Observer = unobserved,
    against: Bundle | None = None,
) -> LatencyReport:
    """Time a bundle's presets, the uncut model and the peers on random prompts, interleaved.

    Args:
        bundle: as compiled.
        options: what to time.
        observer: progress.
        against: another bundle of the model with presets of the same names, compiled in another
            way. Its segments take their turns, its engines carry its folder's name; the uncut
            model is the first bundle's, so that a large one is in memory once.

    Raises:
        ConfigError: none of the wanted engines is there, or none got through; the message has the
            reasons. Or ``against`` is of another model, or other steps.
        UnknownPresetError: a preset that a bundle does not have.
    """
    presets = [bundle.preset(name) for name in options.presets or bundle.preset_names]
    same = [] if against is None else _same_presets(bundle, presets, against)
    lineup = assemble(bundle, presets, options)
    if against is not None:
        admit_bundle(lineup, against, same, options, OTHER + against.folder.absolute().name)
    steadiness = Steadiness()
    clock = time.process_time if options.cpu_time else time.perf_counter
    lineup.take_turns(options.rounds, steadiness.sample, observer, clock)
    steadiness.sample()
    denoising = [made for made in lineup.contestants if made.kind not in PARTS]
    if not denoising:
        reasons = "; ".join(f"{who}: {why}" for who, why in lineup.absent.items())
        raise ConfigError(f"Expected at least one engine to time, there is none. {reasons}")
    timings = {
        made.engine: segment_times(made)
        for made in denoising
        if made.kind == "split" and made.session is not None
    }
    return LatencyReport(
        model=bundle.model.name,
        sizes=bundle.model.sizes,
        images=options.images,
        rounds=options.rounds,
        rows=tuple(_row(made, denoising) for made in denoising),
        pictures=tuple(picture_rows(lineup.contestants)),
        promises=tuple(promises(denoising, timings)),
        timings=timings,
        host_us_per_launch=host_cost_us(bundle, presets[0], options.images),
        absent=lineup.absent,
        machine=machine_facts(),
        steadiness=steadiness.notes(),
        warm_up=options.warm_up,
        cpu_time=options.cpu_time,
    )


def _same_presets(bundle: Bundle, presets: Sequence[Preset], against: Bundle) -> list[Preset]:
    """The other bundle's presets; an error where they cannot be compared with the first's."""
    ours, theirs = bundle.model, against.model
    if (ours.blocks, ours.sizes) != (theirs.blocks, theirs.sizes):
        raise ConfigError(
            f"Expected another bundle of the model {ours.name}, at {ours.sizes}; "
            f"{against.folder} is of {theirs.name}, at {theirs.sizes}."
        )
    same = [against.preset(preset.name) for preset in presets]
    for mine, other in zip(presets, same, strict=True):
        if base_name(mine) != base_name(other) or is_cached(mine) != is_cached(other):
            raise ConfigError(
                f"Expected preset {mine.name!r} with as many steps in both bundles, and cached in "
                f"both or neither; it differs in {against.folder}. Leave it out: --preset NAME."
            )
    return same


def assemble(bundle: Bundle, presets: Sequence[Preset], options: BenchOptions) -> Lineup:
    """Open everything that is to be timed and can be."""
    lineup = Lineup(tried=options.warm_up)
    admit_bundle(lineup, bundle, presets, options)
    peers = [engine for engine in PEER_ENGINES if engine in (options.engines or PEER_ENGINES)]
    if peers and not options.model:
        lineup.absent[", ".join(peers)] = "no PyTorch model given (--model)"
    elif peers:
        from blockcache.tools.bench.torch_loop import open_loop, torch_contestants
        from blockcache.tools.bench.torch_parts import torch_parts

        loop = open_loop(options.model, bundle.model.precision, options.images, options.threads)
        bases = base_presets(presets)
        for engine in peers:
            lineup.admit(engine, functools.partial(torch_contestants, loop, engine, bases))
        lineup.admit("torch", functools.partial(torch_parts, loop, options.model))
    return lineup


def admit_bundle(
    lineup: Lineup,
    bundle: Bundle,
    presets: Sequence[Preset],
    options: BenchOptions,
    label: str = "",
) -> None:
    """Add a bundle's contestants on every engine of the runtime.

    A labelled bundle is the other one: the label ends its engines' names, and it stays cut.
    """
    for engine in RUNTIME_ENGINES:
        if engine in (options.engines or RUNTIME_ENGINES):

            def entries(engine: str = engine) -> Iterator[Entry]:
                backend = make_backend(engine, threads=options.threads)
                name, images = engine + label, options.images
                yield from bundle_contestants(
                    bundle, presets, backend, name, images, uncut=not label
                )
                if not label:
                    yield from bundle_parts(bundle, presets[0], backend, name, images)

            lineup.admit(engine + label, entries)


def _row(made: Contestant, everyone: Sequence[Contestant]) -> Row:
    engine = "torch" if made.engine in PEER_ENGINES else made.library
    whole = [o for o in everyone if (o.engine, o.kind, o.base) == (engine, "whole", made.base)]
    return Row(
        engine=made.engine,
        kind=made.kind,
        preset=made.preset,
        base=made.base,
        steps=made.steps,
        computed_fraction=made.computed_fraction,
        seconds=Spread.of(made.seconds),
        images_per_s=made.images / statistics.median(made.seconds),
        speedup=Spread.of_ratio(whole[0].seconds, made.seconds) if whole else None,
        open_s=made.open_s,
        first_s=made.first_s,
        memory=made.memory,
    )
