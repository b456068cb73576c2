"""Tensors of other libraries as numpy arrays: DLPack, ``__cuda_array_interface__``.

Conditions in the engines' own dtype that lie on a session's GPU are copied there. Others on a
GPU take one copy through the host, after what their library has put on its current stream. The way
out, without a copy, is ``DeviceView``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blockcache.runtime.devices import cuda_driver, dlpack
from blockcache.runtime.devices.device import Device
from blockcache.runtime.devices.tensor import Tensor, decode
from blockcache.runtime.errors import InputError


def host_array(values: Any) -> Any:
    """Values of another library as a numpy array, 16-bit floats as float32; all else as it is.

    Raises:
        InputError: a tensor that cannot be read.
    """
    if values is None or isinstance(values, np.ndarray):
        return values
    if hasattr(values, "__dlpack__") and hasattr(values, "__dlpack_device__"):
        return _from_dlpack(values)
    if hasattr(values, "__cuda_array_interface__"):
        return _from_cuda(values.__cuda_array_interface__)
    return values


def place(device: Device, name: str, target: Tensor, values: Any) -> bool:
    """Copy a caller's tensor to where the engines read it.

    Args:
        device: where ``target`` lies.
        name: of the argument, for errors.
        target: of the shape and dtype that the engines read.
        values: float32 of numpy, or a tensor of another library, on the host or the GPU.

    Returns:
        Whether it lay on the device's GPU, so that the copy did not leave it.

    Raises:
        InputError: another shape or dtype, or a tensor that cannot be read.
    """
    if device.name != "cpu" and (lent := _lent_on_gpu(values, device.stream)) is not None:
        _require(name, target.shape, lent.shape, target.dtype, lent.dtype)
        _require_contiguous(lent.contiguous)
        device.copy_from(target, lent.pointer)
        return True
    array = host_array(values)
    if not isinstance(array, np.ndarray):
        raise InputError(f"{name}: expected a tensor, got {type(values).__name__}.")
    _require(name, target.shape, array.shape, "float32", str(array.dtype))
    device.upload(target, array)
    return False


def where_it_lies(device: Device, values: Any, dtype: str | None) -> Any:
    """A contiguous tensor of ``dtype`` on the device's own GPU as a ``Lent``; all else as it is."""
    if device.name == "cpu" or not hasattr(values, "__dlpack_device__"):
        return values
    if int(values.__dlpack_device__()[1]) != device.index:
        return values
    lent = _lent_on_gpu(values, device.stream)
    fits = lent is not None and lent.contiguous and lent.dtype == dtype
    return lent if fits else values


def _lent_on_gpu(values: Any, stream: int) -> dlpack.Lent | None:
    """A tensor on a GPU, complete on ``stream``; None for everything else."""
    if not hasattr(values, "__dlpack_device__"):
        return None
    if int(values.__dlpack_device__()[0]) not in (dlpack.CUDA, dlpack.CUDA_MANAGED):
        return None
    return _borrowed(values, stream)


def _require(
    name: str, shape: Sequence[int], given: Sequence[int], dtype: str, given_dtype: str
) -> None:
    if tuple(given) != tuple(shape) or given_dtype != dtype:
        raise InputError(
            f"{name}: expected {dtype} {list(shape)}, got {given_dtype} {list(given)}. Convert it "
            f"to {dtype} first; a batch of another size is another request."
        )


def host_arrays(values: Mapping[str, Any]) -> dict[str, Any]:
    """``host_array`` of every value."""
    return {name: host_array(each) for name, each in values.items()}


def _from_dlpack(values: Any) -> np.ndarray:
    """Copy a tensor of any library, on the host or the GPU."""
    lent = _borrowed(values, dlpack.LEGACY_STREAM)
    if lent.device in (dlpack.CPU, dlpack.CUDA_HOST):
        bits = dlpack.host_view(lent).copy()
    elif lent.device in (dlpack.CUDA, dlpack.CUDA_MANAGED):
        _require_contiguous(lent.contiguous)
        bits = _copied(lent.pointer, lent.shape, lent.dtype, dlpack.LEGACY_STREAM)
    else:
        raise InputError(
            f"Expected a tensor on the CPU or on a CUDA device, got DLPack device {lent.device}."
        )
    return _as_float32(bits, lent.dtype)


def _borrowed(values: Any, stream: int) -> dlpack.Lent:
    try:
        return dlpack.borrow(values, stream)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"Expected a tensor that can be read, got {type(values).__name__}: {error}. Convert it "
            f"to float32 first, without gradients."
        ) from error


def _from_cuda(interface: Mapping[str, Any]) -> np.ndarray:
    """Copy device memory to the host."""
    _require_contiguous(interface.get("strides") is None)
    dtype = np.dtype(interface["typestr"]).name
    stream = interface.get("stream") or dlpack.LEGACY_STREAM
    pointer = int(interface["data"][0])
    return _as_float32(_copied(pointer, interface["shape"], dtype, int(stream)), dtype)


def _require_contiguous(contiguous: bool) -> None:
    if not contiguous:
        raise InputError(
            "Expected a contiguous tensor on the GPU, got one with strides. Call .contiguous()."
        )


def _copied(pointer: int, shape: Sequence[int], dtype: str, stream: int) -> np.ndarray:
    host = np.empty(shape, "uint16" if dtype == "bfloat16" else dtype)
    cuda_driver.copy_to_host(host, pointer, stream)
    return host


def _as_float32(bits: np.ndarray, dtype: str) -> np.ndarray:
    """16-bit floats widened, which is exact; other types as they are."""
    if dtype in ("float16", "bfloat16"):
        return decode(bits.reshape(-1).view(np.uint8), dtype).reshape(bits.shape)
    return bits
