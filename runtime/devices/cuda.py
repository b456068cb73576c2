"""A CUDA device without a framework: memory, one stream, graphs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import numpy as np

from blockcache.runtime.devices.cuda_driver import (
    PrimaryContext,
    call,
    capture_lock,
    capturing,
    copy_to_host,
    current_device,
    device_capability,
    driver,
    free,
)
from blockcache.runtime.devices.cuda_kernels import SolverKernels, bind_change, bind_model_input
from blockcache.runtime.devices.cuda_stream import (
    LEGACY_HANDLES,
    CudaMemory,
    CudaStream,
    Scratch,
    device_of,
    given_stream,
)
from blockcache.runtime.devices.device import Guidance, StepFunction
from blockcache.runtime.devices.device_view import DeviceView
from blockcache.runtime.devices.tensor import Tensor, Window, decode, encode
from blockcache.runtime.errors import EngineError


class CudaDevice:
    """A CUDA device and one stream; a ``Device`` as runtime/devices/device.py has it.

    The device's context is made current in whichever thread calls. Functions that this returns
    (``StepFunction``, replays) only launch: call them inside ``session_lock()``.
    """

    name = "cuda"

    def __init__(self, stream: Any = None, index: int | None = None) -> None:
        """Take a device.

        Args:
            stream: the caller's (a number or an object with ``__cuda_stream__``); default a new
                one.
            index: of the device; default the stream's, else the current one.

        Raises:
            MissingExtraError: cuda-bindings is not installed.
            EngineError: there is no such GPU, or the stream is another one's.
        """
        self.index = _chosen(stream, index)
        self.capability = device_capability(self.index)
        created = stream is None
        self._stream = (
            CudaStream.created(self.index) if created else given_stream(stream, self.index)
        )
        self._context = self._stream.context
        self._solvers = SolverKernels()

    @property
    def stream(self) -> int:
        """The handle of the stream that everything runs on."""
        return self._stream.handle

    @property
    def context(self) -> PrimaryContext:
        """The device's context, for what talks to CUDA by itself."""
        return self._context

    @property
    def scratch(self) -> Scratch:
        """The activation memory of the stream's engines."""
        return self._stream.scratch

    @property
    def scratch_generation(self) -> int:
        """Counts the moves of the shared activation memory."""
        return self.scratch.generation

    def allocate(self, count: int) -> CudaMemory:
        """``count`` zeroed bytes, aligned to 256."""
        return CudaMemory(self._stream, count)

    def tensor(self, memory: CudaMemory, offset: int, shape: Sequence[int], dtype: str) -> Tensor:
        """A tensor inside ``memory``; the host cannot see it."""
        return Tensor(memory.pointer + offset, tuple(shape), dtype, memory)

    def upload(self, target: Tensor, values: np.ndarray) -> None:
        """Convert on the host, then copy; done on return (uploads come before the loop)."""
        content = encode(np.ascontiguousarray(values).reshape(1, -1), target.dtype)
        with self._context:
            source, count = content.ctypes.data, content.nbytes
            call("cuMemcpyHtoDAsync", target.pointer, source, count, self.stream)
            call("cuStreamSynchronize", self.stream)

    def copy_from(self, target: Tensor, pointer: int) -> None:
        """One copy inside the device."""
        with self._context:
            call("cuMemcpyDtoDAsync", target.pointer, pointer, target.bytes, self.stream)

    def copy(self, target: Window, source: Window) -> None:
        """A copy of rows a plane; one in all where nothing lies between them."""
        with self._context:
            if _is_whole(target) and _is_whole(source):
                count = target.planes * target.plane_bytes
                call("cuMemcpyDtoDAsync", target.pointer, source.pointer, count, self.stream)
                return
            for plane in range(target.planes):
                call("cuMemcpy2DAsync", _plane_copy(target, source, plane), self.stream)

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
        """The stream, with the device's context current."""
        return self._stream

    def synchronize(self) -> None:
        """Wait for everything on the stream."""
        with self._context:
            call("cuStreamSynchronize", self.stream)

    def row_loader(self, row: Tensor, table: Tensor) -> StepFunction:
        """One copy inside the device."""
        count, stream = row.bytes, self.stream

        def load(step: int) -> None:
            source = table.pointer + step * count
            call("cuMemcpyDtoDAsync", row.pointer, source, count, stream)

        return load

    def solver(
        self,
        coefficients: np.ndarray,
        guidance: Guidance | None,
        seeds: np.ndarray | None,
        latents: Tensor,
        past_x0: Tensor,
        model_output: Tensor,
        model_input: Tensor,
    ) -> StepFunction:
        """The fused CUDA kernel; tables keep their address from request to request."""
        tensors = (latents, past_x0, model_output, model_input)
        return self._solvers.bind(self, self.stream, coefficients, guidance, seeds, *tensors)

    def model_input(self, scales: np.ndarray, latents: Tensor, model_input: Tensor) -> StepFunction:
        """The solver's kernel with rows that change nothing, after all streams of the device."""
        write = bind_model_input(self, self.stream, scales, latents, model_input)

        def scale(step: int) -> None:
            with capture_lock:
                call("cuCtxSynchronize")  # the edit may still be pending on another stream
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
        if self.stream in LEGACY_HANDLES:
            raise EngineError(
                f"Expected a stream that CUDA can capture, got the legacy default stream (handle "
                f"{self.stream}). Leave stream out, or give one of your own: torch.cuda.Stream(), "
                f"cupy.cuda.Stream()."
            )
        refusing = sorted({c.name for c in self.scratch.contexts if not c.capturable()})
        if refusing:
            raise EngineError(
                f"Expected engines that a CUDA graph can hold, these cannot be captured: "
                f"{', '.join(refusing)}. Build them again with this version of blockcache."
            )
        with self._context:
            with capturing():
                executable = self._recorded(enqueue)
            replay = _Replay(self._context, executable, self.stream)
            call("cuGraphUpload", executable, self.stream)  # else the first replay does it
            return replay

    def _recorded(self, enqueue: Callable[[], None]) -> Any:
        """The graph of what ``enqueue`` puts on the stream, ready to launch."""
        # Thread-local: other threads may allocate meanwhile.
        mode = driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        call("cuStreamBeginCapture", self.stream, mode)
        try:
            enqueue()
        except BaseException:
            code, graph = driver().cuStreamEndCapture(self.stream)  # leaves the stream usable
            if int(code) == 0:
                call("cuGraphDestroy", graph)
            raise
        graph = call("cuStreamEndCapture", self.stream)
        try:
            return call("cuGraphInstantiate", graph, 0)
        finally:
            call("cuGraphDestroy", graph)

    def times_ms(self, launches: Sequence[Callable[[], None]]) -> list[float]:
        """By an event between every two of them."""
        with self._stream:
            events = [call("cuEventCreate", 0) for _ in range(len(launches) + 1)]
            try:
                call("cuEventRecord", events[0], self.stream)
                for launch, event in zip(launches, events[1:], strict=True):
                    launch()
                    call("cuEventRecord", event, self.stream)
                call("cuStreamSynchronize", self.stream)
                return [float(call("cuEventElapsedTime", *between)) for between in pairwise(events)]
            finally:
                for event in events:
                    call("cuEventDestroy", event)


def _is_whole(window: Window) -> bool:
    """Whether it is all of its tensor."""
    return window.row_bytes == window.pitch and window.rows * window.pitch == window.plane_bytes


def _plane_copy(target: Window, source: Window, plane: int) -> Any:
    """What ``cuMemcpy2DAsync`` is told of one plane."""
    copy = driver().CUDA_MEMCPY2D()
    device = driver().CUmemorytype.CU_MEMORYTYPE_DEVICE
    copy.srcMemoryType = copy.dstMemoryType = device
    copy.srcDevice = source.pointer + plane * source.plane_bytes
    copy.dstDevice = target.pointer + plane * target.plane_bytes
    copy.srcPitch, copy.dstPitch = source.pitch, target.pitch
    copy.WidthInBytes, copy.Height = target.row_bytes, target.rows
    return copy


def _chosen(stream: Any, index: int | None) -> int:
    """The device to take; EngineError where a stream belongs to another one."""
    of_stream = None if stream is None else device_of(stream)
    if index is None:
        return current_device() if of_stream is None else of_stream
    if of_stream not in (None, index):
        raise EngineError(
            f"Expected a stream of CUDA device {index}, got one of device {of_stream}. Leave "
            f"device out: it follows from the stream."
        )
    return index


class _Replay:
    """A captured graph, freed with the object."""

    def __init__(self, context: PrimaryContext, executable: Any, stream: int) -> None:
        self._executable, self._stream = executable, stream
        weakref.finalize(self, free, context, "cuGraphExecDestroy", executable)

    def __call__(self) -> None:
        call("cuGraphLaunch", self._executable, self._stream)
