"""What an engine library must offer, an engine that does nothing, and the choice of library.

An ``Engine`` is one loaded segment, shared by every session of the process. ``bind`` fixes the
addresses of its tensors and returns a ``Launch``: a callable without arguments, all that the
denoising loop ever sees.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeAlias

from blockcache.runtime.bundle import Bundle
from blockcache.runtime.devices.device import Device, HostDevice, Tensor
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import Segment

Launch: TypeAlias = Callable[[], None]
"""Run a segment on the tensors it was bound to."""


class Engine(Protocol):
    """One loaded segment."""

    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        """Fix the addresses of all inputs and outputs."""


class Backend(Protocol):
    """An engine library on a device.

    One whose ``load`` may run in several threads says in how many: ``loads_at_once``, an int. All
    others load one segment at a time in the whole process, in the thread that asks.
    """

    @property
    def name(self) -> str:
        """Library, device and options: backends of equal names load the same engines."""

    @property
    def device(self) -> Device:
        """Where the engines' tensors live."""

    def load(self, bundle: Bundle, segment: Segment) -> Engine:
        """Load a segment's engine; EngineError where the library refuses it."""


_Key: TypeAlias = tuple[str, str, str]  # backend, path and content of a segment
_shared: weakref.WeakValueDictionary[_Key, Engine] = weakref.WeakValueDictionary()
_key_locks: weakref.WeakValueDictionary[_Key, threading.Lock] = weakref.WeakValueDictionary()
_key_locks_guard = threading.Lock()  # held for a look-up, never while something loads
_serial_lock = threading.Lock()


def load_engines(
    backend: Backend, bundle: Bundle, segments: Sequence[Segment]
) -> dict[str, Engine]:
    """The engines of ``segments`` by name, in that order; where several fail, the first's error."""
    load = functools.partial(load_shared, backend, bundle)
    workers = _loads_at_once(backend)
    if workers < 2:  # without a pool: a GPU's context belongs to the caller's thread
        return {segment.name: load(segment) for segment in segments}
    with ThreadPoolExecutor(workers, "blockcache-load") as pool:
        loads = [pool.submit(load, segment) for segment in segments]
        try:
            return {s.name: done.result() for s, done in zip(segments, loads, strict=True)}
        finally:
            for waiting in loads:  # after an error nobody needs the rest
                waiting.cancel()
            loads.clear()  # an error that is kept must not keep the other engines


def load_shared(backend: Backend, bundle: Bundle, segment: Segment) -> Engine:
    """The engine of a segment, loaded once a process and freed with its last session."""
    path = bundle.segment_path(segment).resolve()
    content = bundle.manifest.files[f"segments/{segment.file}"].sha256
    key = (backend.name, str(path), content)
    with _key_lock(key) if _loads_at_once(backend) > 1 else _serial_lock:
        engine = _shared.get(key)
        if engine is None:
            engine = _shared[key] = backend.load(bundle, segment)
        return engine


def _loads_at_once(backend: Backend) -> int:
    return int(getattr(backend, "loads_at_once", 1))


def _key_lock(key: _Key) -> threading.Lock:
    """The lock of one engine, which lives as long as a thread holds it or waits for it."""
    with _key_locks_guard:
        lock = _key_locks.get(key)
        if lock is None:
            lock = _key_locks[key] = threading.Lock()
        return lock


class EmptyBackend:
    """Engines that do nothing, on the host: what remains is the orchestration's own cost."""

    name = "empty"

    def __init__(self) -> None:
        self.device = HostDevice()

    def load(self, bundle: Bundle, segment: Segment) -> EmptyEngine:
        """An engine without a library."""
        return EmptyEngine()


class EmptyEngine:
    """Binds anything and launches nothing."""

    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        """A launch that returns at once."""
        return _nothing


def _nothing() -> None:
    pass


def make_backend(
    name: str = "auto",
    *,
    threads: int | None = None,
    bundle: Bundle | None = None,
    stream: Any = None,
    graphs: str = "auto",
    verify: bool = True,
) -> Backend:
    """The engine library called ``name``.

    Args:
        name: ``trt`` (TensorRT engines that ``blockcache build`` made), ``ort`` (ONNX Runtime on
            the CPU), ``ort-cuda`` and ``ort-tensorrt`` (ONNX Runtime on the GPU), ``empty``, or
            ``auto``: TensorRT where the bundle has engines and there is a GPU, else the CPU.
        threads: of ONNX Runtime on the CPU.
        bundle: what it will run, for ``auto``.
        stream: the caller's CUDA stream.
        graphs: CUDA graphs of ``trt``: auto, off, or check (compare addresses at each replay).
        verify: check the sha256 of engines.

    Raises:
        ConfigError: unknown name.
        MissingExtraError: the library is not installed; the message holds the pip command.
        EngineError: there is no GPU for a library that needs one.
    """
    if name == "auto":
        name = _best(bundle)
    if name == "empty":
        return EmptyBackend()
    if name == "ort":
        from blockcache.runtime.engines.ort import OrtBackend

        return OrtBackend(threads=threads)
    if name == "trt":
        from blockcache.runtime.engines.trt import TrtBackend

        return TrtBackend(stream=stream, graphs=graphs, verify=verify)
    if name in ("ort-cuda", "ort-tensorrt"):
        from blockcache.runtime.engines.ort_cuda import OrtCudaBackend

        return OrtCudaBackend(tensorrt=name == "ort-tensorrt", stream=stream)
    raise ConfigError(
        f"Expected a backend of 'auto', 'trt', 'ort', 'ort-cuda', 'ort-tensorrt' or 'empty', got "
        f"{name!r}."
    )


def _best(bundle: Bundle | None) -> str:
    """TensorRT where engines and a GPU are there, else ONNX Runtime on the CPU."""
    if bundle is None or not any(bundle.folder.glob("engines/*/engines.json")):
        return "ort"
    from blockcache.runtime.devices.cuda import device_count

    return "trt" if device_count() else "ort"
