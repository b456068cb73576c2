"""How long a GPU takes for every segment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.devices.device import Device
from blockcache.runtime.engines.engine import Backend
from blockcache.tools.check.bound import bound_segment, checked_segments

WARM_UP_STEPS = 2


def time_segments(
    bundle: Bundle, backend: Backend, *, batch: int = 2, repeats: int = 20
) -> dict[str, float]:
    """GPU milliseconds of one launch of every segment, by name: the median after a warm-up."""
    sizes = replace(bundle.model.sizes, batch=batch)
    launches = {
        segment.name: bound_segment(backend, bundle, segment, sizes)[1]
        for segment in checked_segments(bundle)
    }
    return device_ms(launches, backend.device, repeats)


def device_ms(
    launches: Mapping[str, Callable[[], None]], device: Device, repeats: int = 15
) -> dict[str, float]:
    """Median time of single launches on the device, in milliseconds.

    Each is captured in a graph, and step after step is put on the stream without a wait, so that
    the device never waits for the host. They run in the order of a step: each finds its weights as
    cold as in the loop.
    """
    device.times_ms([*launches.values()])  # the first run may compile, which no graph can hold
    replays = [device.capture(launch) for launch in launches.values()]
    times = np.reshape(device.times_ms(replays * (WARM_UP_STEPS + repeats)), (-1, len(replays)))
    medians = np.median(times[WARM_UP_STEPS:], axis=0)
    return {name: float(ms) for name, ms in zip(launches, medians, strict=True)}
