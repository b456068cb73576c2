"""What this machine's CPU can do at most, measured: the roofline's two figures for ``host``."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper

from blockcache.export import Processor
from blockcache.export.costs.roofline import Efficiency
from blockcache.export.graph.work import Fusion
from blockcache.runtime.engines.onnxruntime_library import ort

EFFICIENCY = Efficiency(compute=0.65, memory=0.4, launch_us=1.0)
"""Of ONNX Runtime's CPU kernels in float32; fitted to the segments of an SD1.5-size U-Net."""

SIZE = 1024


def measure_host(threads: int | None = None, repeats: int = 40) -> Processor:
    """Peak of ONNX Runtime's own matrix product, and of a copy in memory; about a second.

    Taken in CPU time, so that others on the machine disturb it little.

    Args:
        threads: as for the engines; default one a core.
        repeats: the best one counts.
    """
    count = threads or len(os.sched_getaffinity(0))
    product_s = _best_cpu_seconds(_matrix_product(count), repeats) / count
    source = np.ones(32 << 20, np.float32)  # 128 MiB: larger than any cache
    target = np.zeros_like(source)
    copy_s = _best_cpu_seconds(lambda: np.copyto(target, source), repeats)
    return Processor(
        name="host",
        tflops=2 * SIZE**3 / product_s / 1e12,
        gb_per_s=2 * source.nbytes / copy_s / 1e9,
        efficiency=EFFICIENCY,
        fusion=Fusion.NONE,
        item_bytes=4,
    )


def _matrix_product(threads: int) -> Callable[[], object]:
    """A float32 product [SIZE, SIZE] x [SIZE, SIZE], the second one a weight as in a U-Net."""
    rng = np.random.default_rng(0)
    left, weight = (rng.random((SIZE, SIZE), np.float32) for _ in range(2))
    shape = [SIZE, SIZE]
    given, made = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name in ("left", "out")
    )
    node = helper.make_node("MatMul", ["left", "weight"], ["out"])
    constant = helper.make_tensor("weight", TensorProto.FLOAT, weight.shape, weight.tobytes(), True)
    graph = helper.make_graph([node], "product", given, made, [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, {"left": left})


def _best_cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """The least CPU time of several runs, all threads together."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.process_time()
        work()
        best = min(best, time.process_time() - begin)
    return best
