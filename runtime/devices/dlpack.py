"""DLPack, in and out, through ctypes: tensors of torch, CuPy or JAX without importing these.

numpy reads DLPack itself, but neither bfloat16 nor device memory, which is what a pipeline on a GPU
hands over. The layout is version 0 of the protocol, which every library speaks.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
"""Device types."""

LEGACY_STREAM = 1
"""The producer makes its pending work visible to CUDA's default stream."""

_KINDS = {0: "i", 1: "u", 2: "f", 6: "b"}  # numpy's letter of a type code
_FLOAT, _BFLOAT = 2, 4


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("index", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("axes", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

_new = ctypes.pythonapi.PyCapsule_New
_new.restype = ctypes.py_object
_new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_of_capsule = (ctypes.c_void_p, ctypes.c_char_p)  # by address: a dying object takes no reference
_address = ctypes.PYFUNCTYPE(ctypes.c_void_p, *_of_capsule)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, *_of_capsule)(("PyCapsule_IsValid", ctypes.pythonapi))
_NAME = b"dltensor"


@dataclass(frozen=True)
class Lent:
    """A tensor of another library, for as long as this object lives."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    dtype: str  # numpy's name, or "bfloat16"
    device: int  # one of the device types
    capsule: Any  # frees the tensor with itself

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie one after the other in C order."""
        places = zip(self.shape, self.strides, _packed(self.shape), strict=True)
        return all(size == 1 or stride == step for size, stride, step in places)


def _packed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def borrow(values: Any, stream: int = LEGACY_STREAM) -> Lent:
    """Read what ``values.__dlpack__`` hands out; on a GPU it is complete on ``stream``.

    Raises:
        BufferError, RuntimeError, TypeError, ValueError: it hands out nothing that fits.
    """
    device = int(values.__dlpack_device__()[0])
    on_gpu = device in (CUDA, CUDA_MANAGED)
    capsule = values.__dlpack__(stream=stream) if on_gpu else values.__dlpack__()
    tensor = ctypes.cast(_address(id(capsule), _NAME), ctypes.POINTER(_Managed)).contents.tensor
    shape = tuple(tensor.shape[i] for i in range(tensor.axes))
    given = tensor.strides
    strides = tuple(given[i] for i in range(tensor.axes)) if given else _packed(shape)
    return Lent(
        (tensor.data or 0) + tensor.offset,
        shape,
        strides,
        _dtype_name(tensor.dtype),
        device,
        capsule,
    )


def _dtype_name(dtype: _DataType) -> str:
    if (dtype.code, dtype.bits, dtype.lanes) == (_BFLOAT, 16, 1):
        return "bfloat16"
    if dtype.code not in _KINDS or dtype.lanes != 1 or dtype.bits % 8:
        raise TypeError(f"DLPack type {dtype.code} of {dtype.bits} bits")
    return str(np.dtype(f"{_KINDS[dtype.code]}{dtype.bits // 8}").name)


def host_view(lent: Lent) -> np.ndarray:
    """Host memory as numpy sees it; bfloat16 as its bits, uint16."""
    dtype = np.dtype("uint16" if lent.dtype == "bfloat16" else lent.dtype)
    if 0 in lent.shape:
        return np.empty(lent.shape, dtype)
    last = sum((size - 1) * step for size, step in zip(lent.shape, lent.strides, strict=True))
    memory: Any = (ctypes.c_uint8 * ((last + 1) * dtype.itemsize)).from_address(lent.pointer)
    steps = [step * dtype.itemsize for step in lent.strides]
    return np.lib.stride_tricks.as_strided(np.frombuffer(memory, dtype), lent.shape, steps)


_lent_out: dict[int, tuple[Any, ...]] = {}  # by address of the structure: what it needs alive


def _take_back(managed: Any) -> None:
    """Called by a consumer that is done."""
    _lent_out.pop(ctypes.addressof(managed.contents), None)


def _drop(capsule: int) -> None:
    """A capsule is freed; consumers rename those they take, so that this one nobody took."""
    if _is_valid(capsule, _NAME):
        _lent_out.pop(_address(capsule, _NAME), None)


_DELETER = _Deleter(_take_back)
_DESTRUCTOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_drop)


_LENT_TYPES = {"float32": (_FLOAT, 32, 1), "float16": (_FLOAT, 16, 1), "bfloat16": (_BFLOAT, 16, 1)}


def lend(
    pointer: int, shape: Sequence[int], dtype: str, device: tuple[int, int], owner: Any
) -> Any:
    """A capsule with a contiguous tensor of floats; ``owner`` lives as long as it is used."""
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    tensor = _Tensor(pointer, _Device(*device), len(shape), _DataType(*_LENT_TYPES[dtype]), sizes)
    managed = _Managed(tensor, None, _DELETER)
    address = ctypes.addressof(managed)
    _lent_out[address] = (managed, sizes, owner)
    return _new(address, _NAME, ctypes.cast(_DESTRUCTOR, ctypes.c_void_p))
