"""A whole denoising by a bundle's engines against the same graphs in float32 on the CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from blockcache.export.engines.reference import (
    Comparison,
    relative_error,
    widened_bundle,
    widened_graph,
)
from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.engines.engine import Backend
from blockcache.runtime.engines.ort import OrtBackend, OrtEngine
from blockcache.runtime.plan import Segment
from blockcache.runtime.session import Session


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


def check_loop(
    bundle: Bundle, backend: Backend, preset: str, *, seed: int = 0, guidance_scale: float = 5.0
) -> Comparison:
    """A whole denoising of one image with random prompt tensors, against float32 on the CPU."""
    wide = widened_bundle(bundle)
    rng = np.random.default_rng(seed)
    one = replace(bundle.model.sizes, batch=1)
    sides = [
        {
            spec.name: (
                rng.integers(0, 5, spec.shape(one))
                if spec.dtype == "int64"
                else rng.standard_normal(spec.shape(one), np.float32)
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
            seeds=[seed],
        ).latents

    reference = denoise(wide, WidenedBackend(bundle, rounded=False))
    plain = relative_error(denoise(wide, WidenedBackend(bundle, rounded=True)), reference)
    return Comparison("loop", relative_error(denoise(bundle, backend), reference), plain)
