"""Engines against the CPU: each segment alone, then the whole loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from blockcache.export.check import (
    Comparison,
    random_inputs,
    relative_error,
    widened_bundle,
    widened_graph,
)
from blockcache.runtime.bundle import Bundle
from blockcache.runtime.device import Device, Tensor
from blockcache.runtime.engine import Backend
from blockcache.runtime.engine_ort import OrtBackend, OrtEngine
from blockcache.runtime.plan import LOOP_ROLES, Segment, TensorSpec
from blockcache.runtime.session import Session

Layouts = Mapping[str, str]
Observer = Callable[[str, int, int], None]


class WidenedBackend(OrtBackend):
    """ONNX Runtime on the CPU with a half-precision bundle's graphs in float32."""

    def __init__(self, half: Bundle, *, rounded: bool) -> None:
        super().__init__()
        self._half, self._rounded = half, rounded
        self.name = f"{self.name}-widened-{'rounded' if rounded else 'exact'}"

    def load(self, bundle: Bundle, segment: Segment) -> OrtEngine:
        """Rewrite the segment's graph, then load it."""
        graph = widened_graph(self._half.segment_path(segment), rounded=self._rounded)
        return self.open_model(segment, graph)


def run_segment(
    backend: Backend,
    bundle: Bundle,
    segment: Segment,
    inputs: Mapping[str, np.ndarray],
    sizes: Mapping[str, int],
    layouts: Layouts,
) -> dict[str, np.ndarray]:
    """Run one segment on float32 inputs; outputs float32, in NCHW whatever the engine's layout."""
    device = backend.device
    tensors = {}
    for spec in (*segment.inputs, *segment.outputs):
        memory = device.allocate(spec.bytes(sizes))
        tensors[spec.name] = device.tensor(memory, 0, spec.shape(sizes), spec.dtype)
    launch = backend.load(bundle, segment).bind(tensors)
    for spec in segment.inputs:
        values = inputs[spec.name]
        channels_last = layouts.get(spec.name) == "hwc8"
        laid_out = values.transpose(0, 2, 3, 1).reshape(values.shape) if channels_last else values
        device.upload(tensors[spec.name], np.ascontiguousarray(laid_out))
    launch()
    return {s.name: _download(device, tensors[s.name], s, sizes, layouts) for s in segment.outputs}


def _download(
    device: Device,
    tensor: Tensor,
    spec: TensorSpec,
    sizes: Mapping[str, int],
    layouts: Layouts,
) -> np.ndarray:
    values: np.ndarray = device.download(tensor)
    if layouts.get(spec.name) != "hwc8":
        return values
    n, c, h, w = spec.shape(sizes)
    planar: np.ndarray = values.reshape(n, h, w, c).transpose(0, 3, 1, 2)
    return planar


def check_segments(
    bundle: Bundle,
    backend: Backend,
    layouts: Layouts,
    *,
    batch: int = 2,
    observer: Observer = lambda name, done, total: None,
) -> list[Comparison]:
    """Every segment on random inputs: the engine and the rounded graph against float32."""
    wide = widened_bundle(bundle)
    wide_segments = {segment.name: segment for segment in wide.segments}
    exact = WidenedBackend(bundle, rounded=False)
    rounded = WidenedBackend(bundle, rounded=True)
    sizes = {**bundle.model.sizes, "batch": batch}
    checked = [s for s in bundle.segments if s.role in (*LOOP_ROLES, "prompt")]
    found = []
    for done, segment in enumerate(checked, 1):
        inputs = random_inputs(segment, sizes)
        same = wide_segments[segment.name]
        reference = run_segment(exact, wide, same, inputs, sizes, {})
        plain = run_segment(rounded, wide, same, inputs, sizes, {})
        made = run_segment(backend, bundle, segment, inputs, sizes, layouts)
        errors = {name: relative_error(made[name], reference[name]) for name in reference}
        worst = max(errors, key=lambda name: errors[name])
        plain_error = relative_error(plain[worst], reference[worst])
        found.append(Comparison(segment.name, errors[worst], plain_error))
        observer(segment.name, done, len(checked))
    return found


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
