"""What an engine library must offer, an engine that does nothing, and the choice of library.

An ``Engine`` is one loaded segment, shared by every session of the process. ``bind`` fixes the
addresses of its tensors and returns a ``Launch``: a callable without arguments, all that the
denoising loop ever sees.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from blockcache.runtime.bundle import Bundle
from blockcache.runtime.device import Device, HostDevice, Tensor
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import Segment

Launch: TypeAlias = Callable[[], None]
"""Run a segment on the tensors it was bound to."""


class Engine(Protocol):
    """One loaded segment."""

    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        """Fix the addresses of all inputs and outputs."""


class Backend(Protocol):
    """An engine library on a device."""

    @property
    def name(self) -> str:
        """Library, device and options: backends of equal names load the same engines."""

    @property
    def device(self) -> Device:
        """Where the engines' tensors live."""

    def load(self, bundle: Bundle, segment: Segment) -> Engine:
        """Load a segment's engine; EngineError where the library refuses it."""


_shared: weakref.WeakValueDictionary[tuple[str, str, str], Engine] = weakref.WeakValueDictionary()
_shared_lock = threading.Lock()


def load_shared(backend: Backend, bundle: Bundle, segment: Segment) -> Engine:
    """The engine of a segment, loaded once a process and freed with its last session."""
    path = bundle.segment_path(segment).resolve()
    content = bundle.manifest.files[f"segments/{segment.file}"].sha256
    key = (backend.name, str(path), content)
    with _shared_lock:
        engine = _shared.get(key)
        if engine is None:
            engine = _shared[key] = backend.load(bundle, segment)
        return engine


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
        from blockcache.runtime.engine_ort import OrtBackend

        return OrtBackend(threads=threads)
    if name == "trt":
        from blockcache.runtime.engine_trt import TrtBackend

        return TrtBackend(stream=stream, graphs=graphs, verify=verify)
    if name in ("ort-cuda", "ort-tensorrt"):
        from blockcache.runtime.engine_ort_cuda import OrtCudaBackend

        return OrtCudaBackend(tensorrt=name == "ort-tensorrt", stream=stream)
    raise ConfigError(
        f"Expected a backend of 'auto', 'trt', 'ort', 'ort-cuda', 'ort-tensorrt' or 'empty', got "
        f"{name!r}."
    )


def _best(bundle: Bundle | None) -> str:
    """TensorRT where engines and a GPU are there, else ONNX Runtime on the CPU."""
    if bundle is None or not any(bundle.folder.glob("engines/*/engines.json")):
        return "ort"
    from blockcache.runtime.cuda import device_count

    return "trt" if device_count() else "ort"
