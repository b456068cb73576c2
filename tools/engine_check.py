"""Engines against ONNX Runtime on the CPU: each segment by Polygraphy, then the whole loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from blockcache.export.engines.reference import (
    Comparison,
    random_inputs,
    relative_error,
    widened_bundle,
    widened_graph,
)
from blockcache.runtime.bundle import Bundle
from blockcache.runtime.devices.device import Tensor
from blockcache.runtime.engines.engine import Backend, Launch, load_shared
from blockcache.runtime.engines.ort import OrtBackend, OrtEngine
from blockcache.runtime.errors import MissingExtraError
from blockcache.runtime.plan import LOOP_ROLES, Segment, Sizes, TensorSpec
from blockcache.runtime.session import Session

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
Observer = Callable[[str, int, int], None]
EXACT, ROUNDED, ENGINE = ALL_RUNNERS = ("float32", "rounded", "engine")


class WidenedBackend(OrtBackend):
    """ONNX Runtime on the CPU with a half-precision bundle's graphs in float32."""

    def __init__(self, half: Bundle, *, rounded: bool) -> None:
        super().__init__()
        self.loads_at_once = 1  # a graph is rewritten in Python, with its weights in memory
        self._half, self._rounded = half, rounded
        self.name = f"{self.name}-widened-{'rounded' if rounded else 'exact'}"

    def load(self, bundle: Bundle, segment: Segment) -> OrtEngine:
        """Rewrite the segment's graph, then load it."""
        graph = widened_graph(self._half.segment_path(segment), rounded=self._rounded)
        return self.open_model(segment, graph)


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


def bound_segment(
    backend: Backend, bundle: Bundle, segment: Segment, sizes: Sizes
) -> tuple[dict[str, Tensor], Launch]:
    """A segment's engine bound to memory of its own."""
    device, tensors = backend.device, {}
    for spec in (*segment.inputs, *segment.outputs):
        memory = device.allocate(spec.bytes(sizes))
        tensors[spec.name] = device.tensor(memory, 0, spec.shape(sizes), spec.dtype)
    return tensors, load_shared(backend, bundle, segment).bind(tensors)


def checked_segments(bundle: Bundle) -> tuple[Segment, ...]:
    """The segments that a session runs."""
    return tuple(s for s in bundle.segments if s.role in (*LOOP_ROLES, "prompt"))


def check_segments(
    bundle: Bundle,
    backend: Backend,
    layouts: Layouts,
    *,
    batch: int = 2,
    save: Path | None = None,
    observer: Observer = lambda name, done, total: None,
) -> list[Comparison]:
    """Every segment on random inputs: the engine and the rounded graph against float32.

    Polygraphy runs the three. With ``save``, inputs and outputs of each segment are written there,
    for ``polygraphy inspect data`` and ``polygraphy run --load-inputs``.
    """
    sizes = {**bundle.model.sizes, "batch": batch}
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


def time_segments(
    bundle: Bundle, backend: Backend, *, batch: int = 2, repeats: int = 20
) -> dict[str, float]:
    """GPU milliseconds of one launch of every segment, by name: the median after a warm-up.

    ``backend`` is one on a GPU: its device times what is put on its stream.
    """
    sizes = {**bundle.model.sizes, "batch": batch}
    device: Any = backend.device
    measured = {}
    for segment in checked_segments(bundle):
        _, launch = bound_segment(backend, bundle, segment, sizes)
        for _ in range(3):  # the first launch may compile
            launch()
        times = [device.time_ms(launch) for _ in range(repeats)]
        measured[segment.name] = statistics.median(times)
    return measured


def check_loop(
    bundle: Bundle, backend: Backend, preset: str, *, seed: int = 0, guidance_scale: float = 5.0
) -> Comparison:
    """A whole denoising of one image with random prompt tensors, against float32 on the CPU."""
    wide = widened_bundle(bundle)
    rng = np.random.default_rng(seed)
    sides = [
        {
            spec.name: (
                rng.integers(0, 5, spec.shape({**bundle.model.sizes, "batch": 1}))
                if spec.dtype == "int64"
                else rng.standard_normal(spec.shape({**bundle.model.sizes, "batch": 1}), np.float32)
            )
            for spec in bundle.model.conditions
        }
        for _ in range(2)
    ]

    def denoise(opened: Bundle, engines: Backend) -> np.ndarray:
        session = Session.open(opened, preset=preset, backend=engines)
        positive, negative = (dict(side) for side in sides)
        return session.denoise(
            session.noise([seed]),
            positive.pop("encoder_hidden_states"),
            negative.pop("encoder_hidden_states"),
            conditions=positive,
            negative_conditions=negative,
            guidance_scale=guidance_scale,
        ).latents

    reference = denoise(wide, WidenedBackend(bundle, rounded=False))
    plain = relative_error(denoise(wide, WidenedBackend(bundle, rounded=True)), reference)
    return Comparison("loop", relative_error(denoise(bundle, backend), reference), plain)
