"""One writer at a time: whoever writes to a folder holds its lock until it ends, or is killed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from blockcache.runtime.bundles.bundle_files import safe_path
from blockcache.runtime.errors import ConfigError

LOCK = ".lock"
"""An empty file beside what is written."""


@contextlib.contextmanager
def sole_writer(folder: Path, work: str) -> Iterator[None]:
    """Hold the lock of ``folder``, which is there already.

    A lock that is a link says nothing and is made anew: a bundle that was sent through the hub has
    one, to the hub's cache.

    Args:
        folder: what is written to.
        work: what writes, for the error: "compile", "build".

    Raises:
        ConfigError: another process holds the lock.
        BundlePathError: the lock is a link to somewhere else.
    """
    path = safe_path(folder, LOCK)
    if path.is_symlink():
        path.unlink(missing_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(
            f"Another {work} is writing to {folder}. Wait for it: what it finishes is kept."
        ) from error
    try:
        yield
    finally:
        lock.release()
