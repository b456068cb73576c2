"""Where tensors live and how they are moved: the host through numpy.

A ``Device`` hands out memory once, when a program is bound, and makes the few callables that the
denoising loop needs between engines. Everything it returns keeps its address.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from blockcache import kernels
from blockcache.runtime.solver import solver_step_numpy

StepFunction: TypeAlias = Callable[[int], None]
"""Called with the step number; touches bound memory only."""

_NUMPY_DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,  # numpy has no bfloat16: its bits
    "int64": np.int64,
    "uint8": np.uint8,
}


def _item_bytes(dtype: str) -> int:
    return int(np.dtype(_NUMPY_DTYPES[dtype]).itemsize)


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rows of numbers as rows of bytes in ``dtype``: [S, n] to uint8 [S, n * item size]."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        # Round to nearest even: add half of the dropped part, and one more where the kept is odd.
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.astype(np.uint16).view(np.uint8)
    return np.ascontiguousarray(values.astype(_NUMPY_DTYPES[dtype])).view(np.uint8)


def decode(content: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes of a tensor as numbers: the reverse of ``encode``."""
    if dtype == "bfloat16":
        single: np.ndarray = (content.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return single
    numbers: np.ndarray = content.view(dtype)
    return numbers.astype(np.float32) if dtype == "float16" else numbers.copy()


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
        return math.prod(self.shape) * _item_bytes(self.dtype)


class Device(Protocol):
    """Memory and data movement of one device."""

    @property
    def name(self) -> str:
        """``cpu`` or ``cuda``."""

    def allocate(self, count: int) -> Any:
        """``count`` bytes of zeroed memory, aligned to 256 bytes, freed with the object."""

    def tensor(self, memory: Any, offset: int, shape: Sequence[int], dtype: str) -> Tensor:
        """A tensor at ``offset`` bytes into ``memory``."""

    def upload(self, target: Tensor, values: np.ndarray) -> None:
        """Copy (and convert) host values into a tensor of the same shape."""

    def download(self, source: Tensor) -> np.ndarray:
        """A host copy, float32 for floating dtypes; waits for pending work."""

    def row_loader(self, row: Tensor, table: Tensor) -> StepFunction:
        """A function that copies row ``step`` of ``table [S, R]`` into ``row [R]``."""

    def solver(
        self,
        coefficients: np.ndarray,
        guidance_scale: float | None,
        latents: Tensor,
        history: Tensor,
        model_output: Tensor,
        model_input: Tensor,
    ) -> StepFunction:
        """A function that does guidance and the solver update of ``step``, in place.

        ``coefficients`` is float32 [S, 8] (``SolverTables``), latents and history float32
        [N, C, H, W], model output and input [2N, C, H, W], or [N, ...] without guidance.
        """


class HostDevice:
    """Host memory; the solver step runs in the compiled kernel, or in numpy without it."""

    name = "cpu"

    def allocate(self, count: int) -> np.ndarray:
        """``count`` zeroed bytes at an address that is a multiple of 256."""
        raw = np.zeros(count + 256, np.uint8)
        start = -raw.ctypes.data % 256
        return raw[start : start + count]

    def tensor(self, memory: np.ndarray, offset: int, shape: Sequence[int], dtype: str) -> Tensor:
        """A numpy view into ``memory``."""
        count = math.prod(shape) * _item_bytes(dtype)
        array = memory[offset : offset + count].view(_NUMPY_DTYPES[dtype]).reshape(shape)
        return Tensor(array.ctypes.data, tuple(shape), dtype, memory, array)

    def upload(self, target: Tensor, values: np.ndarray) -> None:
        """Copy into the view."""
        np.copyto(_view(target), values, casting="same_kind")

    def download(self, source: Tensor) -> np.ndarray:
        """A copy of the view."""
        values: np.ndarray = _view(source).copy()
        return values

    def row_loader(self, row: Tensor, table: Tensor) -> StepFunction:
        """One contiguous copy."""
        target, rows = _view(row), list(_view(table))

        def load(step: int) -> None:
            np.copyto(target, rows[step])

        return load

    def solver(
        self,
        coefficients: np.ndarray,
        guidance_scale: float | None,
        latents: Tensor,
        history: Tensor,
        model_output: Tensor,
        model_input: Tensor,
    ) -> StepFunction:
        """The compiled kernel, or numpy."""
        images = latents.shape[0]
        sample, past = (_view(t).reshape(images, -1) for t in (latents, history))
        output, following = (_view(t).reshape(t.shape[0], -1) for t in (model_output, model_input))
        if kernels.host_available():
            uses_history = bool(coefficients[:, 2:6].any())
            return kernels.bind_guided_solver_step(
                sample,
                sample=sample,
                model_out=output,
                table=coefficients,
                history_out=past if uses_history else None,
                history0=past if uses_history else None,
                next_input=following,
                guidance=guidance_scale,
            )
        scratch = np.empty_like(sample)

        def step_in_numpy(step: int) -> None:
            row = coefficients[step]
            solver_step_numpy(row, guidance_scale, sample, past, output, following, scratch)

        return step_in_numpy


def _view(tensor: Tensor) -> np.ndarray:
    assert tensor.array is not None, "a device tensor reached the host device"
    return tensor.array
