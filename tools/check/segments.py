"""Every segment's engine against ONNX Runtime in float32 on the CPU, compared by Polygraphy."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from blockcache.export import Observer
from blockcache.export.engines.reference import (
    Comparison,
    random_inputs,
    relative_error,
    widened_graph,
)
from blockcache.export.observer import unobserved
from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.engines.engine import Backend
from blockcache.runtime.engines.ort import OrtBackend
from blockcache.runtime.errors import MissingExtraError
from blockcache.runtime.plan import Segment, Sizes, TensorSpec
from blockcache.tools.check.bound import bound_segment, checked_segments

try:
    from polygraphy.backend.base import BaseRunner
    from polygraphy.backend.onnxrt import OnnxrtRunner
    from polygraphy.common import TensorMetadata
    from polygraphy.comparator import Comparator
    from polygraphy.datatype import DataType
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER
except ImportError as error:
    raise MissingExtraError.of("polygraphy", "tensorrt-rtx", "Checking engines") from error

Layouts = Mapping[str, str]
EXACT, ROUNDED, ENGINE = ALL_RUNNERS = ("float32", "rounded", "engine")


class SegmentRunner(BaseRunner):
    """Polygraphy's view of one engine, run as a session runs it: bound once, then launched."""

    def __init__(
        self, backend: Backend, bundle: Bundle, segment: Segment, sizes: Sizes, layouts: Layouts
    ) -> None:
        super().__init__(name=ENGINE)
        self._backend, self._bundle, self._segment = backend, bundle, segment
        self._sizes, self._layouts = sizes, layouts

    def activate_impl(self) -> None:
        """Allocate, load, bind."""
        self._tensors, self._launch = bound_segment(
            self._backend, self._bundle, self._segment, self._sizes
        )

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Inputs are given in float32, whatever the engine's precision."""
        meta = TensorMetadata()
        for spec in self._segment.inputs:
            dtype = np.int64 if spec.dtype == "int64" else np.float32
            meta.add(spec.name, DataType.from_dtype(dtype), spec.shape(self._sizes))
        return meta

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Upload in the engine's layout, launch, download in NCHW."""
        device = self._backend.device
        for spec in self._segment.inputs:
            values = feed_dict[spec.name]
            if self._layouts.get(spec.name) == "hwc8":
                values = values.transpose(0, 2, 3, 1).reshape(values.shape)
            device.upload(self._tensors[spec.name], np.ascontiguousarray(values))
        begin = time.perf_counter()
        with device.session_lock():
            self._launch()
        made = {spec.name: self._download(spec) for spec in self._segment.outputs}
        self.inference_time = time.perf_counter() - begin
        return made

    def _download(self, spec: TensorSpec) -> np.ndarray:
        values: np.ndarray = self._backend.device.download(self._tensors[spec.name])
        if self._layouts.get(spec.name) != "hwc8":
            return values
        n, c, h, w = spec.shape(self._sizes)
        planar: np.ndarray = values.reshape(n, h, w, c).transpose(0, 3, 1, 2)
        return planar

    def deactivate_impl(self) -> None:
        """Free engine and memory."""
        del self._tensors, self._launch


def check_segments(
    bundle: Bundle,
    backend: Backend,
    layouts: Layouts,
    *,
    batch: int = 2,
    save: Path | None = None,
    observer: Observer = unobserved,
) -> list[Comparison]:
    """Every segment on random inputs: the engine and the rounded graph against float32.

    Polygraphy runs the three. With ``save``, inputs and outputs of each segment are written there,
    for ``polygraphy inspect data`` and ``polygraphy run --load-inputs``.
    """
    sizes = replace(bundle.model.sizes, batch=batch)
    segments = checked_segments(bundle)
    found = []
    for done, segment in enumerate(segments, 1):
        runners = [
            _onnxruntime(EXACT, bundle, segment, rounded=False),
            _onnxruntime(ROUNDED, bundle, segment, rounded=True),
            SegmentRunner(backend, bundle, segment, sizes, layouts),
        ]
        with G_LOGGER.verbosity(G_LOGGER.ERROR):
            inputs = random_inputs(segment, sizes)
            results = Comparator.run(runners, data_loader=[inputs])
            if save is not None:
                save_json([inputs], str(save / f"{segment.name}.inputs.json"))
                results.save(str(save / f"{segment.name}.outputs.json"))
        found.append(_compared(segment.name, *(results[name][0] for name in ALL_RUNNERS)))
        observer(segment.name, done, len(segments))
    return found


def _onnxruntime(name: str, bundle: Bundle, segment: Segment, *, rounded: bool) -> OnnxrtRunner:
    """ONNX Runtime on the CPU with a segment's graph in float32."""

    def opened() -> Any:
        graph = widened_graph(bundle.segment_path(segment), rounded=rounded)
        return OrtBackend().open_session(segment, graph)

    return OnnxrtRunner(opened, name=name)


def _compared(
    name: str,
    exact: Mapping[str, np.ndarray],
    rounded: Mapping[str, np.ndarray],
    made: Mapping[str, np.ndarray],
) -> Comparison:
    """The output that the engine got worst, beside what rounding makes of it."""
    errors = {output: relative_error(made[output], exact[output]) for output in exact}
    worst = max(errors, key=lambda output: errors[output])
    return Comparison(name, errors[worst], relative_error(rounded[worst], exact[worst]))
