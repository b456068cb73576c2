"""The files of a bundle: inside its folder, as the manifest promises, the same when used.

Engine libraries open a file by its path, some time after it was checked. So each file's identity is
kept from the moment when it was read, and compared again when an engine has been loaded from it.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from blockcache.runtime.bundles.manifest import MANIFEST, FileEntry
from blockcache.runtime.errors import BundleIntegrityError, BundlePathError

MOST_READERS = 4


@dataclass(frozen=True)
class FileIdentity:
    """What tells a file from one that took its place, or from itself after it was written to."""

    device: int
    inode: int
    bytes: int
    modified_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileIdentity:
        """From what ``stat`` says."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class OpenedFile:
    """A file as it was when the bundle opened."""

    identity: FileIdentity
    content: bytes | None  # of files that are read as a whole


def open_files(
    root: Path, files: Mapping[str, FileEntry], *, read: Container[str], verify: bool
) -> dict[str, OpenedFile]:
    """Check files against the manifest, several at once.

    Args:
        root: The bundle's folder.
        files: What the manifest promises of each.
        read: Names of those whose content is kept. These are always hashed.
        verify: Hash all the others too; False compares their sizes only.

    Raises:
        BundlePathError: a path leaves the folder.
        BundleIntegrityError: a file is missing, cannot be read, is truncated or altered.
    """
    paths = {name: safe_path(root, name) for name in files}  # before any file is touched
    with ThreadPoolExecutor(max_workers=min(MOST_READERS, os.cpu_count() or 1)) as pool:
        checks = {
            name: pool.submit(
                _open_file, paths[name], name, entry, name in read, verify or name in read
            )
            for name, entry in files.items()
        }
        return {name: check.result() for name, check in checks.items()}


def require_unchanged(root: Path, name: str, identity: FileIdentity) -> None:
    """Raise BundleIntegrityError where a file is not the one that was checked."""
    path = safe_path(root, name)
    try:
        found = FileIdentity.of(path.stat())
    except OSError as error:
        raise _unreadable(name, error) from error
    if found != identity:
        raise BundleIntegrityError(
            f"Expected {name} as it was when the bundle was opened, it was replaced or written to "
            f"since. Open the bundle again."
        )


def safe_path(root: Path, name: str) -> Path:
    """``root / name``, or BundlePathError where that leaves ``root`` (also through a link).

    In a snapshot of the Hugging Face cache every file is a link to the cache's ``blobs``; these may
    be followed.
    """
    pure = PurePosixPath(name)
    foreign = "\\" in name or "\0" in name
    if pure.is_absolute() or ".." in pure.parts or foreign or not pure.parts:
        raise BundlePathError(
            f"Expected a path inside the bundle, got {name!r}. Do not use this bundle: its "
            f"manifest was tampered with."
        )
    path = root / pure
    try:
        goal, inside = path.resolve(), root.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself; pathlib calls it either
        raise BundlePathError(
            f"Expected a file at {name!r}, got links that lead in a circle. Copy the file into "
            f"the bundle or compile again."
        ) from error
    if not any(goal.is_relative_to(folder) for folder in (inside, *_blobs(inside))):
        raise BundlePathError(
            f"{name!r} links to {goal}, outside the bundle. Copy the file into the "
            f"bundle or compile again."
        )
    return path


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Manifest entries of files that were just written."""
    return {name: FileEntry.of(safe_path(folder, name)) for name in names}


def _blobs(folder: Path) -> tuple[Path, ...]:
    """Where a Hugging Face snapshot keeps its files: ``snapshots/<revision>`` beside ``blobs``."""
    snapshots = folder.parent
    if snapshots.name != "snapshots" or not snapshots.parent.name.startswith("models--"):
        return ()
    return (snapshots.parent / "blobs",)


def _open_file(path: Path, name: str, entry: FileEntry, keep: bool, verify: bool) -> OpenedFile:
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            found = os.fstat(file.fileno())
            _check_kind(name, entry, found)
            content = file.read() if keep else None
            if verify:
                stream = file if content is None else io.BytesIO(content)
                _check_content(name, entry, FileEntry.of_stream(stream))
            return OpenedFile(FileIdentity.of(found), content)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _missing(name) from error
    except OSError as error:
        raise _unreadable(name, error) from error


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe has no end to wait for


def _check_kind(name: str, entry: FileEntry, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise _missing(name)
    if found.st_size != entry.bytes:
        raise BundleIntegrityError(
            f"Expected {entry.bytes} bytes in {name}, got {found.st_size}: the file is truncated "
            f"or was replaced. Copy the bundle again or compile again."
        )


def _check_content(name: str, entry: FileEntry, found: FileEntry) -> None:
    if found != entry:
        raise BundleIntegrityError(
            f"The content of {name} does not match its sha256 in {MANIFEST}: it was altered. "
            f"Copy the bundle again or compile again."
        )


def _missing(name: str) -> BundleIntegrityError:
    return BundleIntegrityError(
        f"Expected {name} in the bundle, it is missing. Copy the whole folder or compile again."
    )


def _unreadable(name: str, error: OSError) -> BundleIntegrityError:
    return BundleIntegrityError(
        f"Expected {name} in the bundle, it cannot be read: {error.strerror}. Mend its "
        f"permissions, or copy the bundle again."
    )
