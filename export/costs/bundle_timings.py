"""A bundle's ``times/`` folder: the timings that ``blockcache check`` measured on its engines.

One file per device, engine library and sizes. The name starts with a hash of the segments' graphs,
so that times of an earlier compile are left out::

    costs = bundle_timings(bundle)[0].costs(bundle.segments)
"""

from __future__ import annotations

import hashlib
import re

from blockcache.export.costs.timings import Timings, read_timings, write_timings
from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.bundles.bundle_files import safe_path

FOLDER = "times"


def keep_timings(bundle: Bundle, timings: Timings) -> None:
    """Write a measurement into the bundle; the same device, engine and sizes are replaced."""
    sizes = "x".join(str(size) for _, size in sorted(timings.sizes.to_json().items()))
    name = f"{timings.device}-{timings.backend}-{sizes}".lower()
    slug = re.sub(r"[^a-z0-9.]+", "-", name)
    write_timings(safe_path(bundle.folder, f"{FOLDER}/{_graphs(bundle)}-{slug}.json"), timings)


def bundle_timings(bundle: Bundle) -> tuple[Timings, ...]:
    """The measurements of the bundle as it is now, the newest first.

    Raises:
        ConfigError: a file that is no measurement.
    """
    files = (bundle.folder / FOLDER).glob(f"{_graphs(bundle)}-*.json")
    newest = sorted(files, key=lambda path: -path.stat().st_mtime_ns)
    return tuple(read_timings(path) for path in newest)


def _graphs(bundle: Bundle) -> str:
    """A short hash of all segments' graphs."""
    files = bundle.manifest.files
    hashes = [files[segment.file].sha256 for segment in bundle.segments]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:12]
