"""A result on the GPU, lent to other libraries without a copy."""

from __future__ import annotations

from typing import Any

from blockcache.runtime.devices import dlpack
from blockcache.runtime.devices.tensor import Tensor


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
