"""What stays of the bundle that a compile finds in its folder: presets that still fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from blockcache.export.bundle_writer import write_preset
from blockcache.export.graph.time_tables import time_tables
from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.bundles.bundle_files import hash_files
from blockcache.runtime.bundles.manifest import MANIFEST, FileEntry, PresetEntry
from blockcache.runtime.errors import BundleError, ConfigError
from blockcache.runtime.files import write_bytes
from blockcache.runtime.plan import ModelFacts, Preset, Segment
from blockcache.runtime.solvers.recorded import recorded_solver, timesteps_of

_MUST_AGREE = {
    "sha256": "of other weights",
    "precision": "of another precision",
    "blocks": "with other blocks to cache",
}
"""Facts of the model that a preset's tables depend on, and what is said of one that differs."""


@dataclass(frozen=True)
class Earlier:
    """The bundle that was in the folder before; ``bundle`` is None where there was none."""

    bundle: Bundle | None = None
    unreadable: str = ""  # why a bundle that is there cannot be opened

    @classmethod
    def read(cls, folder: Path) -> Earlier:
        """Open what is there; one that is damaged, or of another format, keeps nothing."""
        if not (folder / MANIFEST).is_file():
            return cls()
        try:
            return cls(Bundle.open(folder, verify=False))
        except BundleError as error:
            return cls(unreadable=str(error))

    @property
    def preset_names(self) -> tuple[str, ...]:
        """Of its presets, in their order."""
        return () if self.bundle is None else self.bundle.preset_names

    @property
    def part_files(self) -> dict[str, FileEntry]:
        """Of what stands beside its U-Net."""
        if self.bundle is None or not self.bundle.manifest.parts:
            return {}
        homes = {str(PurePosixPath(part.file).parent) for part in self.bundle.manifest.parts}
        files = self.bundle.manifest.files
        return {name: files[name] for name in files if str(PurePosixPath(name).parent) in homes}

    def outputs(self, model_sha256: str) -> int:
        """How many outputs the presets combine that may be kept: 1 or 2."""
        same = self.bundle is not None and self.bundle.model.sha256 == model_sha256
        return self.bundle.model.outputs if self.bundle is not None and same else 1

    def cuts(self, model_sha256: str) -> set[int]:
        """Depths of the branches that the presets may reuse that may be kept."""
        same = self.bundle is not None and self.bundle.model.sha256 == model_sha256
        blocks = self.bundle.model.blocks if self.bundle is not None and same else ()
        return {block.cut for block in blocks if block.cut is not None}


@dataclass(frozen=True)
class KeptPresets:
    """Presets of the earlier bundle, written for the new one, and those that had to go."""

    entries: Mapping[str, PresetEntry] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    removed: Mapping[str, str] = field(default_factory=dict)  # name -> why


def keep_presets(
    earlier: Earlier,
    folder: Path,
    model: ModelFacts,
    segments: Sequence[Segment],
    remade: Collection[str],
) -> KeptPresets:
    """Write the earlier bundle's presets for a new model's segments.

    Args:
        earlier: what was there.
        folder: the bundle's.
        model: of the new bundle.
        segments: of the new bundle.
        remade: names that this compile makes anew; they are left out.
    """
    old = earlier.bundle
    entries: dict[str, PresetEntry] = {}
    files: dict[str, FileEntry] = {}
    removed: dict[str, str] = {}
    for name in earlier.preset_names:
        if old is None or name in remade:
            continue
        entry = old.manifest.presets[name]
        reason = _misfit(old, model)
        if reason:
            removed[name] = reason
            continue
        if old.segments != tuple(segments) or old.model.outputs != model.outputs:
            written = write_preset(folder, _refitted(old.preset(name), folder, model, segments))
            entry = dataclasses.replace(entry, file=written)
        entries[name] = entry
        files |= hash_files(folder, _files_of(entry))
    return KeptPresets(entries, files, removed)


def check_like(like: Bundle, model: ModelFacts) -> None:
    """Raise ConfigError where a bundle differs from a new one in more than weights."""
    for fact in ("precision", "blocks", "outputs"):
        theirs, own = getattr(like.model, fact), getattr(model, fact)
        if theirs != own:
            raise ConfigError(
                f"Expected a bundle of the same U-Net with other weights, {like.folder} has other "
                f"{fact} ({theirs}) than {model.name!r} ({own}). Compile with presets of its own."
            )


def take_presets(
    like: Bundle, folder: Path, model: ModelFacts, segments: Sequence[Segment]
) -> KeptPresets:
    """Write the presets of a bundle of other weights: schedules and alignments as they are.

    Args:
        like: whose presets they are; ``check_like`` has passed.
        folder: of the new bundle.
        model: of the new bundle.
        segments: of the new bundle.
    """
    entries: dict[str, PresetEntry] = {}
    files: dict[str, FileEntry] = {}
    for name, entry in like.manifest.presets.items():
        written = write_preset(folder, _refitted(like.preset(name), folder, model, segments))
        entries[name] = dataclasses.replace(entry, file=written)
        for report in _files_of(entry)[1:]:
            write_bytes(folder / report, like.path(report).read_bytes())
        files |= hash_files(folder, _files_of(entries[name]))
    return KeptPresets(entries, files)


def _misfit(old: Bundle, model: ModelFacts) -> str:
    """Why presets of the earlier bundle cannot serve the new one, or nothing."""
    for fact, other in _MUST_AGREE.items():
        if getattr(old.model, fact) != getattr(model, fact):
            return f"it was made for a U-Net {other}"
    return ""


def _refitted(
    preset: Preset, folder: Path, model: ModelFacts, segments: Sequence[Segment]
) -> Preset:
    """The same preset for segments that were exported anew."""
    timesteps = timesteps_of(recorded_solver(preset.solver))
    return dataclasses.replace(
        preset,
        alignment=preset.alignment.combining(model.outputs),
        time_tables=time_tables(tuple(segments), folder, timesteps),
    )


def _files_of(entry: PresetEntry) -> list[str]:
    """The preset's tables, and the reports that it names."""
    reports = (entry.provenance.profile, entry.provenance.alignment_report)
    return [entry.file, *(name for name in reports if name is not None)]
