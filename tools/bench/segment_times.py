"""How long every segment takes, from the runs of a split model."""

from __future__ import annotations

import statistics

import numpy as np

from blockcache.export import Timings
from blockcache.tools.bench.contestants import Contestant
from blockcache.tools.check.times import device_ms
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
