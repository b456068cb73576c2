"""Engines of ONNX Runtime on the CPU, bound with IO binding to preallocated buffers.

Three settings are a must for many sessions in one process. Idle threads must not spin: they would
take the cores from the session that runs. All sessions draw on one memory arena of the process:
with an arena each they would keep every segment's peak, and without any the pages of large tensors
would be mapped anew at every launch (SD1.5's attention takes two to three times as long then).
Memory patterns are off: they would lay a second copy of each segment's peak into that arena.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

from blockcache.runtime.arguments import whole_number
from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.devices.host import HostDevice
from blockcache.runtime.devices.tensor import Tensor
from blockcache.runtime.engines.engine import Launch
from blockcache.runtime.engines.onnxruntime_library import ort
from blockcache.runtime.errors import ConfigError, EngineError, MissingExtraError
from blockcache.runtime.plan import Segment

MAX_LOADS = 8
"""How many segments may load at once: each takes memory while its graph is optimised."""


class OrtBackend:
    """ONNX Runtime's CPU execution provider."""

    graphs: str | None = None

    def __init__(self, *, threads: int | None = None) -> None:
        if ort is None:
            raise MissingExtraError.of("onnxruntime", "cpu", "Running a bundle on the CPU")
        if threads is not None:
            threads = whole_number("threads", threads, 1, error=ConfigError)
        self.name = f"ort-cpu-{threads or 0}"
        self.device = HostDevice()
        # ONNX Runtime (1.32) optimises a graph without Python's global lock: others can load
        # meanwhile. A version that holds the lock loads them one by one all the same.
        self.loads_at_once = min(threads or os.cpu_count() or 1, MAX_LOADS)
        self._options = ort.SessionOptions()
        self._options.intra_op_num_threads = threads or 0  # 0: one a physical core
        self._options.inter_op_num_threads = 1
        _register_arena()
        self._options.add_session_config_entry("session.use_env_allocators", "1")
        self._options.enable_mem_pattern = False
        self._options.log_severity_level = 3
        self._options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    def load(self, bundle: Bundle, segment: Segment) -> OrtEngine:
        """Load a segment; its weights are mapped from the bundle's shared file."""
        if bundle.model.precision != "float32":
            raise EngineError(
                f"ONNX Runtime's CPU provider runs float32 bundles; this one is "
                f"{bundle.model.precision}. Compile with --precision float32, or use TensorRT."
            )
        return self.open_model(segment, str(bundle.segment_path(segment)))

    def load_refitted(self, plans: Bundle, bundle: Bundle, segment: Segment) -> OrtEngine:
        """Nothing is built that could be refitted: the segment is loaded from its own bundle."""
        return self.load(bundle, segment)

    def settled(self) -> None:
        """Nothing is compiled at the first run."""

    def open_model(self, segment: Segment, model: str | bytes) -> OrtEngine:
        """Load a segment from a file, or from a graph in memory."""
        return OrtEngine(segment, self.open_session(segment, model))

    def open_session(self, segment: Segment, model: str | bytes) -> Any:
        """ONNX Runtime's own session of a segment; EngineError where it refuses the graph."""
        try:
            return ort.InferenceSession(model, self._options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise EngineError(
                f"ONNX Runtime {ort.__version__} cannot load segment {segment.name!r}: {error}"
            ) from error


@functools.cache
def _register_arena() -> None:
    """The arena of all sessions; it grows as needed and stays for the process's life."""
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    options = {"arena_extend_strategy": 1}  # by what is asked for, not the next power of two
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg(options))


class OrtEngine:
    """One ONNX Runtime session."""

    def __init__(self, segment: Segment, session: Any) -> None:
        self._segment = segment
        self._session = session

    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        """IO binding of every input and output to its host buffer."""
        binding = self._session.io_binding()
        sides = (
            (binding.bind_ortvalue_input, self._segment.inputs),
            (binding.bind_ortvalue_output, self._segment.outputs),
        )
        for bind, specs in sides:
            for spec in specs:
                try:
                    bind(spec.name, ort.OrtValue.ortvalue_from_numpy(tensors[spec.name].array))
                except Exception as error:  # onnxruntime's exceptions share no public base class
                    raise EngineError(
                        f"ONNX Runtime cannot bind {spec.name!r} of segment "
                        f"{self._segment.name!r}: {error}. Compile the bundle again."
                    ) from error
        return functools.partial(self._launch, binding)

    def _launch(self, binding: Any) -> None:
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime failed in segment {self._segment.name!r}: {error}"
            ) from error
