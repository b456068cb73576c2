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
    replaced; the file that it leads to is left alone.

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
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say where
        raise
    _flush_folder(path.parent)


@contextlib.contextmanager
def new_folder(parent: Path) -> Iterator[Path]:
    """An empty folder in ``parent``, to be filled and renamed; deleted where that did not happen.

    Raises:
        OSError: the disk is full, or ``parent`` cannot be written to.
    """
    parent.mkdir(parents=True, exist_ok=True)
    fresh = _partial_of(parent / "any")
    fresh.mkdir()
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of ``folder`` at the end, or vanishes on an error.

    A reader that comes between the two renames finds no folder, so this is only for what can be
    made again.
    """
    with new_folder(folder.parent) as fresh:
        yield fresh
        stale = _partial_of(folder)
        if folder.exists():
            folder.rename(stale)
        settle(fresh, folder)
    shutil.rmtree(stale, ignore_errors=True)


def settle(fresh: Path, folder: Path) -> None:
    """Flush the files of a new folder, then rename it to ``folder``, which is not there yet."""
    for path in fresh.iterdir():
        if path.is_file():
            _flush(path)
    _flush_folder(fresh)
    fresh.rename(folder)
    _flush_folder(folder.parent)


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


def _flush(path: Path) -> None:
    """Make a file's content, or the names in a folder, last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot, and do not need to
        _flush(folder)
