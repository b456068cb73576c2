"""Writing a bundle: beside the old one, until one rename puts the new one in its place.

A file that a manifest names has its content's hash in its own name or in its folder's, so nothing
is ever written over what the old manifest names. When all is on the disk the new manifest replaces
the old one; what only the old one named is deleted after that. A compile that stops anywhere, by
an error or a kill, leaves the bundle that was there.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

from blockcache.export.sole_writer import LOCK
from blockcache.export.stages import RECORDS
from blockcache.runtime.bundles.bundle_files import safe_path
from blockcache.runtime.bundles.manifest import MANIFEST, FileEntry, Manifest, PresetEntry
from blockcache.runtime.bundles.tensor_files import preset_bytes
from blockcache.runtime.files import remove_partials, settle, write_bytes, write_text
from blockcache.runtime.plan import Preset, Segment
from blockcache.runtime.run_table import blocks_share

SEGMENTS, PARTS, PRESETS, PROFILES = "segments", "parts", "presets", "profiles"
"""The folders that a compile writes to; engines and times are others'."""


def check_folders(root: Path) -> None:
    """Raise BundlePathError where a place that a compile writes to is a link to somewhere else."""
    for name in (SEGMENTS, PARTS, PRESETS, PROFILES, RECORDS, LOCK):
        safe_path(root, name)


def place(root: Path, kind: str, fresh: Path) -> str:
    """Rename the folder that an export filled to what its content says.

    Args:
        root: the bundle's folder.
        kind: ``SEGMENTS`` or ``PARTS``.
        fresh: a new folder in ``root/kind``.

    Returns:
        The folder as the manifest names it, from ``root``.
    """
    files = {path.name: FileEntry.of(path) for path in sorted(fresh.iterdir())}
    listed = "".join(f"{name} {entry.sha256}\n" for name, entry in files.items())
    folder = f"{kind}/{_short(listed.encode())}"
    goal = safe_path(root, folder)
    if not goal.is_dir():
        settle(fresh, goal)
    else:  # left by an earlier export of the same content: mend what was altered since
        for name, entry in files.items():
            if not _holds(goal / name, entry):
                (fresh / name).replace(goal / name)
    return folder


def placed(segments: Sequence[Segment], folder: str) -> tuple[Segment, ...]:
    """Segments whose files lie in a folder of the bundle."""
    return tuple(dataclasses.replace(s, file=f"{folder}/{s.file}") for s in segments)


def write_preset(root: Path, preset: Preset) -> str:
    """Write a preset's tables, unless they are there; returns the file as the manifest names it."""
    content = preset_bytes(preset)
    name = f"{PRESETS}/{preset.name}-{_short(content)}.safetensors"
    path = root / name
    if path.is_symlink() or not path.is_file() or path.read_bytes() != content:
        write_bytes(path, content)
    return name


def preset_entry(file: str, preset: Preset, segments: Sequence[Segment]) -> PresetEntry:
    """A preset's line in the manifest."""
    return PresetEntry(
        file=file,
        steps=preset.schedule.steps,
        computed_fraction=round(blocks_share(segments, preset.schedule), 6),
        guidance_scale=preset.guidance_scale,
        solver=preset.solver,
        provenance=preset.provenance,
    )


def remove_leftovers(root: Path) -> None:
    """Delete what killed compiles left half written; call it where no compile is writing."""
    for folder in (root, *(root / name for name in (SEGMENTS, PARTS, PRESETS, PROFILES, RECORDS))):
        remove_partials(folder)


def switch(root: Path, manifest: Manifest) -> None:
    """Put the new bundle in the old one's place: a reader finds the one or the other, whole."""
    write_text(root / MANIFEST, manifest.to_json())


def collect(root: Path, keep: Collection[str]) -> None:
    """Delete what no manifest names any more.

    Args:
        root: the bundle's folder, after the switch.
        keep: files, as the manifest names them.
    """
    for name in (SEGMENTS, PARTS, PRESETS, PROFILES):
        folder = root / name
        if not folder.is_dir():
            continue
        for path in sorted(folder.rglob("*"), reverse=True):  # files before their folders
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(root).as_posix() not in keep:
                path.unlink()


def _holds(path: Path, entry: FileEntry) -> bool:
    """Whether a file is there and has this content."""
    return path.is_file() and not path.is_symlink() and FileEntry.of(path) == entry


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
