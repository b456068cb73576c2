"""How long every segment takes, from the runs of a split model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import numpy as np

from blockcache.export import Timings
from blockcache.runtime.devices.device import Device
from blockcache.tools.bench.contestants import Contestant
from blockcache.tools.report.machine import cpu_name, nvidia_smi


def segment_times(split: Contestant) -> Timings:
    """Median time of every segment: on the host's clock in the rounds, on a GPU by its own."""
    session = split.session
    assert session is not None
    bundle, device = session.bundle, session.backend.device
    record = split.records[0]
    sizes = bundle.model.sizes.for_images(split.images, guided=True)
    if device.name != "cpu":
        medians = device_ms(session.launches(split.images), device)
        return Timings(split.engine, nvidia_smi(("name",)).get("name", device.name), sizes, medians)
    runs = np.concatenate([r.segment_ns[r.steps.start :] for r in split.records]) / 1e6
    medians = {s.name: float(ms) for s, ms in zip(record.segments, np.median(runs, 0), strict=True)}
    if any(segment.role == "prompt" for segment in bundle.segments):
        medians["prompt"] = statistics.median(r.prompt_ns for r in split.records) / 1e6
    return Timings(split.engine, cpu_name(), sizes, medians)


def device_ms(
    launches: Mapping[str, Callable[[], None]],
    device: Device,
    repeats: int = 15,
) -> dict[str, float]:
    """GPU time of single launches, each captured in a graph so that the host is not timed.

    They run in the order of a step, so that each finds its weights as cold as in the loop.
    """
    replays = {name: device.capture(launch) for name, launch in launches.items()}
    times: dict[str, list[float]] = {name: [] for name in replays}
    for turn in range(repeats + 2):
        for name, replay in replays.items():
            ms = device.time_ms(replay)
            if turn > 1:
                times[name].append(ms)
    return {name: statistics.median(values) for name, values in times.items()}
