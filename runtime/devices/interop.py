"""Tensors of other libraries, in and out: DLPack, ``__cuda_array_interface__``, numpy.

A request's inputs are small (noise, prompt embeddings), so a tensor on the GPU takes one copy
through the host, after what its library has put on its current stream. Results can be read in
place: ``Denoised.device_latents`` is a ``DeviceView``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blockcache.runtime.devices import dlpack
from blockcache.runtime.devices.device import Tensor, decode
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


def host_arrays(values: Mapping[str, Any]) -> dict[str, Any]:
    """``host_array`` of every value."""
    return {name: host_array(each) for name, each in values.items()}


def _from_dlpack(values: Any) -> np.ndarray:
    """Copy a tensor of any library, on the host or the GPU."""
    try:
        lent = dlpack.borrow(values)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"Expected a tensor that can be read, got {type(values).__name__}: {error}. Convert it "
            f"to float32 first, without gradients."
        ) from error
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
    from blockcache.runtime.devices.cuda import copy_to_host

    host = np.empty(shape, "uint16" if dtype == "bfloat16" else dtype)
    copy_to_host(host, pointer, stream)
    return host


def _as_float32(bits: np.ndarray, dtype: str) -> np.ndarray:
    """16-bit floats widened, which is exact; other types as they are."""
    if dtype in ("float16", "bfloat16"):
        return decode(bits.reshape(-1).view(np.uint8), dtype).reshape(bits.shape)
    return bits


class DeviceView:
    """A float32 tensor where it lies, as ``__cuda_array_interface__`` and as DLPack.

    ``torch.as_tensor``, ``torch.from_dlpack``, ``cupy.asarray`` and the like read it without a
    copy. What it shows is complete: nobody has to wait for a stream.
    """

    def __init__(self, tensor: Tensor, stream: int, index: int) -> None:
        assert tensor.dtype == "float32", tensor.dtype
        self._tensor = tensor  # keeps the memory alive
        self._index = index
        self.__cuda_array_interface__ = {
            "shape": tensor.shape,
            "typestr": "<f4",
            "data": (tensor.pointer, False),
            "version": 3,
            "strides": None,
            "stream": stream or dlpack.LEGACY_STREAM,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self._index

    def __dlpack__(self, *, copy: bool | None = None, **_: Any) -> Any:
        if copy:
            raise BufferError("This tensor is lent without a copy only.")
        tensor = self._tensor
        return dlpack.lend(tensor.pointer, tensor.shape, self.__dlpack_device__(), tensor)
