"""Sets of weights of one session: bundles of the same graphs and schedule, several kept by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.engines.engine import Engine
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import Preset, Segment

BASE = "base"
"""The set that a session opened with."""


@dataclass(frozen=True)
class WeightSet:
    """The weights that requests run on: all segments of one bundle, loaded."""

    name: str
    bundle: Bundle
    preset: Preset
    engines: Mapping[str, Engine]

    @property
    def bytes(self) -> int:
        """Of the file that its weights come from."""
        return self.bundle.weights.bytes


def preset_like(own: Bundle, preset: Preset, other: Bundle) -> Preset:
    """The preset of ``other`` named as ``preset``, where the bundles differ in weights alone.

    Time tables may differ: they are made of weights.

    Raises:
        ConfigError: another model, other graphs, or another schedule; the first that differs.
    """
    again = (
        f"Compile it with the presets of the bundle that is open: blockcache compile ... --like "
        f"{own.folder}"
    )
    for fact in fields(own.model):
        if fact.name in ("name", "sha256"):
            continue
        mine, theirs = getattr(own.model, fact.name), getattr(other.model, fact.name)
        if mine != theirs:
            raise ConfigError(
                f"Expected a bundle of the same U-Net with other weights, {other.folder} has "
                f"other {fact.name}: {theirs} where the open one has {mine}. {again}"
            )
    mine, theirs = _graphs(own), _graphs(other)
    strange = next(
        (name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)), None
    )
    if strange is not None:
        raise ConfigError(
            f"Expected a bundle of the same graphs with other weights, segment {strange!r} of "
            f"{other.folder} has another graph than in {own.folder}. {again}"
        )
    found = other.presets.get(preset.name)
    same = found is not None and (
        found.schedule == preset.schedule
        and found.alignment == preset.alignment
        and found.solver == preset.solver
        and found.guidance_scale == preset.guidance_scale
    )
    if found is None or not same:
        got = f"has presets {list(other.presets)}" if found is None else "has another schedule"
        raise ConfigError(
            f"Expected the preset {preset.name!r} as the session has it in {other.folder}, it "
            f"{got}. {again}"
        )
    return found


def changed_parts(own: Bundle, other: Bundle) -> tuple[Segment, ...]:
    """The parts of ``other`` beside the U-Net whose weights are not those of ``own``.

    Raises:
        ConfigError: other parts, graphs or tokenizers.
    """
    mine, theirs = ({p.name: p for p in each.manifest.parts} for each in (own, other))
    same = mine.keys() == theirs.keys() and own.tokenizers == other.tokenizers
    if not same or any(_sha256(own, mine[n])[0] != _sha256(other, theirs[n])[0] for n in mine):
        raise ConfigError(
            f"Expected a bundle whose text encoders, tokenizers and autoencoder differ in weights "
            f"alone from those of {own.folder}, {other.folder} has others. Compile both from one "
            f"pipeline."
        )
    return tuple(p for n, p in theirs.items() if _sha256(own, mine[n]) != _sha256(other, p))


def to_keep(sets: Mapping[str, WeightSet], active: str, keep_bytes: int) -> set[str]:
    """Names of the sets that stay loaded: the active one, and the last used within a limit.

    Args:
        sets: by name, the last used at the end.
        active: the one that requests run on; its bytes do not count.
        keep_bytes: of all others together.
    """
    kept, left = {active}, keep_bytes
    for name in reversed([name for name in sets if name != active]):
        if sets[name].bytes > left:
            break
        left -= sets[name].bytes
        kept.add(name)
    return kept


def _graphs(bundle: Bundle) -> dict[str, str]:
    """sha256 of every graph of the U-Net, by segment."""
    return {s.name: bundle.manifest.files[s.file].sha256 for s in bundle.segments}


def _sha256(bundle: Bundle, segment: Segment) -> tuple[str, ...]:
    """Of a segment's graph, then of its weights."""
    return tuple(bundle.manifest.files[name].sha256 for name in bundle.segment_files(segment))
