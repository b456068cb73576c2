"""Writing files: whole or not at all, and only where the path says.

Every file that blockcache writes is made here. It is written under a random name in the folder
where it will stand, flushed to the disk, and renamed. So a reader meets the old file or the new
one, a writer that is killed leaves the old one, and neither a link nor a second writer can turn
a write somewhere else.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"
"""Ending of a file or folder that is not finished; a writer that was killed leaves one behind."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` at the end, or vanishes where the body raises.

    Libraries that write to a name themselves may use the file's ``name``. A link at ``path`` is
    replaced, its goal is left alone.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "greeting.txt"
        >>> with replacing(path) as file:
        ...     _ = file.write(b"hello")
        >>> path.read_text()
        'hello'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_of(path)
    try:
        with open(partial, "xb", opener=_no_follow) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of ``folder`` at the end, or vanishes on an error.

    A reader that comes between the two renames finds no folder: for what can be made again.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh, stale = _partial_of(folder), _partial_of(folder)
    fresh.mkdir()
    try:
        yield fresh
        if folder.exists():
            folder.rename(stale)
        fresh.rename(folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(stale, ignore_errors=True)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically."""
    with replacing(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_bytes(path, text.encode())


def remove_partials(folder: Path) -> None:
    """Delete what killed writers left in ``folder``; call it where nobody else writes there."""
    for left in folder.glob(f".*{PARTIAL}"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _partial_of(path: Path) -> Path:
    """A name beside ``path`` that nobody can foresee."""
    return path.with_name(f".{secrets.token_hex(8)}{PARTIAL}")


def _no_follow(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _flush_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
