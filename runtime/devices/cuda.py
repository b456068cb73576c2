"""CUDA without a framework: memory, one stream, graphs. The only door to cuda-bindings.

cuda-bindings is NVIDIA's own thin binding (Apache-2.0 by the wheel of 13.5, a few MB); a
tensor framework would be a thousand times that. Everything here imports without a GPU; the first
call that needs one raises a single EngineError.
"""

from __future__ import annotations

import functools
import importlib
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from blockcache.runtime.devices.cuda_kernels import SolverKernels, bind_change, bind_model_input
from blockcache.runtime.devices.device import Guidance, StepFunction
from blockcache.runtime.devices.device_view import DeviceView
from blockcache.runtime.devices.tensor import Tensor, decode, encode
from blockcache.runtime.errors import EngineError, MissingExtraError


@functools.cache
def _cudart() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise MissingExtraError.of("cuda-bindings", "tensorrt-rtx", "Running on a GPU") from error


def call(name: str, *arguments: Any) -> Any:
    """Call a CUDA runtime function; its result, or EngineError with the error's name."""
    runtime = _cudart()
    code, *results = getattr(runtime, name)(*arguments)
    if int(code) != 0:
        _, symbol = runtime.cudaGetErrorName(code)
        _, text = runtime.cudaGetErrorString(code)
        raise EngineError(f"{name}: {_text(symbol)}: {_text(text)}")
    return results[0] if len(results) == 1 else tuple(results)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def device_count() -> int:
    """GPUs that can be used; 0 where there is no driver or no cuda-bindings."""
    try:
        return int(call("cudaGetDeviceCount"))
    except (EngineError, MissingExtraError):
        return 0


def device_capability() -> str:
    """Compute capability of the current device, such as "8.0".

    Raises:
        EngineError: there is no GPU; the message says what to do.
    """
    try:
        device = call("cudaGetDevice")
        attributes = _cudart().cudaDeviceAttr
        major = call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, device)
        minor = call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, device)
    except EngineError as error:
        raise EngineError(
            f"Expected a CUDA device, got {error}. Run on a machine with an NVIDIA GPU and its "
            f"driver, or use ONNX Runtime on the CPU (backend 'ort') with a float32 bundle."
        ) from error
    return f"{major}.{minor}"


def device_label() -> str:
    """The current device's name, such as "NVIDIA A100-SXM4-80GB"; EngineError without one."""
    return _text(call("cudaGetDeviceProperties", call("cudaGetDevice")).name).rstrip("\0")


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
    """Copy device memory into ``host``, after what is pending on ``stream``."""
    kind = _cudart().cudaMemcpyKind.cudaMemcpyDeviceToHost
    call("cudaMemcpyAsync", host.ctypes.data, pointer, host.nbytes, kind, stream)
    call("cudaStreamSynchronize", stream)


class CudaMemory:
    """Device memory, freed with the object."""

    def __init__(self, device: CudaDevice, count: int) -> None:
        self.device = device
        self.bytes = count
        self.pointer = int(call("cudaMalloc", max(count, 256)))
        weakref.finalize(self, _free, self.pointer)
        call("cudaMemsetAsync", self.pointer, 0, max(count, 256), device.stream)


def _free(pointer: int) -> None:
    _cudart().cudaFree(pointer)  # waits for the device; errors at exit do not matter


class Context(Protocol):
    """What a device knows of an engine's execution context."""

    name: str

    def set_memory(self, pointer: int, count: int) -> None:
        """Where its activations go."""

    def capturable(self) -> bool:
        """Whether a CUDA graph can hold its launches."""


class Scratch:
    """Activation memory that all engines of a device share: the maximum of what they need.

    Contexts that use it are told when it moves; ``generation`` counts the moves, so that graphs
    that hold the old address are not replayed. Contexts are not kept alive.
    """

    def __init__(self, allocate: Callable[[int], Any]) -> None:
        self._allocate = allocate
        self._memory: Any = None
        self.bytes = 0
        self.contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self.generation = 0

    def use(self, count: int, context: Context) -> None:
        """Register a context that needs ``count`` bytes: it is told now and at every move."""
        self.contexts.add(context)
        if count <= self.bytes and self._memory is not None:
            context.set_memory(self._memory.pointer, self.bytes)
            return
        old, self._memory, self.bytes = self._memory, self._allocate(count), count
        self.generation += 1
        for each in self.contexts:
            each.set_memory(self._memory.pointer, self.bytes)
        del old  # freed last: freeing waits for what still runs in it


class CudaDevice:
    """The current CUDA device and one stream; a ``Device`` as runtime/devices/device.py has it."""

    name = "cuda"

    def __init__(self, stream: Any = None) -> None:
        self.capability = device_capability()
        self.index = int(call("cudaGetDevice"))
        self._lock = threading.RLock()  # one request at a time on this stream
        runtime = _cudart()
        if stream is None:
            self.stream = int(call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking))
            weakref.finalize(self, runtime.cudaStreamDestroy, self.stream)
        else:
            self.stream = stream_handle(stream)
        self._kinds = runtime.cudaMemcpyKind
        self._solvers = SolverKernels()
        reference = weakref.ref(self)  # memory holds the device: the device must not hold itself
        self.scratch = Scratch(lambda count: _allocate(reference, count))

    @property
    def scratch_generation(self) -> int:
        """Counts the moves of the shared activation memory."""
        return self.scratch.generation

    def allocate(self, count: int) -> CudaMemory:
        """``count`` zeroed bytes; cudaMalloc aligns them to 256."""
        return CudaMemory(self, count)

    def tensor(self, memory: CudaMemory, offset: int, shape: Sequence[int], dtype: str) -> Tensor:
        """A tensor inside ``memory``; the host cannot see it."""
        return Tensor(memory.pointer + offset, tuple(shape), dtype, memory)

    def upload(self, target: Tensor, values: np.ndarray) -> None:
        """Convert on the host, then copy; done on return (uploads come before the loop)."""
        content = encode(np.ascontiguousarray(values).reshape(1, -1), target.dtype)
        kind, count = self._kinds.cudaMemcpyHostToDevice, content.nbytes
        call("cudaMemcpyAsync", target.pointer, content.ctypes.data, count, kind, self.stream)
        self.synchronize()

    def copy_from(self, target: Tensor, pointer: int) -> None:
        """One copy inside the device."""
        kind = self._kinds.cudaMemcpyDeviceToDevice
        call("cudaMemcpyAsync", target.pointer, pointer, target.bytes, kind, self.stream)

    def download(self, source: Tensor) -> np.ndarray:
        """A host copy, float32 for floating dtypes; waits for the stream."""
        host = np.empty(source.bytes, np.uint8)
        copy_to_host(host, source.pointer, self.stream)
        return decode(host, source.dtype).reshape(source.shape)

    def view(self, tensor: Tensor) -> DeviceView:
        """The tensor as other libraries read it, without a copy, after what is pending."""
        self.synchronize()
        return DeviceView(tensor, self.stream, self.index)

    def session_lock(self) -> AbstractContextManager[object]:
        """The stream's lock."""
        return self._lock

    def synchronize(self) -> None:
        """Wait for everything on the stream."""
        call("cudaStreamSynchronize", self.stream)

    def row_loader(self, row: Tensor, table: Tensor) -> StepFunction:
        """One copy inside the device."""
        kind, count = self._kinds.cudaMemcpyDeviceToDevice, row.bytes

        def load(step: int) -> None:
            source = table.pointer + step * count
            call("cudaMemcpyAsync", row.pointer, source, count, kind, self.stream)

        return load

    def solver(
        self,
        coefficients: np.ndarray,
        guidance: Guidance | None,
        latents: Tensor,
        previous_x0: Tensor,
        model_output: Tensor,
        model_input: Tensor,
    ) -> StepFunction:
        """The fused CUDA kernel; tables keep their address from request to request."""
        tensors = (latents, previous_x0, model_output, model_input)
        return self._solvers.bind(self, self.stream, coefficients, guidance, *tensors)

    def model_input(self, scales: np.ndarray, latents: Tensor, model_input: Tensor) -> StepFunction:
        """The solver's kernel with rows that change nothing, after all streams of the device."""
        write = bind_model_input(self, self.stream, scales, latents, model_input)

        def scale(step: int) -> None:
            call("cudaDeviceSynchronize")  # the edit may still be pending on another stream
            write(step)

        return scale

    def change(self, target: Tensor, now: Tensor, before: Tensor) -> Callable[[], None]:
        """The CUDA kernel."""
        return bind_change(self, self.stream, target, now, before)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record what ``enqueue`` puts on the stream, without running it; returns its replay.

        Raises:
            EngineError: the driver, or an engine of this device, cannot do it.
        """
        refusing = sorted({c.name for c in self.scratch.contexts if not c.capturable()})
        if refusing:
            raise EngineError(
                f"Expected engines that a CUDA graph can hold, these cannot be captured: "
                f"{', '.join(refusing)}. Build them again with this version of blockcache."
            )
        mode = _cudart().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call("cudaStreamBeginCapture", self.stream, mode)
        try:
            enqueue()
        except BaseException:
            _cudart().cudaStreamEndCapture(self.stream)  # leaves the stream usable
            raise
        graph = call("cudaStreamEndCapture", self.stream)
        try:
            executable = call("cudaGraphInstantiate", graph, 0)
        finally:
            call("cudaGraphDestroy", graph)
        return _Replay(executable, self.stream)

    def time_ms(self, enqueue: Callable[[], None]) -> float:
        """GPU time of what ``enqueue`` puts on the stream, in milliseconds."""
        begin, end = call("cudaEventCreate"), call("cudaEventCreate")
        try:
            call("cudaEventRecord", begin, self.stream)
            enqueue()
            call("cudaEventRecord", end, self.stream)
            call("cudaEventSynchronize", end)
            return float(call("cudaEventElapsedTime", begin, end))
        finally:
            call("cudaEventDestroy", begin)
            call("cudaEventDestroy", end)


def _allocate(device: weakref.ref[CudaDevice], count: int) -> CudaMemory:
    alive = device()
    assert alive is not None, "scratch memory outlived its device"
    return alive.allocate(count)


class _Replay:
    """A captured graph, freed with the object."""

    def __init__(self, executable: Any, stream: int) -> None:
        self._executable, self._stream = executable, stream
        weakref.finalize(self, _cudart().cudaGraphExecDestroy, executable)

    def __call__(self) -> None:
        call("cudaGraphLaunch", self._executable, self._stream)
