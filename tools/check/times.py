"""How long a GPU takes for every segment."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.engines.engine import Backend
from blockcache.tools.check.bound import bound_segment, checked_segments


def time_segments(
    bundle: Bundle, backend: Backend, *, batch: int = 2, repeats: int = 20
) -> dict[str, float]:
    """GPU milliseconds of one launch of every segment, by name: the median after a warm-up.

    ``backend`` is one on a GPU: its device times what is put on its stream.
    """
    sizes = replace(bundle.model.sizes, batch=batch)
    device: Any = backend.device
    measured = {}
    for segment in checked_segments(bundle):
        _, launch = bound_segment(backend, bundle, segment, sizes)
        for _ in range(3):  # the first launch may compile
            launch()
        times = [device.time_ms(launch) for _ in range(repeats)]
        measured[segment.name] = statistics.median(times)
    return measured
