"""Tensors of other libraries, in and out: DLPack, ``__cuda_array_interface__``, numpy.

A request's inputs are small (noise, prompt embeddings), so a tensor on the GPU takes one copy
through the host; it must be complete, or on the current stream of its own library. Results can be
read in place: ``device_view`` is what ``torch.as_tensor`` and ``cupy.asarray`` take without a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from blockcache.runtime.device import Tensor
from blockcache.runtime.errors import InputError

_TYPES = {"float32": "<f4", "float16": "<f2", "int64": "<i8", "uint8": "|u1"}


def host_array(values: Any) -> Any:
    """Values of another library as a numpy array; everything else as it is."""
    if values is None or isinstance(values, np.ndarray):
        return values
    if hasattr(values, "__cuda_array_interface__"):
        return _from_cuda(values.__cuda_array_interface__)
    if hasattr(values, "__dlpack__"):
        try:
            return np.from_dlpack(values)
        except (BufferError, RuntimeError, TypeError) as error:
            raise InputError(
                f"Expected a tensor that numpy can read, got {type(values).__name__}: {error}. "
                f"Convert it to float32 on the CPU first."
            ) from error
    return values


def host_arrays(values: Mapping[str, Any]) -> dict[str, Any]:
    """``host_array`` of every value."""
    return {name: host_array(each) for name, each in values.items()}


def _from_cuda(interface: Mapping[str, Any]) -> np.ndarray:
    """Copy device memory to the host."""
    from blockcache.runtime.cuda import copy_to_host

    if interface.get("strides") is not None:
        raise InputError(
            "Expected a contiguous tensor on the GPU, got one with strides. Call .contiguous()."
        )
    host = np.empty(interface["shape"], np.dtype(interface["typestr"]))
    stream = interface.get("stream")
    copy_to_host(host, int(interface["data"][0]), 0 if stream in (None, 1) else int(stream))
    return host


class DeviceView:
    """A tensor where it lies, as ``__cuda_array_interface__``."""

    def __init__(self, tensor: Tensor, stream: int) -> None:
        self._tensor = tensor  # keeps the memory alive
        self.__cuda_array_interface__ = {
            "shape": tensor.shape,
            "typestr": _TYPES[tensor.dtype],
            "data": (tensor.pointer, False),
            "version": 3,
            "strides": None,
            "stream": stream or 1,
        }
