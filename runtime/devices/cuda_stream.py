"""A CUDA stream, and the memory of what runs on it.

All contexts of engines on a stream run one after the other, so that they share their activation
memory. Nothing here refers to a device: memory that outlives a session keeps its stream, no more,
and is freed at once with the last who uses it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from blockcache.runtime.devices.cuda_driver import (
    PrimaryContext,
    call,
    driver,
    free,
    primary_context,
    stream_handle,
)


class Block:
    """Bytes on a device, freed with the object; cuMemAlloc aligns them to 256."""

    def __init__(self, context: PrimaryContext, count: int) -> None:
        with context:
            self.pointer = int(call("cuMemAlloc", count))
        weakref.finalize(self, free, context, "cuMemFree", self.pointer)


class Context(Protocol):
    """What a stream knows of an engine's execution context."""

    name: str

    def set_memory(self, pointer: int, count: int) -> None:
        """Where its activations go."""

    def capturable(self) -> bool:
        """Whether a CUDA graph can hold its launches."""


class Scratch:
    """Activation memory that all engines of a stream share: the maximum of what they need.

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
        old, self._memory, self.bytes = self._memory, self._allocate(max(count, 1)), count
        self.generation += 1
        for each in self.contexts:
            each.set_memory(self._memory.pointer, self.bytes)
        del old  # freed last: freeing waits for what still runs in it


class CudaStream:
    """A stream of a device: inside ``with`` it is this thread's, and its context is current."""

    def __init__(self, context: PrimaryContext, handle: int) -> None:
        self.context, self.handle = context, handle
        self.scratch = Scratch(lambda count: Block(context, count))
        self._lock = threading.RLock()  # one request at a time

    @classmethod
    def created(cls, index: int) -> CudaStream:
        """A new stream of a device, destroyed with the object."""
        context = primary_context(index)
        with context:
            handle = call("cuStreamCreate", driver().CUstream_flags.CU_STREAM_NON_BLOCKING)
        stream = cls(context, int(handle))
        weakref.finalize(stream, free, context, "cuStreamDestroy", stream.handle)
        return stream

    def __enter__(self) -> CudaStream:
        self._lock.acquire()
        try:
            self.context.__enter__()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.context.__exit__()
        finally:
            self._lock.release()


_given: weakref.WeakValueDictionary[tuple[int, int], CudaStream] = weakref.WeakValueDictionary()
_given_guard = threading.Lock()


def given_stream(stream: Any, index: int) -> CudaStream:
    """A caller's stream of device ``index``; sessions that were given the same one share it."""
    key = (index, stream_handle(stream))
    with _given_guard:
        found = _given.get(key)
        if found is None:
            found = _given[key] = CudaStream(primary_context(index), key[1])
        return found


def device_of(stream: Any) -> int | None:
    """The device that a caller's stream was made on; None for the default streams."""
    handle = stream_handle(stream)
    if handle <= _LAST_DEFAULT:
        return None
    call("cuCtxPushCurrent", call("cuStreamGetCtx", handle))
    try:
        return int(call("cuCtxGetDevice"))
    finally:
        call("cuCtxPopCurrent")


LEGACY_HANDLES = (0, 1)
"""The default stream that waits for all others: a graph cannot capture it."""

_LAST_DEFAULT = 2  # cudaStreamPerThread


class CudaMemory:
    """Device memory, freed with the object; 0 at first."""

    def __init__(self, stream: CudaStream, count: int) -> None:
        self.stream, self.bytes = stream, count
        block = self._block = Block(stream.context, max(count, 256))
        self.pointer = block.pointer
        with stream.context:
            call("cuMemsetD8Async", self.pointer, 0, max(count, 256), stream.handle)
