"""Milliseconds of every segment, measured or predicted, and the file they are kept in.

``blockcache bench --timings FILE`` writes what it measured; ``roofline.predict`` makes the same
from data sheets where nothing has been measured. A budget reads either::

    costs = read_timings(path).costs(segments)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from blockcache.export.costs.costs import Costs
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.files import write_text
from blockcache.runtime.plan import LOOP_ROLES, Segment, Sizes

FORMAT = "blockcache-timings"


@dataclass(frozen=True)
class Timings:
    """Milliseconds per run of each segment, all taken on one engine library and device."""

    backend: str  # "ort", "trt", ...; "roofline" where predicted
    device: str  # "AMD EPYC x 2", "NVIDIA H100 80GB HBM3"; "a100" where predicted
    sizes: Sizes  # batch (with guidance twice the images), height, width, tokens
    segment_ms: Mapping[str, float]  # by segment name; median where measured

    def __post_init__(self) -> None:
        wrong = {name: ms for name, ms in self.segment_ms.items() if not 0 <= ms < float("inf")}
        if wrong or not self.segment_ms:
            raise ConfigError(f"Expected times in ms of 0 or more, got {wrong or 'none at all'}.")

    def costs(self, segments: Sequence[Segment]) -> Costs:
        """Summed up for a bundle's segments; ConfigError where one of the loop was not timed."""
        missing = [s.name for s in segments if s.role in LOOP_ROLES and s.name not in self]
        if missing:
            raise ConfigError(
                f"Expected a time for every segment of the loop, {', '.join(missing[:5])} "
                f"({len(missing)} in all) have none: these timings on {self.device} are of another "
                f"model. Measure this one: blockcache bench BUNDLE --timings FILE"
            )
        source = ", ".join(part for part in (self.device, self.backend) if part)
        return Costs.of_segments(segments, self.segment_ms, "ms", source)

    def __contains__(self, segment: str) -> bool:
        return segment in self.segment_ms

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Timings:
        """Read the file; ConfigError where it is none."""
        try:
            content = json.loads(text)
            if content.pop("format") != FORMAT:
                raise ValueError(f"expected the format {FORMAT}")
            content["sizes"] = Sizes.from_json(content["sizes"])
            content["segment_ms"] = {k: float(ms) for k, ms in content["segment_ms"].items()}
            return cls(**content)
        except (ConfigError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"Expected timings that 'blockcache bench --timings' wrote at {where}, got "
                f"{type(error).__name__}: {error}."
            ) from error


def write_timings(path: Path, timings: Timings) -> None:
    """Write a file that ``read_timings`` reads, atomically."""
    write_text(path, timings.to_json())


def read_timings(path: Path) -> Timings:
    """Read what ``write_timings`` wrote; ConfigError where there is no such file."""
    if not path.is_file():
        raise ConfigError(f"Expected a file of timings at {path}, found none.")
    return Timings.from_json(path.read_bytes().decode(errors="replace"), str(path))
