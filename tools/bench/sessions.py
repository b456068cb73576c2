"""The contestants that the runtime runs: the uncut model, the split one, and every preset."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from blockcache.runtime import (
    Bundle,
    EmptyBackend,
    Preset,
    RunRecord,
    Session,
)
from blockcache.runtime.engines.engine import Backend
from blockcache.runtime.plan import LOOP_ROLES
from blockcache.runtime.run_table import blocks_share
from blockcache.tools.bench.contestants import Contestant, Entry, Kind
from blockcache.tools.sources.references import uncached, whole_bundle, whole_preset

GUIDANCE = 5.0
"""For presets that have no scale of their own. Guidance doubles the batch, so a benchmark without
guidance would measure half the work."""


def bundle_contestants(
    bundle: Bundle,
    presets: Sequence[Preset],
    backend: Backend,
    engine: str,
    images: int,
    *,
    uncut: bool = True,
) -> Iterator[Entry]:
    """Every preset, and what it is compared with: the uncut model and the split one, uncached.

    Those two run once for each number of steps that a cached preset has. A preset that recomputes
    everything in fewer steps than a cached one of its solver is the paper's baseline of fewer
    steps. It runs uncut: whoever does not cache has no reason to cut the model. Without ``uncut``
    the uncut model runs in neither role.
    """

    def entry(kind: Kind, preset: Preset, base: Preset) -> Entry:
        def open_it() -> Contestant:
            whole = kind in ("whole", "fewer steps")
            session = Session(
                whole_bundle(bundle) if whole else bundle,
                whole_preset(preset) if whole else uncached(preset) if kind == "split" else preset,
                backend,
            )
            return _contestant(session, engine, kind, base_name(base), images)

        return Entry(f"{engine} {kind} {preset.name}", open_it)

    bases = base_presets(presets)
    for base in bases:
        if uncut:
            yield entry("whole", base, base)
        yield entry("split", base, base)
    for preset in presets:
        if is_cached(preset):
            yield entry("cached", preset, base_of(preset, bases))
        elif uncut and base_name(preset) not in map(base_name, bases):
            yield entry("fewer steps", preset, base_of(preset, bases))


def is_cached(preset: Preset) -> bool:
    """Whether it reuses anything."""
    return not preset.schedule.recompute.all()


def base_name(preset: Preset) -> str:
    """Solver and steps: runs of equal names are compared."""
    return f"{preset.solver['solver']}-{preset.schedule.steps}"


def base_presets(presets: Sequence[Preset]) -> list[Preset]:
    """One preset for every solver and number of steps that something is cached at, else of all."""
    made: dict[str, Preset] = {}
    for preset in [preset for preset in presets if is_cached(preset)] or presets:
        full = [other for other in presets if _is_full(other, preset)]
        base = full[0] if full else preset  # a joint preset alone is compared with its own steps
        made.setdefault(base_name(base), base)
    return list(made.values())


def _is_full(other: Preset, preset: Preset) -> bool:
    """Whether ``other`` has the solver and all the steps of the run that ``preset`` replaces."""
    same = other.solver["solver"] == preset.solver["solver"]
    return same and other.schedule.steps == preset.replaced_steps


def base_of(preset: Preset, bases: Sequence[Preset]) -> Preset:
    """The uncached run that a preset replaces: same solver, the next larger number of steps."""
    steps = preset.replaced_steps
    same = [b for b in bases if b.solver["solver"] == preset.solver["solver"]]
    larger = [b for b in same if b.schedule.steps >= steps]
    return min(larger or same or bases, key=lambda b: b.schedule.steps)


def _contestant(session: Session, engine: str, kind: Kind, base: str, images: int) -> Contestant:
    bundle, preset = session.bundle, session.preset
    weights = [entry.bytes for name, entry in bundle.manifest.files.items() if "weights" in name]
    return Contestant(
        engine=engine,
        kind=kind,
        preset=preset.name,
        base=base,
        steps=preset.schedule.steps,
        images=images,
        run=denoiser(session, images),
        session=session,
        computed_fraction=blocks_share(bundle.segments, preset.schedule),
        memory={"weights": sum(weights), **dataclasses.asdict(session.memory(images))},
    )


def denoiser(session: Session, images: int) -> Callable[[], RunRecord]:
    """A function that denoises the same random images under the same random prompts."""
    model = session.bundle.model
    rng = np.random.default_rng(0)
    sizes = dataclasses.replace(model.sizes, batch=images)

    def conditions() -> dict[str, np.ndarray]:
        return {
            spec.name: np.zeros(spec.shape(sizes), np.int64)
            if spec.dtype == "int64"
            else rng.standard_normal(spec.shape(sizes), np.float32)
            for spec in model.conditions
        }

    positive, negative = conditions(), conditions()
    prompts = positive.pop("encoder_hidden_states"), negative.pop("encoder_hidden_states")
    noise = session.noise(range(images))
    guidance = session.preset.guidance_scale

    def run() -> RunRecord:
        return session.denoise(
            noise,
            *prompts,
            conditions=positive,
            negative_conditions=negative,
            guidance_scale=guidance if guidance > 1 else GUIDANCE,
            seeds=range(images),
        ).record

    return run


def host_cost_us(bundle: Bundle, preset: Preset, images: int = 1, repeats: int = 9) -> float:
    """Host time per step and segment on engines that do nothing, in microseconds (median)."""
    run = denoiser(Session(bundle, preset, EmptyBackend()), images)
    segments = sum(segment.role in LOOP_ROLES for segment in bundle.segments)
    records = [run() for _ in range(repeats)]
    return statistics.median(r.total_ns / 1e3 / (len(r.steps) * segments) for r in records)
