"""Stage records: what a compile has finished already, and from what.

Each stage has a key, the hash of everything its result depends on: inputs, options, versions of
other libraries, and the revision of our own code (``revisions.py``). When a stage is done, its
files are hashed into ``.stages/<stage>.json``; a later compile with the same key and intact files
takes them as they are. So an interrupted compile resumes, and a changed option redoes only the
stages that depend on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from blockcache.export.revisions import REVISIONS
from blockcache.runtime.bundles.bundle_files import hash_files
from blockcache.runtime.bundles.manifest import FileEntry
from blockcache.runtime.files import write_text

RECORDS = ".stages"
"""Folder of what only a compile reads; nothing in it is part of the bundle."""

_TOOLS = ("blockcache", "torch", "diffusers", "onnx", "onnx_ir", "onnxscript")


def stage_key(stage: str, /, **parts: Any) -> str:
    """The hash of a stage's inputs and options, of our own code's revision, and tool versions.

    Args:
        stage: a key of ``REVISIONS``.
        parts: whatever else the result depends on; JSON values, or what ``str`` tells apart.
    """
    code = {"stage": stage, "revision": REVISIONS[stage].number}
    versions = {tool: _version(tool) for tool in _TOOLS}
    text = json.dumps({**code, "versions": versions, **parts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


class StageStore:
    """The stage records of one bundle folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / RECORDS).mkdir(parents=True, exist_ok=True)
        self.files: dict[str, FileEntry] = {}

    def reuse(self, stage: str, key: str) -> Mapping[str, Any] | None:
        """The facts of a finished stage with this key and intact files, or None."""
        record = self._record(stage)
        if not record.is_file():
            return None
        content = json.loads(record.read_text())
        entries = {name: FileEntry(**entry) for name, entry in content["files"].items()}
        if content["key"] != key or any(
            not (self.folder / name).is_file() or FileEntry.of(self.folder / name) != entry
            for name, entry in entries.items()
        ):
            return None
        self._note(entries)
        facts: Mapping[str, Any] = content["facts"]
        return facts

    def commit(self, stage: str, key: str, files: Iterable[str], facts: Mapping[str, Any]) -> None:
        """Record a stage whose files (relative names) are on disk."""
        entries = hash_files(self.folder, files)
        content = {
            "key": key,
            "files": {name: entry.__dict__ for name, entry in entries.items()},
            "facts": facts,
        }
        write_text(self._record(stage), json.dumps(content, indent=1, sort_keys=True))
        self._note(entries)

    def recorded_files(self) -> set[str]:
        """The files of all stages that a later compile may take as they are."""
        records = (self.folder / RECORDS).glob("*.json")
        return {name for record in records for name in json.loads(record.read_text())["files"]}

    def scratch(self, stage: str) -> Path:
        """A file in which an unfinished stage may keep what it has so far."""
        return self.folder / RECORDS / f"{stage}.partial.safetensors"

    def _record(self, stage: str) -> Path:
        return self.folder / RECORDS / f"{stage}.json"

    def _note(self, entries: Mapping[str, FileEntry]) -> None:
        shipped = {k: v for k, v in entries.items() if not k.startswith(f"{RECORDS}/")}
        self.files.update(shipped)
