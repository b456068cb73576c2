"""Milliseconds of every segment, measured or predicted, and what a schedule pays for its blocks.

``blockcache bench --timings FILE`` writes what it measured; ``roofline.predict`` makes the same
from data sheets where nothing has been measured. The budget scheduler reads either::

    costs = read_timings(path).costs(segments)
    costs.block_ms, costs.trunk_ms      # float64 [K], float
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from blockcache.runtime.errors import ConfigError
from blockcache.runtime.files import write_text
from blockcache.runtime.plan import LOOP_ROLES, Segment, Sizes

FORMAT = "blockcache-timings"
FLOPS = "FLOPs"
"""The backend of GFLOP that stand in for milliseconds: proportions, but no times."""


@dataclass(frozen=True)
class Costs:
    """What one image pays: ``prompt + S * trunk + sum of the recomputed blocks``."""

    block_ms: np.ndarray  # float64 [K], one run of each block
    trunk_ms: float  # everything else of one step
    prompt_ms: float  # once per image
    source: str = ""  # FLOPS where in GFLOP, else whose milliseconds: "a100, roofline"

    def image_ms(self, recompute: np.ndarray) -> float:
        """Milliseconds of one denoising loop by a schedule, bool [S, K], and its prompt segment."""
        steps = recompute.shape[0]
        return float(self.prompt_ms + steps * self.trunk_ms + (recompute * self.block_ms).sum())


@dataclass(frozen=True)
class Timings:
    """Milliseconds per run of each segment, all taken on one engine library and device."""

    backend: str  # "ort", "trt", ...; "roofline" where predicted, FLOPS where counted
    device: str  # "AMD EPYC x 2", "NVIDIA H100 80GB HBM3"; "a100" where predicted, "" if any
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
        blocks = sorted((s for s in segments if s.block is not None), key=lambda s: s.block or 0)
        return Costs(
            block_ms=np.array([self.segment_ms[s.name] for s in blocks], np.float64),
            trunk_ms=sum(self.segment_ms[s.name] for s in segments if s.role in _TRUNK),
            prompt_ms=sum(self.segment_ms.get(s.name, 0.0) for s in segments if s.role == "prompt"),
            source=", ".join(part for part in (self.device, self.backend) if part),
        )

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
            content["segment_ms"] = {k: float(ms) for k, ms in content["segment_ms"].items()}
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"Expected timings that 'blockcache bench --timings' wrote at {where}, got "
                f"{type(error).__name__}: {error}."
            ) from error


_TRUNK = tuple(role for role in LOOP_ROLES if role != "block")


def counted(segments: Sequence[Segment]) -> Timings:
    """GFLOP in place of milliseconds, where a budget needs proportions alone."""
    return Timings(FLOPS, "", {}, {segment.name: segment.flops / 1e9 for segment in segments})


def write_timings(path: Path, timings: Timings) -> None:
    """Write a file that ``read_timings`` reads, atomically."""
    write_text(path, timings.to_json())


def read_timings(path: Path) -> Timings:
    """Read what ``write_timings`` wrote; ConfigError where there is no such file."""
    if not path.is_file():
        raise ConfigError(f"Expected a file of timings at {path}, found none.")
    return Timings.from_json(path.read_bytes().decode(errors="replace"), str(path))
