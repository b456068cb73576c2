"""The bundle: a folder that holds everything the runtime needs, and its manifest, both ways.

::

    manifest.json            format version, model facts, segments, presets, sha256 of every file
    segments/*.onnx          one graph a segment
    segments/weights.bin     the weights, once, shared by all graphs
    presets/*.safetensors    schedule, alignment and time tables of a preset
    profiles/*.safetensors   measured change[S, K]: mean and standard deviation (not read here)
    engines/<target>/        built engines (only where ``blockcache build`` ran)
    times/*.json             measured segment times (only where ``blockcache check`` ran)

A folder without ``manifest.json`` is not a bundle: writers put the manifest last, and every file
is written under a temporary name and renamed. Loading executes no code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from blockcache.runtime.errors import (
    BundleFormatError,
    BundleIntegrityError,
    BundlePathError,
    ConfigError,
    UnknownPresetError,
)
from blockcache.runtime.files import write_bytes
from blockcache.runtime.plan import (
    Alignment,
    BlockFacts,
    Dim,
    ModelFacts,
    Preset,
    Schedule,
    Segment,
    Sizes,
    TensorSpec,
    coefficient_names,
    preset_name,
    row_specs,
)
from blockcache.runtime.provenance import Provenance

FORMAT = "blockcache-bundle"
VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FileEntry:
    """Size and content of a file, as the manifest promises them."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """Read and hash a file."""
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        return cls(path.stat().st_size, digest.hexdigest())


@dataclass(frozen=True)
class PresetEntry:
    """A preset's line in the manifest: all but its tables."""

    file: str
    steps: int
    computed_fraction: float  # of the blocks' FLOPs
    guidance_scale: float
    solver: Mapping[str, object]
    provenance: Provenance


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``."""

    model: ModelFacts
    segments: tuple[Segment, ...]
    presets: Mapping[str, PresetEntry]
    files: Mapping[str, FileEntry]
    stages: Mapping[str, str]  # stage name -> key of what made its files (for resuming)

    def to_json(self) -> str:
        """The manifest as text: one way only to write it; presets keep their order."""
        content: dict[str, object] = {
            "format": FORMAT,
            "version": VERSION,
            "model": to_plain(self.model),
            "segments": [to_plain(segment) for segment in self.segments],
            "presets": {name: to_plain(entry) for name, entry in self.presets.items()},
            "files": {name: to_plain(entry) for name, entry in sorted(self.files.items())},
            "stages": dict(sorted(self.stages.items())),
        }
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST) -> Manifest:
        """Read a manifest; BundleFormatError where it is not one or of another version."""
        try:
            content = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise BundleFormatError(
                f"Expected JSON in {where}, got {error}. The file is damaged: compile again."
            ) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise BundleFormatError(f"Expected a {FORMAT} manifest, {where} is something else.")
        if content.get("version") != VERSION:
            raise BundleFormatError(
                f"Expected bundle format version {VERSION}, {where} has version "
                f"{content.get('version')}. Compile the model again with this blockcache, or "
                f"install the version that wrote it."
            )
        try:
            return cls(
                model=_model_facts(content["model"]),
                segments=tuple(segment_from_plain(entry) for entry in content["segments"]),
                presets={k: _preset_entry(entry) for k, entry in content["presets"].items()},
                files={k: FileEntry(**entry) for k, entry in content["files"].items()},
                stages=dict(content["stages"]),
            )
        except (ConfigError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise BundleFormatError(
                f"{where} is malformed: {type(error).__name__}: {error}. Compile the model again."
            ) from error


@dataclass(frozen=True)
class Bundle:
    """A verified bundle on disk."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> Bundle:
        """Open a bundle, by default after checking the sha256 of every file.

        Args:
            folder: What ``blockcache compile`` wrote.
            verify: False checks only that the files exist with the promised sizes (opens a
                multi-gigabyte bundle at once; altered bytes go unnoticed).

        Raises:
            BundleFormatError: not a bundle, or one of another format version.
            BundlePathError: a path leaves the folder.
            BundleIntegrityError: a file is missing, truncated or altered.
        """
        root = Path(folder)
        path = root / MANIFEST
        if not path.is_file():
            raise BundleFormatError(
                f"Expected a bundle with {MANIFEST} at {root}, found none. Either the path is "
                f"wrong or a compile did not finish: run blockcache compile again to resume it."
            )
        text = path.read_bytes().decode(errors="replace")  # what is not text is not JSON either
        bundle = cls(root, Manifest.from_json(text, str(path)))
        bundle._check_files(verify)
        return bundle

    @property
    def model(self) -> ModelFacts:
        """Facts of the source model."""
        return self.manifest.model

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All segments, in running order."""
        return self.manifest.segments

    @property
    def preset_names(self) -> tuple[str, ...]:
        """Names that ``preset`` takes."""
        return tuple(self.manifest.presets)

    def path(self, name: str) -> Path:
        """The file ``name`` of the manifest, inside the folder."""
        return safe_path(self.folder, name)

    def segment_path(self, segment: Segment) -> Path:
        """The segment's ONNX file."""
        return self.path(f"segments/{segment.file}")

    def preset(self, name: str) -> Preset:
        """Load a preset's tables; UnknownPresetError lists the names there are.

        ``dpm:20:x1.5`` is taken for ``dpm-20-x1.5``.
        """
        known = name if name in self.manifest.presets else preset_name(name)
        entry = self.manifest.presets.get(known)
        if entry is None:
            raise UnknownPresetError(
                f"Expected a preset of {list(self.preset_names)}, got {name!r}. Add one with "
                f"blockcache compile --preset."
            )
        preset = read_preset(self.path(entry.file), known, entry)
        self._check_fit(preset)
        return preset

    def _check_fit(self, preset: Preset) -> None:
        """Raise BundleFormatError unless the preset's tables have the model's widths."""
        widths = {
            name: table.shape[2]
            for k, table in enumerate(preset.alignment.tables)
            for name in coefficient_names(k, preset.alignment.outputs)
        }
        widths |= {name: int(table[0].size) for name, table in preset.time_tables.items()}
        for spec in row_specs(self.model, self.segments):
            wanted = int(math.prod(d.coefficient for d in spec.dims))  # batch axes broadcast
            if widths.get(spec.name) != wanted and preset.alignment.outputs == self.model.outputs:
                raise BundleFormatError(
                    f"Preset {preset.name!r}: expected {wanted} numbers a step for "
                    f"{spec.name!r}, got {widths.get(spec.name)}. Compile again."
                )
        if preset.schedule.blocks != len(self.model.blocks):
            raise BundleFormatError(
                f"Preset {preset.name!r}: expected a schedule of {len(self.model.blocks)} blocks, "
                f"got {preset.schedule.blocks}. Compile again."
            )

    def _check_files(self, verify: bool) -> None:
        listed = set(self.manifest.files)
        needed = {entry.file for entry in self.manifest.presets.values()}
        needed |= {f"segments/{segment.file}" for segment in self.segments}
        if not needed <= listed:
            raise BundleFormatError(
                f"{MANIFEST} names {sorted(needed - listed)} without a size and sha256. "
                f"Compile the model again."
            )
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            checks = [
                pool.submit(_check_file, self.path(name), name, entry, verify)
                for name, entry in self.manifest.files.items()
            ]
            for check in checks:
                check.result()


def safe_path(root: Path, name: str) -> Path:
    """``root / name``, or BundlePathError where that leaves ``root`` (also through a link)."""
    pure = PurePosixPath(name)
    foreign = "\\" in name or "\0" in name
    if pure.is_absolute() or ".." in pure.parts or foreign or not pure.parts:
        raise BundlePathError(
            f"Expected a path inside the bundle, got {name!r}. Do not use this bundle: its "
            f"manifest was tampered with."
        )
    path = root / pure
    if not path.resolve().is_relative_to(root.resolve()):
        raise BundlePathError(
            f"{name!r} links to {path.resolve()}, outside the bundle. Copy the file into the "
            f"bundle or compile again."
        )
    return path


def _check_file(path: Path, name: str, entry: FileEntry, verify: bool) -> None:
    if not path.is_file():
        raise BundleIntegrityError(
            f"Expected {name} in the bundle, it is missing. Copy the whole folder or compile again."
        )
    size = path.stat().st_size
    if size != entry.bytes:
        raise BundleIntegrityError(
            f"Expected {entry.bytes} bytes in {name}, got {size}: the file is truncated or was "
            f"replaced. Copy the bundle again or compile again."
        )
    if verify and FileEntry.of(path) != entry:
        raise BundleIntegrityError(
            f"The content of {name} does not match its sha256 in {MANIFEST}: it was altered. "
            f"Copy the bundle again or compile again."
        )


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file atomically."""
    write_bytes(path, save({name: np.ascontiguousarray(v) for name, v in tensors.items()}))


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file; BundleIntegrityError where it is not one."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BundleIntegrityError(
            f"Expected a safetensors file at {path}, got: {error}. Compile again."
        ) from error


def preset_bytes(preset: Preset) -> bytes:
    """A preset's tables as safetensors: ``recompute``, ``alignment.<k>``, ``time.<name>``."""
    tensors = {"recompute": preset.schedule.recompute.astype(np.uint8)}
    tensors |= {f"alignment.{k}": table for k, table in enumerate(preset.alignment.tables)}
    tensors |= {f"time.{name}": table for name, table in preset.time_tables.items()}
    return save({name: np.ascontiguousarray(table) for name, table in tensors.items()})


def write_preset(path: Path, preset: Preset) -> None:
    """Write a preset's tables atomically."""
    write_bytes(path, preset_bytes(preset))


def read_preset(path: Path, name: str, entry: PresetEntry) -> Preset:
    """Read a preset's tables back; BundleFormatError where they do not fit together."""
    tensors = read_tensors(path)
    try:
        schedule = Schedule(tensors.pop("recompute").astype(np.bool_))
        tables = tuple(tensors.pop(f"alignment.{k}") for k in range(schedule.blocks))
        return Preset(
            name=name,
            solver=entry.solver,
            schedule=schedule,
            alignment=Alignment(tables),
            time_tables={key.removeprefix("time."): table for key, table in tensors.items()},
            guidance_scale=entry.guidance_scale,
            provenance=entry.provenance,
        )
    except (KeyError, ConfigError) as error:
        raise BundleFormatError(
            f"The tables of preset {name!r} do not fit together: {error}. Compile again."
        ) from error


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Manifest entries of files that were just written."""
    return {name: FileEntry.of(safe_path(folder, name)) for name in names}


def to_plain(value: Any) -> Any:
    """Dataclasses to JSON: dimensions as text, everything else as it is."""
    if isinstance(value, Segment | ModelFacts | PresetEntry | FileEntry):
        return {key: to_plain(getattr(value, key)) for key in value.__dataclass_fields__}
    if isinstance(value, TensorSpec):
        dims = [int(d.coefficient) if not d.axes else str(d) for d in value.dims]
        return {"name": value.name, "dtype": value.dtype, "dims": dims}
    if isinstance(value, BlockFacts | Sizes):
        return asdict(value)
    if isinstance(value, Provenance):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value


def _tensor_spec(entry: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(
        entry["name"], entry["dtype"], tuple(Dim.parse(text) for text in entry["dims"])
    )


def segment_from_plain(entry: Mapping[str, Any]) -> Segment:
    """The inverse of ``to_plain`` for a segment."""
    specs = {
        side: tuple(_tensor_spec(tensor) for tensor in entry[side])
        for side in ("inputs", "outputs")
    }
    return Segment(**{**entry, **specs})


def _preset_entry(entry: Mapping[str, Any]) -> PresetEntry:
    return PresetEntry(**{**entry, "provenance": Provenance.from_json(entry["provenance"])})


def _model_facts(entry: Mapping[str, Any]) -> ModelFacts:
    return ModelFacts(
        **{
            **entry,
            "blocks": tuple(BlockFacts(**block) for block in entry["blocks"]),
            "sizes": Sizes.from_json(entry["sizes"]),
            "conditions": tuple(_tensor_spec(tensor) for tensor in entry["conditions"]),
        }
    )
