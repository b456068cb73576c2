"""What this machine's CPU can do at most, measured: the roofline's two figures for ``host``."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from blockcache.export.cost import Fusion
from blockcache.export.roofline import Efficiency, Processor

EFFICIENCY = Efficiency(compute=0.7, memory=0.6, launch_us=1.0)
"""Of ONNX Runtime's CPU kernels in float32; fitted once, see ``tools/bench/results``."""


def measure_host(repeats: int = 5) -> Processor:
    """Peak of a float32 matrix product and of a copy in memory, in about a second.

    All cores that numpy's BLAS library uses; set OMP_NUM_THREADS to the engines' threads.
    """
    a, b = (np.random.default_rng(0).random((1536, 1536), np.float32) for _ in range(2))
    product = np.empty_like(a)
    product_s = _best_seconds(lambda: np.matmul(a, b, out=product), repeats)
    source = np.ones(32 << 20, np.float32)  # 128 MiB: larger than any cache
    target = np.zeros_like(source)
    copy_s = _best_seconds(lambda: np.copyto(target, source), repeats)
    return Processor(
        name="host",
        tflops=2 * len(a) ** 3 / product_s / 1e12,
        gb_per_s=2 * source.nbytes / copy_s / 1e9,
        efficiency=EFFICIENCY,
        fusion=Fusion.NONE,
        item_bytes=4,
    )


def _best_seconds(work: Callable[[], object], repeats: int) -> float:
    """The shortest of several runs: a peak is what the machine does undisturbed."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return best
