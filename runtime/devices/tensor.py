"""A tensor at a fixed address, and numbers as the bytes of its dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

NUMPY_DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,  # numpy has no bfloat16: its bits
    "int64": np.int64,
    "uint8": np.uint8,
}
"""What numpy holds a tensor's elements in."""


def item_bytes(dtype: str) -> int:
    """Size of one element in bytes."""
    return int(np.dtype(NUMPY_DTYPES[dtype]).itemsize)


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rows of numbers as rows of bytes in ``dtype``: [S, n] to uint8 [S, n * item size]."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        # Round to nearest even: add half of the dropped part, and one more where the kept is odd.
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.astype(np.uint16).view(np.uint8)
    return np.ascontiguousarray(values.astype(NUMPY_DTYPES[dtype])).view(np.uint8)


def decode(content: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes of a tensor as numbers: the reverse of ``encode``."""
    if dtype == "bfloat16":
        single: np.ndarray = (content.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return single
    numbers: np.ndarray = content.view(dtype)
    return numbers.astype(np.float32) if dtype == "float16" else numbers.copy()


@dataclass(frozen=True)
class Window:
    """A rectangle of a tensor's last two axes, in every plane of the axes before them."""

    pointer: int  # of the first element
    planes: int
    rows: int
    row_bytes: int
    pitch: int  # bytes from row to row
    plane_bytes: int  # from plane to plane
    owner: Any  # keeps the memory alive
    array: np.ndarray | None  # a view, where the host can see the memory


@dataclass(frozen=True)
class Tensor:
    """A tensor at a fixed address."""

    pointer: int
    shape: tuple[int, ...]
    dtype: str
    owner: Any  # keeps the memory alive
    array: np.ndarray | None = None  # a view, where the host can see the memory

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * item_bytes(self.dtype)

    def along(self, start: int, count: int) -> Tensor:
        """So many entries of the first axis, in place."""
        shape = (count, *self.shape[1:])
        offset = start * (self.bytes // self.shape[0])
        array = None if self.array is None else self.array[start : start + count]
        return Tensor(self.pointer + offset, shape, self.dtype, self.owner, array)

    def window(self, rows: slice = slice(None), columns: slice = slice(None)) -> Window:
        """A rectangle of the last two axes, in place; by default all of them."""
        *planes, height, width = self.shape
        (top, bottom, _), (left, right, _) = rows.indices(height), columns.indices(width)
        item = item_bytes(self.dtype)
        return Window(
            pointer=self.pointer + (top * width + left) * item,
            planes=math.prod(planes),
            rows=bottom - top,
            row_bytes=(right - left) * item,
            pitch=width * item,
            plane_bytes=height * width * item,
            owner=self.owner,
            array=None if self.array is None else self.array[..., rows, columns],
        )
