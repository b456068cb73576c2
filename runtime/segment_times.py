"""``times/*.json``: measured time of every segment, for schedules under a latency budget.

One file per device, engine library and size. ``blockcache check`` writes them on a GPU; a benchmark
may write them for any engine library. They name the ONNX file each time belongs to, so that times
of an earlier compile are not used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from blockcache.runtime.bundle import Bundle, safe_path, write_text
from blockcache.runtime.errors import BundleFormatError, ConfigError
from blockcache.runtime.plan import LOOP_ROLES, Sizes

FORMAT = "blockcache-times"
VERSION = 1
FOLDER = "times"


@dataclass(frozen=True)
class SegmentTimes:
    """Milliseconds that one launch of each segment takes."""

    device: str  # "NVIDIA A100-SXM4-80GB", or the CPU's name
    engine: str  # library and version: "tensorrt_rtx 1.7.1"
    sizes: Sizes  # batch, height, width, tokens of the measurement
    ms: Mapping[str, float]  # by segment name
    onnx_sha256: Mapping[str, str]  # by segment name: what was measured

    @classmethod
    def of(
        cls, bundle: Bundle, device: str, engine: str, sizes: Sizes, ms: Mapping[str, float]
    ) -> SegmentTimes:
        """Times measured on ``bundle`` as it is now; ConfigError where one is not above 0."""
        wrong = [name for name, value in ms.items() if not 0 < value < float("inf")]
        if wrong:
            raise ConfigError(f"Expected times above 0 ms, got {ms[wrong[0]]} for {wrong[0]!r}.")
        files = {segment.name: f"segments/{segment.file}" for segment in bundle.segments}
        hashes = {name: bundle.manifest.files[files[name]].sha256 for name in ms}
        return cls(device, engine, dict(sizes), dict(ms), hashes)

    @property
    def file(self) -> str:
        """Path in the bundle: the same device, engine and sizes are measured anew in place."""
        sizes = "x".join(str(self.sizes[axis]) for axis in sorted(self.sizes))
        name = f"{self.device}-{self.engine}-{sizes}".lower()
        return f"{FOLDER}/{re.sub(r'[^a-z0-9.]+', '-', name)}.json"

    def fits(self, bundle: Bundle) -> bool:
        """Whether every segment of the bundle's loop was measured as it is now."""
        return all(
            self.onnx_sha256.get(segment.name)
            == bundle.manifest.files[f"segments/{segment.file}"].sha256
            for segment in bundle.segments
            if segment.role in LOOP_ROLES
        )

    def costs(self, bundle: Bundle) -> tuple[np.ndarray, float]:
        """What a budget needs, in milliseconds: of each block, float64 [K], and of the rest."""
        blocks = np.zeros(len(bundle.model.blocks))
        rest = 0.0
        for segment in bundle.segments:
            if segment.block is not None:
                blocks[segment.block] = self.ms[segment.name]
            elif segment.role in LOOP_ROLES:
                rest += self.ms[segment.name]
        return blocks, rest


def write_times(bundle: Bundle, times: SegmentTimes) -> None:
    """Write one measurement into the bundle."""
    content = {"format": FORMAT, "version_of_format": VERSION, **asdict(times)}
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    write_text(safe_path(bundle.folder, times.file), text)


def read_times(bundle: Bundle) -> tuple[SegmentTimes, ...]:
    """The measurements that fit the bundle, the newest first.

    Raises:
        BundleFormatError: a file is not a measurement or of another version.
    """
    files = sorted(
        (bundle.folder / FOLDER).glob("*.json"), key=lambda path: -path.stat().st_mtime_ns
    )
    found = []
    for path in files:
        try:
            content = json.loads(path.read_text())
            if content.pop("format") != FORMAT or content.pop("version_of_format") != VERSION:
                raise ValueError(f"expected format {FORMAT} version {VERSION}")
            found.append(SegmentTimes(**content))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleFormatError(
                f"{path} is malformed: {type(error).__name__}: {error}. Delete it and measure "
                f"again with blockcache check."
            ) from error
    return tuple(times for times in found if times.fits(bundle))
