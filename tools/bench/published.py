"""Step times that others published, to hold the roofline against until we measure on a GPU.

One image with guidance (engine batch 2), half precision, compiled: milliseconds of one U-Net
evaluation. ``scale`` prints the prediction for the same U-Net beside them.
"""

from __future__ import annotations

from typing import NamedTuple

from blockcache.export import gpu
from blockcache.export.costs.roofline import predict
from blockcache.runtime import Bundle


class Published(NamedTuple):
    """One figure and where it stands."""

    gpu: str
    step_ms: float
    source: str
    fitted: bool = True  # the roofline's shares were fitted to it


PUBLISHED = {
    "sd15": (
        Published("a100", 16.7, "TensorRT 8.6, 861 ms an image less VAE; onnxruntime #17788"),
        Published("a100", 16.2, "stable-fast, 61.8 it/s; its README"),
        Published("h100", 9.6, "stable-fast, 104.6 it/s; its README"),
    ),
    "sdxl": (
        Published("a100", 84.0, "TensorRT, 40 steps 3358.9 ms; stable-diffusion-xl-1.0-tensorrt"),
        Published("h100", 44.3, "TensorRT, 40 steps 1772.3 ms; stable-diffusion-xl-1.0-tensorrt"),
        Published("a10", 314.4, "TensorRT, 40 steps 12576 ms; the same", fitted=False),
    ),
}
"""By the model's name in ``random_unet``; read November 2026, nothing here was measured by us."""


def published_rows(bundle: Bundle) -> list[dict[str, str | float]]:
    """Predicted against published, for a bundle that ``scale`` made; [] for others.

    Those engines are whole U-Nets without hoisting: so is the segment that is predicted here.
    """
    whole = [segment for segment in bundle.segments if segment.role == "whole"]
    rows: list[dict[str, str | float]] = []
    for found in PUBLISHED.get(bundle.model.name, ()):
        sizes = bundle.model.sizes.for_images(1, guided=True)
        made = predict(whole, bundle.folder, gpu(found.gpu), sizes)
        ms = made.segment_ms["whole"]
        rows.append({**found._asdict(), "predicted_ms": ms, "error": ms / found.step_ms - 1})
    return rows
