"""Engines of ONNX Runtime on the GPU: CUDA or TensorRT provider, bound to device addresses.

The second GPU engine, for machines without TensorRT and for comparison. Tensors are bound once by
pointer and everything runs on the session's stream without synchronising. The CUDA provider has few
bfloat16 kernels: use float16 or float32 bundles.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.devices.cuda import CudaDevice
from blockcache.runtime.devices.cuda_driver import capture_lock
from blockcache.runtime.devices.tensor import Tensor
from blockcache.runtime.engines.engine import Launch
from blockcache.runtime.engines.onnxruntime_library import ort
from blockcache.runtime.errors import EngineError, MissingExtraError
from blockcache.runtime.plan import Segment

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
_ELEMENT_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16, "int64": 7}  # TensorProto.DataType


class OrtCudaBackend:
    """ONNX Runtime's CUDA provider, or its TensorRT provider with CUDA behind it."""

    loads_at_once = 1
    graphs: str | None = None

    def __init__(
        self, *, tensorrt: bool = False, stream: Any = None, device: int | None = None
    ) -> None:
        wanted = TENSORRT if tensorrt else CUDA
        if ort is None or wanted not in ort.get_available_providers():
            raise MissingExtraError.of(
                f"onnxruntime-gpu (with {wanted})", "gpu", "Running ONNX Runtime on the GPU"
            )
        self.device = CudaDevice(stream, device)
        self._tensorrt = tensorrt
        self._options = ort.SessionOptions()
        self._options.log_severity_level = 3
        with self.device.context:
            _register_arena(self.device.index)
        self._options.add_session_config_entry("session.use_env_allocators", "1")

    @property
    def engine(self) -> str:
        """Library and version."""
        return f"onnxruntime-{'tensorrt' if self._tensorrt else 'cuda'} {ort.__version__}"

    @property
    def name(self) -> str:
        """Sessions are tied to a stream: only backends on the same one share them."""
        return f"{self.engine} cuda:{self.device.index} {self.device.stream}"

    def load(self, bundle: Bundle, segment: Segment) -> OrtCudaEngine:
        """Load a segment; its weights are read from the bundle's shared file."""
        path = str(bundle.segment_path(segment))
        cache = self._cache(bundle) if self._tensorrt else ""
        given = providers(self._tensorrt, self.device.index, self.device.stream, cache)
        try:
            with self.device.context, capture_lock:
                session = ort.InferenceSession(path, self._options, providers=given)
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise EngineError(
                f"ONNX Runtime {ort.__version__} cannot load segment {segment.name!r} on the GPU: "
                f"{error}. The CUDA provider has few bfloat16 kernels: compile with --precision "
                f"float16 or float32."
            ) from error
        require_providers(session, [name for name, _ in given])
        return OrtCudaEngine(segment, session, "cuda", self.device.index)

    def load_refitted(self, plans: Bundle, bundle: Bundle, segment: Segment) -> OrtCudaEngine:
        """Nothing is built that could be refitted: the segment is loaded from its own bundle."""
        return self.load(bundle, segment)

    def settled(self) -> None:
        """The TensorRT provider keeps what it builds by itself."""

    def _cache(self, bundle: Bundle) -> str:
        """A folder beside the bundle's engines; none where the bundle cannot be written to."""
        folder = bundle.folder / "engines" / f"onnxruntime-{self.device.capability}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return ""
        return str(folder)


ARENA = {"arena_extend_strategy": "kSameAsRequested"}  # not the next power of two
AS_REQUESTED = {"arena_extend_strategy": 1}
"""The same for an arena that sessions share."""

Providers: TypeAlias = list[tuple[str, dict[str, str]]]


def providers(tensorrt: bool, index: int, stream: int, cache: str) -> Providers:
    """Providers in order, with their options.

    Args:
        tensorrt: TensorRT first; it keeps what it builds in the folder ``cache``.
        index: of the device.
        stream: everything is put on this one.
        cache: a folder, or "" to keep nothing.
    """
    place = {"device_id": str(index), "user_compute_stream": str(stream)}
    # The default algorithm search tries every convolution with the largest workspace at its first
    # run, segment by segment.
    cuda = {**ARENA, "cudnn_conv_algo_search": "HEURISTIC"}
    kept = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": cache,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": cache,
    }
    first = [(TENSORRT, place | kept if cache else place)] if tensorrt else []
    return [*first, (CUDA, place | cuda)]


@functools.cache
def _register_arena(index: int) -> None:
    """One arena of device memory for all sessions on a device, where ONNX Runtime can share it."""
    kinds = ort.OrtAllocatorType, ort.OrtMemType
    memory = ort.OrtMemoryInfo("Cuda", kinds[0].ORT_ARENA_ALLOCATOR, index, kinds[1].DEFAULT)
    register = getattr(ort, "create_and_register_allocator_v2", None)
    if register is not None:
        register(CUDA, memory, {"device_id": str(index)}, ort.OrtArenaCfg(AS_REQUESTED))


def require_providers(session: Any, wanted: Sequence[str]) -> None:
    """Raise EngineError where ONNX Runtime went on without a provider, which it does by itself."""
    running = session.get_providers()
    missing = [name for name in wanted if name not in running]
    if missing:
        raise EngineError(
            f"Expected ONNX Runtime {ort.__version__} to run on {', '.join(missing)}, it fell back "
            f"to {', '.join(running)}. Install the CUDA, cuDNN and TensorRT libraries that this "
            f"version was built for; its log says which it could not load."
        )


class OrtCudaEngine:
    """One ONNX Runtime session with its tensors at fixed addresses."""

    def __init__(self, segment: Segment, session: Any, place: str, index: int) -> None:
        self._segment, self._session = segment, session
        self._place = (place, index)
        self._run_options = ort.RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        """IO binding of every input and output to its address."""
        binding = self._session.io_binding()
        sides = (
            (binding.bind_input, self._segment.inputs),
            (binding.bind_output, self._segment.outputs),
        )
        for bind, specs in sides:
            for spec in specs:
                tensor = tensors[spec.name]
                element = _ELEMENT_TYPES[tensor.dtype]
                try:
                    bind(spec.name, *self._place, element, tensor.shape, tensor.pointer)
                except Exception as error:  # onnxruntime's exceptions share no public base class
                    raise EngineError(
                        f"ONNX Runtime cannot bind {spec.name!r} of segment "
                        f"{self._segment.name!r}: {error}. Compile the bundle again."
                    ) from error
        return functools.partial(self._launch, binding, tensors)

    def _launch(self, binding: Any, _keep: Mapping[str, Tensor]) -> None:
        try:
            self._session.run_with_iobinding(binding, self._run_options)
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime failed in segment {self._segment.name!r}: {error}"
            ) from error
