"""What the host functions ask of a numpy array before its address goes to the library."""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from blockcache.kernels._library import DTYPES, KernelError

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
SeedArray = npt.NDArray[np.uint64]


def address(array: Array | None) -> int | None:
    return None if array is None else array.ctypes.data


@functools.cache
def _name_of(dtype: np.dtype[Any]) -> str:
    """`dtype.name`, which numpy works out anew each time, at more cost than a small kernel."""
    name: str = dtype.name
    return name


def samples_and_elements(name: str, array: Array) -> tuple[int, int]:
    """N and M of an array [N, ...]."""
    if array.ndim < 1 or array.size < 1:
        raise KernelError(f"{name}: expected an array [N, ...] with elements, got {array.shape}")
    return array.shape[0], array.size // array.shape[0]


def dtype_name(name: str, array: Array, dtype: str | None) -> str:
    """T by name, from the argument if given, else from the array."""
    T = _name_of(array.dtype) if dtype is None else dtype
    if T not in DTYPES:
        hint = "; pass dtype='bfloat16' for bfloat16 bits" if T == "uint16" else ""
        raise KernelError(f"{name}: expected one of {', '.join(DTYPES)}, got {T}{hint}")
    return T


def require_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise KernelError(f"{name}: expected shape {shape}, got {array.shape}")


def require(
    name: str,
    array: Array | None,
    shape: tuple[int, ...],
    T: str,
    dtype: str | None = None,
    *,
    write: bool = False,
) -> Array | None:
    """The array itself, once it has this shape and dtype and an order the kernels can read."""
    if array is None:
        return None
    require_shape(name, array, shape)
    is_bits = dtype == T == "bfloat16" and array.dtype == np.uint16
    if _name_of(array.dtype) != T and not is_bits:
        raise KernelError(f"{name}: expected {T}, got {array.dtype.name}")
    if not array.flags.c_contiguous or not array.flags.aligned or not array.dtype.isnative:
        raise KernelError(
            f"{name}: expected a C-contiguous, aligned array in native byte order; "
            "pass np.ascontiguousarray of it"
        )
    if write and not array.flags.writeable:
        raise KernelError(f"{name}: expected a writable array, got a read-only one")
    return array
