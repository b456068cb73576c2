"""Lifetimes to arena offsets: where each boundary tensor lives inside one allocation.

Pure. A tensor is live from the segment that writes it to the last segment that reads it, both
included; two tensors that are live at the same segment never overlap. Greedy by size, lowest
offset that fits: the classic offset assignment for tensors of different sizes, within a few
percent of the lower bound on U-Nets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT_BYTES = 256
"""Offsets are multiples of this: enough for 128-bit device accesses and TensorRT's bindings."""


@dataclass(frozen=True)
class Lifetime:
    """A tensor's size and the positions of its first write and last read."""

    bytes: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        """Whether both are live at some position."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Arena:
    """Offsets of the tensors, in the order given, and the bytes to allocate."""

    offsets: tuple[int, ...]
    bytes: int


def aligned(count: int) -> int:
    """``count`` rounded up to ``ALIGNMENT_BYTES``."""
    return -(-count // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def peak_bytes(tensors: Sequence[Lifetime]) -> int:
    """The lower bound: most bytes live at one position."""
    positions = {t.first for t in tensors}
    return max(
        (sum(aligned(t.bytes) for t in tensors if t.first <= p <= t.last) for p in positions),
        default=0,
    )


def plan_arena(tensors: Sequence[Lifetime]) -> Arena:
    """Assign offsets so that tensors live at the same time never overlap.

    Examples:
        >>> plan_arena([Lifetime(100, 0, 1), Lifetime(100, 1, 2), Lifetime(100, 2, 3)])
        Arena(offsets=(0, 256, 0), bytes=512)
    """
    offsets = [0] * len(tensors)
    placed: list[int] = []
    for index in sorted(range(len(tensors)), key=lambda i: (-tensors[i].bytes, i)):
        neighbours = sorted(
            (offsets[other], offsets[other] + aligned(tensors[other].bytes))
            for other in placed
            if tensors[other].meets(tensors[index])
        )
        offsets[index] = _first_gap(neighbours, aligned(tensors[index].bytes))
        placed.append(index)
    top = max((offsets[i] + aligned(t.bytes) for i, t in enumerate(tensors)), default=0)
    return Arena(tuple(offsets), top)


def _first_gap(occupied: Sequence[tuple[int, int]], size: int) -> int:
    """The lowest offset with ``size`` free bytes between ``occupied`` ranges sorted by start."""
    candidate = 0
    for start, end in occupied:
        if start - candidate >= size:
            break
        candidate = max(candidate, end)
    return candidate
