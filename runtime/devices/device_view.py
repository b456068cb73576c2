"""A result on the GPU, lent to other libraries without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np

from blockcache.runtime.devices import dlpack
from blockcache.runtime.devices.tensor import NUMPY_DTYPES, Tensor


class DeviceView:
    """A tensor of floats where it lies, as DLPack and as ``__cuda_array_interface__``.

    The latter has no bfloat16: such a tensor is lent by DLPack alone.

    ``torch.as_tensor``, ``torch.from_dlpack``, ``cupy.asarray`` and the like read it without a
    copy. What it shows is complete: nobody has to wait for a stream.
    """

    def __init__(self, tensor: Tensor, stream: int, index: int) -> None:
        self.tensor = tensor  # keeps the memory alive
        self._index = index
        if tensor.dtype != "bfloat16":
            self.__cuda_array_interface__ = {
                "shape": tensor.shape,
                "typestr": np.dtype(NUMPY_DTYPES[tensor.dtype]).str,
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
        tensor = self.tensor
        device = self.__dlpack_device__()
        return dlpack.lend(tensor.pointer, tensor.shape, tensor.dtype, device, tensor)
