"""Which engines are there already: keys by content, one record an engine, resume after a kill.

An engine is kept when the hash of everything it depends on is the same: the graph, the bytes of the
weights that this segment reads, the recipe and the library's version. Its record is written after
its plan, so a killed build leaves either both or nothing that counts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import onnx_ir as ir

from blockcache.export.engines.engine import Recipe
from blockcache.export.revisions import REVISIONS
from blockcache.runtime.bundle_files import safe_path
from blockcache.runtime.engines.files import EngineEntry
from blockcache.runtime.files import write_text
from blockcache.runtime.manifest import FileEntry


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

    def plan(self, name: str) -> Path:
        """The plan of segment ``name``."""
        return self.folder / f"{name}.plan"

    def reuse(self, name: str, key: str) -> EngineEntry | None:
        """The entry of an engine with this key and an intact plan, or None."""
        path = self._records / f"{name}.json"
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            entry = EngineEntry(**content)
        except (OSError, ValueError, TypeError):
            return None
        plan = self.plan(name)
        if entry.key != key or not plan.is_file():
            return None
        return entry if FileEntry.of(plan) == FileEntry(entry.bytes, entry.sha256) else None

    def commit(self, name: str, entry: EngineEntry) -> None:
        """Record an engine whose plan is on disk."""
        write_text(self._records / f"{name}.json", json.dumps(dataclasses.asdict(entry), indent=1))

    def remove_others(self, names: set[str]) -> None:
        """Delete plans and leftovers of segments that the bundle no longer has."""
        for path in (*self.folder.glob("*.plan"), *self.folder.glob("*.partial")):
            if path.name.removesuffix(".plan") not in names:
                path.unlink()
        for path in self._records.glob("*.json"):
            if path.stem not in names:
                path.unlink()
