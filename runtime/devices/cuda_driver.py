"""The CUDA driver, by way of cuda-bindings: calls, devices, primary contexts. The only door to it.

cuda-bindings is NVIDIA's own thin binding (Apache-2.0 by the wheel of 13.5, a few MB); a tensor
framework would be a thousand times that. Only the driver API is used: it works with every driver
that has the functions, and says what a driver lacks. Everything here imports without a GPU; the
first call that needs one raises a single EngineError.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from blockcache.runtime.errors import EngineError, MissingExtraError

_WITHOUT_A_GPU = (
    "Run on a machine with an NVIDIA GPU and its driver, or use ONNX Runtime on the CPU (backend "
    "'ort') with a float32 bundle."
)


@functools.cache
def driver() -> Any:
    """``cuda.bindings.driver``, initialised."""
    try:
        bindings = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise MissingExtraError.of("cuda-bindings", "tensorrt-rtx", "Running on a GPU") from error
    try:
        _checked(bindings, "cuInit", 0)
    except EngineError as error:
        raise EngineError(
            f"Expected a CUDA device, got {str(error).rstrip('.')}. {_WITHOUT_A_GPU}"
        ) from error
    return bindings


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the driver; its result, or EngineError with the error's name."""
    return _checked(driver(), name, *arguments)


def _checked(bindings: Any, name: str, *arguments: Any) -> Any:
    try:
        code, *results = getattr(bindings, name)(*arguments)
    except RuntimeError as error:  # no libcuda, or one without this function
        raise EngineError(f"{name}: {error}") from error
    if int(code) != 0:
        _, symbol = bindings.cuGetErrorName(code)
        _, text = bindings.cuGetErrorString(code)
        raise EngineError(f"{name}: {_text(symbol)}: {_text(text)}")
    return results[0] if len(results) == 1 else tuple(results)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


# -- devices ---------------------------------------------------------------------------------------


def device_count() -> int:
    """GPUs that can be used; 0 where there is no driver or no cuda-bindings."""
    try:
        return int(call("cuDeviceGetCount"))
    except (EngineError, MissingExtraError):
        return 0


def driver_version() -> tuple[int, int]:
    """The latest CUDA version that the driver knows, such as (13, 0)."""
    version = int(call("cuDriverGetVersion"))
    return version // 1000, version % 1000 // 10


def current_device() -> int:
    """The device that this thread uses, as ``torch.cuda.set_device`` leaves it; else 0."""
    if not int(call("cuCtxGetCurrent")):
        return 0
    return int(call("cuCtxGetDevice"))


def device_capability(index: int | None = None) -> str:
    """Compute capability of a device, such as "8.0"; default the current one.

    Raises:
        EngineError: there is no such GPU; the message says what to do.
    """
    device = _device(current_device() if index is None else index)
    kinds = driver().CUdevice_attribute
    major = kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    minor = kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
    return ".".join(str(call("cuDeviceGetAttribute", kind, device)) for kind in (major, minor))


def _device(index: int) -> Any:
    """The driver's name for a device."""
    count = int(call("cuDeviceGetCount"))
    if not 0 <= index < count:
        raise EngineError(
            f"Expected a CUDA device of 0 to {count - 1}, got {index}. CUDA_VISIBLE_DEVICES may "
            f"hide some."
            if count
            else f"Expected a CUDA device, the driver finds none. {_WITHOUT_A_GPU}"
        )
    return call("cuDeviceGet", index)


def device_label(index: int | None = None) -> str:
    """A device's name, such as "NVIDIA A100-SXM4-80GB"; default the current one's.

    Raises:
        EngineError: there is no such GPU.
    """
    device = _device(current_device() if index is None else index)
    return _text(call("cuDeviceGetName", 256, device)).split("\0")[0]


# -- contexts --------------------------------------------------------------------------------------


class PrimaryContext:
    """The context of a device that all libraries of a process share: current inside ``with``.

    Every call of the driver goes to the context that is current in the calling thread. What was
    current before is so again at the end: the caller's own library may be on another device. It is
    retained until the process ends, as the CUDA runtime keeps it.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self._handle = call("cuDevicePrimaryCtxRetain", _device(index))

    def __enter__(self) -> PrimaryContext:
        call("cuCtxPushCurrent", self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        call("cuCtxPopCurrent")


@functools.cache
def primary_context(index: int) -> PrimaryContext:
    """The primary context of a device.

    Raises:
        EngineError: there is no such device, or it cannot be used.
    """
    return PrimaryContext(index)


# -- frees and captures ----------------------------------------------------------------------------

capture_lock = threading.RLock()
"""Held by a capture, and by what may wait for the whole device: loading, binding, synchronising.

The driver fails a capture while which anything waits for the device that it is on.
"""

_capturing = False
_put_off: deque[tuple[PrimaryContext, str, Any]] = deque()


@contextmanager
def capturing() -> Iterator[None]:
    """Nothing else of this process waits for a device inside; frees are put off until the end."""
    global _capturing
    with capture_lock:
        _capturing = True
        try:
            yield
        finally:
            _capturing = False
            while _put_off:
                _free(*_put_off.popleft())


def free(context: PrimaryContext, function: str, handle: Any) -> None:
    """Call a function of the driver that frees ``handle``, now or after the capture that runs.

    For finalizers: they run at any time in any thread, so they must not wait, and a free inside a
    capture would break it.
    """
    if _capturing:
        _put_off.append((context, function, handle))
    else:
        _free(context, function, handle)


def _free(context: PrimaryContext, function: str, handle: Any) -> None:
    try:
        with context:
            call(function, handle)
    except EngineError:  # at exit the driver may be gone already, and the memory with it
        pass


# -- what callers hand over ------------------------------------------------------------------------


def stream_handle(stream: Any) -> int:
    """The address of a caller's stream: a number, or an object with ``__cuda_stream__``."""
    if isinstance(stream, int):
        return stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        _, handle = protocol() if callable(protocol) else protocol
        return int(handle)
    if isinstance(getattr(stream, "cuda_stream", None), int):  # torch before it had the protocol
        return int(stream.cuda_stream)
    raise EngineError(
        f"Expected a CUDA stream: a number or an object with __cuda_stream__, got "
        f"{type(stream).__name__}. torch: stream.cuda_stream; CuPy: stream.ptr."
    )


def copy_to_host(host: np.ndarray, pointer: int, stream: int) -> None:
    """Copy memory of any device into ``host``, after what is pending on its ``stream``."""
    ordinal = driver().CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    index = int(call("cuPointerGetAttribute", ordinal, pointer))
    with primary_context(index):
        call("cuMemcpyDtoHAsync", host.ctypes.data, pointer, host.nbytes, stream)
        call("cuStreamSynchronize", stream)
