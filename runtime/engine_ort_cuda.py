"""Engines of ONNX Runtime on the GPU: CUDA or TensorRT provider, bound to device addresses.

The second GPU engine, for machines without TensorRT and for comparison. Tensors are bound once by
pointer and everything runs on the session's stream without synchronising. The CUDA provider has few
bfloat16 kernels: use float16 or float32 bundles.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from blockcache.runtime.bundle import Bundle
from blockcache.runtime.cuda import CudaDevice
from blockcache.runtime.device import Tensor
from blockcache.runtime.engine import Launch
from blockcache.runtime.errors import EngineError, MissingExtraError
from blockcache.runtime.plan import Segment

try:
    import onnxruntime as ort
except ImportError:  # reported when a backend is made: importing this file stays free
    ort = None

_ELEMENT_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16, "int64": 7}  # TensorProto.DataType


class OrtCudaBackend:
    """ONNX Runtime's CUDA provider, or its TensorRT provider with CUDA behind it."""

    def __init__(self, *, tensorrt: bool = False, stream: Any = None) -> None:
        wanted = "TensorrtExecutionProvider" if tensorrt else "CUDAExecutionProvider"
        if ort is None or wanted not in ort.get_available_providers():
            raise MissingExtraError.of(
                f"onnxruntime-gpu (with {wanted})", "gpu", "Running ONNX Runtime on the GPU"
            )
        self.device = CudaDevice(stream)
        self.name = f"ort-{wanted}-{self.device.stream}"
        options = {"device_id": "0", "user_compute_stream": str(self.device.stream)}
        self._providers: list[tuple[str, dict[str, str]]] = [("CUDAExecutionProvider", options)]
        if tensorrt:
            self._providers.insert(0, (wanted, options))
        self._options = ort.SessionOptions()
        self._options.log_severity_level = 3

    def load(self, bundle: Bundle, segment: Segment) -> OrtCudaEngine:
        """Load a segment; its weights are read from the bundle's shared file."""
        path = str(bundle.segment_path(segment))
        try:
            session = ort.InferenceSession(path, self._options, providers=self._providers)
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise EngineError(
                f"ONNX Runtime {ort.__version__} cannot load segment {segment.name!r} on the GPU: "
                f"{error}. The CUDA provider has few bfloat16 kernels: compile with --precision "
                f"float16 or float32."
            ) from error
        return OrtCudaEngine(segment, session)


class OrtCudaEngine:
    """One ONNX Runtime session."""

    def __init__(self, segment: Segment, session: Any) -> None:
        self._segment, self._session = segment, session
        self._run_options = ort.RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        """IO binding of every input and output to its device address."""
        binding = self._session.io_binding()
        sides = (
            (binding.bind_input, self._segment.inputs),
            (binding.bind_output, self._segment.outputs),
        )
        for bind, specs in sides:
            for spec in specs:
                tensor = tensors[spec.name]
                element = _ELEMENT_TYPES[tensor.dtype]
                bind(spec.name, "cuda", 0, element, tensor.shape, tensor.pointer)
        return functools.partial(self._launch, binding, tensors)

    def _launch(self, binding: Any, _keep: Mapping[str, Tensor]) -> None:
        try:
            self._session.run_with_iobinding(binding, self._run_options)
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime failed in segment {self._segment.name!r}: {error}"
            ) from error
