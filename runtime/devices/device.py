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
from blockcache.runtime.errors import InputError
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


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of one request."""

    scale: float
    rescale: float = 0.0  # phi of arXiv 2305.08891, section 3.4; 0: off

    def __post_init__(self) -> None:
        if not 0 <= self.rescale <= 1:
            raise InputError(f"guidance_rescale: expected 0 (off) to 1, got {self.rescale}.")


def modes_of(guidance: Guidance | None) -> tuple[bool, bool]:
    """(guided, rescaled): what decides which kernels a step launches."""
    return guidance is not None, guidance is not None and guidance.rescale != 0


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
        guidance: Guidance | None,
        latents: Tensor,
        history: Tensor,
        model_output: Tensor,
        model_input: Tensor,
    ) -> StepFunction:
        """A function that does guidance and the solver update of ``step``, in place.

        ``coefficients`` is float32 [S, 8] (``SolverTables``), latents and history float32
        [N, C, H, W], model output and input [2N, C, H, W], or [N, ...] without guidance.
        """

    def change(self, target: Tensor, now: Tensor, before: Tensor) -> Callable[[], None]:
        """A function that puts eq. 6 per image into ``target``, float32 [images].

        ``now`` and ``before`` are [images, ...], or with guidance [2 * images, ...]: an image's
        two halves count together.
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
        guidance: Guidance | None,
        latents: Tensor,
        history: Tensor,
        model_output: Tensor,
        model_input: Tensor,
    ) -> StepFunction:
        """The compiled kernel, or numpy."""
        images = latents.shape[0]
        sample, past = (_view(t).reshape(images, -1) for t in (latents, history))
        output, following = (_view(t).reshape(t.shape[0], -1) for t in (model_output, model_input))
        bind = _bind_kernels if kernels.host_available() else _bind_numpy
        return bind(coefficients, guidance, sample, past, output, following)

    def change(self, target: Tensor, now: Tensor, before: Tensor) -> Callable[[], None]:
        """The compiled kernel."""
        result, fresh, previous = map(_view, (target, now, before))

        def measure() -> None:
            images, dtype = len(result), now.dtype
            result[:], _ = kernels.relative_change(fresh, previous, images=images, dtype=dtype)

        return measure


def _bind_kernels(
    coefficients: np.ndarray,
    guidance: Guidance | None,
    sample: np.ndarray,
    past: np.ndarray,
    output: np.ndarray,
    following: np.ndarray,
) -> StepFunction:
    """The solver step as one pass of compiled code, and one before it for the rescale's factors."""
    uses_history = bool(coefficients[:, 2:6].any())
    factors = np.empty(len(sample), np.float32) if modes_of(guidance)[1] else None
    solver_step = kernels.bind_guided_solver_step(
        sample,
        sample=sample,
        model_out=output,
        table=coefficients,
        history_out=past if uses_history else None,
        history0=past if uses_history else None,
        next_input=following,
        guidance=None if guidance is None else guidance.scale,
        rescale=factors,
    )
    if guidance is None or factors is None:
        return solver_step
    find_factors = kernels.bind_guidance_rescale_factors(
        factors, model_out=output, guidance=guidance.scale, phi=guidance.rescale
    )

    def rescaled_step(step: int) -> None:
        find_factors()
        solver_step(step)

    return rescaled_step


def _bind_numpy(
    coefficients: np.ndarray,
    guidance: Guidance | None,
    sample: np.ndarray,
    past: np.ndarray,
    output: np.ndarray,
    following: np.ndarray,
) -> StepFunction:
    """The same in numpy, several passes."""
    scratch = np.empty_like(sample)
    scale = None if guidance is None else guidance.scale

    def step_in_numpy(step: int) -> None:
        if guidance is not None and guidance.rescale:
            _rescale_in_numpy(output, guidance)
        solver_step_numpy(coefficients[step], scale, sample, past, output, following, scratch)

    return step_in_numpy


def _rescale_in_numpy(output: np.ndarray, guidance: Guidance) -> None:
    """Scale both halves of ``output`` [2N, M] alike: their guided output is the rescaled one."""
    unconditional, conditional = output.reshape(2, -1, output.shape[1])
    guided = unconditional + np.float32(guidance.scale) * (conditional - unconditional)
    spread = conditional.std(axis=1, keepdims=True) / guided.std(axis=1, keepdims=True)
    factors = guidance.rescale * spread + (1 - guidance.rescale)
    output *= np.tile(factors.astype(np.float32), (2, 1))


def _view(tensor: Tensor) -> np.ndarray:
    assert tensor.array is not None, "a device tensor reached the host device"
    return tensor.array
