"""Roofline: how long each segment takes on a GPU that nobody has measured yet.

A launch takes the longer of its arithmetic and its memory traffic, each at a stated share of the
data sheet's peak, plus a fixed time in which a kernel starts and drains::

    seconds = max(flops / (peak * compute), bytes / (bandwidth * memory)) + launch

A segment is the sum of its launches. The shares are fitted once (``EFFICIENCY``), the same for
every GPU; ``blockcache estimate`` prints how far they are off where something was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blockcache.export.costs.timings import Timings
from blockcache.export.graph.passes.concrete import concrete_graph
from blockcache.export.graph.work import Fusion, Work, graph_work
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import Segment, Sizes


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """How much of a data sheet's figures the kernels of a U-Net reach."""

    compute: float  # share of the peak arithmetic
    memory: float  # share of the peak bandwidth
    launch_us: float  # fixed time of a launch, microseconds

    def __post_init__(self) -> None:
        if not (0 < self.compute <= 1 and 0 < self.memory <= 1 and self.launch_us >= 0):
            raise ConfigError(f"Expected shares of a peak in (0, 1] and a time; got {self}.")


EFFICIENCY = Efficiency(compute=0.65, memory=0.3, launch_us=9.0)
"""Of engines that a compiler made. Fitted to five published step times of two U-Nets on A100 and
H100, which it meets within 7 % (``tools/bench/published.py``). The bandwidth's share also stands
for traffic that is not counted, such as copies between layouts."""


@dataclass(frozen=True, kw_only=True)
class Processor:
    """What a device can do at most, and how engines use it."""

    name: str
    tflops: float  # peak, dense, 10^12 FLOP/s in the engines' precision
    gb_per_s: float  # peak memory bandwidth, 10^9 bytes/s
    efficiency: Efficiency = EFFICIENCY
    fusion: Fusion = Fusion.COMPILER
    item_bytes: int = 2  # of a floating-point number

    def __post_init__(self) -> None:
        if not (self.tflops > 0 and self.gb_per_s > 0):
            raise ConfigError(f"Expected a positive peak and bandwidth; got {self}.")

    def milliseconds(self, work: Work) -> float:
        """One run of the launches, one after the other."""
        share = self.efficiency
        compute = work.flops / (self.tflops * 1e12 * share.compute)
        memory = work.bytes / (self.gb_per_s * 1e9 * share.memory)
        seconds = np.maximum(compute, memory).sum() + len(work.flops) * share.launch_us * 1e-6
        return float(seconds * 1e3)


DATA_SHEETS = {
    "t4": (65.0, 320.0),
    "a100": (312.0, 2039.0),  # SXM, 80 GB
    "a30": (165.0, 933.0),
    "a10": (125.0, 600.0),
    "a40": (149.7, 696.0),
    "rtx3090": (71.0, 936.0),
    "l4": (121.0, 300.0),
    "l40": (181.05, 864.0),
    "l40s": (362.05, 864.0),
    "rtx4090": (165.2, 1008.0),
    "h100": (989.4, 3350.0),  # SXM
    "h200": (989.4, 4800.0),
    "b200": (2250.0, 8000.0),
    "rtx5090": (209.5, 1792.0),
}
"""Vendor's figures: dense bf16 (T4: fp16) tensor-core TFLOP/s with float32 sums, and GB/s."""


def gpu(name: str) -> Processor:
    """A GPU by name; ConfigError lists the names there are.

    Examples:
        >>> gpu("A100").gb_per_s
        2039.0
    """
    key = name.lower().replace("-", "")
    if key not in DATA_SHEETS:
        raise ConfigError(f"Expected a GPU of {sorted(DATA_SHEETS)}, got {name!r}.")
    tflops, gb_per_s = DATA_SHEETS[key]
    return Processor(name=key, tflops=tflops, gb_per_s=gb_per_s)


def segment_work(
    segments: Sequence[Segment], folder: Path, processor: Processor, sizes: Sizes
) -> list[Work]:
    """The launches of every segment at ``sizes``.

    Args:
        segments: of a bundle.
        folder: the bundle's, where their files lie.
        processor: says what is fused, and the size of a number.
        sizes: the engines' batch (with guidance twice the images), height, width, tokens.

    Raises:
        ConfigError: a size that the model's downsampling does not divide.
        ExportError: a graph whose shapes cannot be inferred.
    """
    return [
        graph_work(
            concrete_graph(folder / segment.file, sizes), processor.fusion, processor.item_bytes
        )
        for segment in segments
    ]


def predict(
    segments: Sequence[Segment], folder: Path, processor: Processor, sizes: Sizes
) -> Timings:
    """Predicted milliseconds of every segment but the offline one; see ``segment_work``.

    What ``blockcache bench --timings`` measures, where nothing can be measured: the budget
    scheduler takes either.
    """
    timed = [segment for segment in segments if segment.role != "time"]
    works = segment_work(timed, folder, processor, sizes)
    times = {s.name: processor.milliseconds(work) for s, work in zip(timed, works, strict=True)}
    return Timings("roofline", processor.name, sizes, times)
