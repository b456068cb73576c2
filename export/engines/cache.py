"""Which engines are there already: keys by content, one record an engine, resume after a kill.

An engine is kept when the hash of everything it depends on is the same: the graph, the bytes of the
weights that this segment reads, the recipe and the library's version. This key is in the name of
its plan, so no build writes over a plan that an earlier one lists. Its record is written after its
plan, so a killed build leaves either both or nothing that counts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from blockcache.export.engines.engine import Recipe
from blockcache.export.revisions import REVISIONS
from blockcache.runtime.bundles.bundle_files import safe_path
from blockcache.runtime.bundles.manifest import FileEntry
from blockcache.runtime.engines.files import EngineEntry
from blockcache.runtime.files import remove_partials, write_text


@dataclasses.dataclass(frozen=True)
class SegmentWeights:
    """The weights that one segment reads from the shared file."""

    bytes: int
    sha256: str


def segment_weights(onnx: Path) -> SegmentWeights:
    """Size and hash of a segment's external weights, in the graph's order."""
    digest, total = hashlib.sha256(), 0
    tensors = [
        value.const_value
        for value in ir.load(onnx).graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    ]
    if not tensors:
        return SegmentWeights(0, digest.hexdigest())
    with Path(tensors[0].path).open("rb") as file:
        for tensor in tensors:
            count = tensor.length or 0
            digest.update(f"{tensor.name}:{count}\n".encode())
            file.seek(tensor.offset or 0)
            total += count
            while count:
                part = file.read(min(count, 1 << 22))
                digest.update(part)
                count -= len(part) or count  # a truncated file is noticed by the bundle's checks
    return SegmentWeights(total, digest.hexdigest())


def engine_key(recipe: Recipe, version: str, onnx_sha256: str, weights_sha256: str) -> str:
    """The hash of everything that an engine depends on; the number of threads does not count.

    An engine that can be refitted does not depend on the weights: give "" for them.
    """
    parts = dataclasses.asdict(recipe) | {"segment": recipe.segment.name, "onnx": onnx_sha256}
    del parts["threads"]
    content = {
        "revision": REVISIONS["engine"].number,
        "version": version,
        "weights": weights_sha256,
        **parts,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


class EngineStore:
    """Plans and records of one target's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._records = safe_path(folder, ".records")
        self._records.mkdir(parents=True, exist_ok=True)

    def plan(self, name: str, key: str) -> Path:
        """The plan of segment ``name`` with this key."""
        return self.folder / f"{_stem(name, key)}.plan"

    def reuse(self, name: str, key: str) -> EngineEntry | None:
        """The entry of an engine with this key and an intact plan, or None."""
        path = self._record(name, key)
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            entry = EngineEntry(**content)
        except (OSError, ValueError, TypeError):
            return None
        plan = self.plan(name, key)
        if entry.key != key or plan.is_symlink() or not plan.is_file():
            return None
        return entry if FileEntry.of(plan) == FileEntry(entry.bytes, entry.sha256) else None

    def commit(self, name: str, entry: EngineEntry) -> None:
        """Record an engine whose plan is on disk."""
        content = json.dumps(dataclasses.asdict(entry), indent=1)
        write_text(self._record(name, entry.key), content)

    def remove_partials(self) -> None:
        """Delete what a killed build left; call it where no build is writing."""
        remove_partials(self.folder)
        remove_partials(self._records)

    def remove_others(self, entries: Iterable[EngineEntry]) -> None:
        """Delete all engines but these, which a finished build lists."""
        listed = {Path(entry.file).stem for entry in entries}
        for path in (*self.folder.glob("*.plan"), *self._records.glob("*.json")):
            if path.stem not in listed:
                path.unlink()

    def _record(self, name: str, key: str) -> Path:
        return self._records / f"{_stem(name, key)}.json"


def _stem(name: str, key: str) -> str:
    return f"{name}-{key[:12]}"
