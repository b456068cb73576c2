"""Times each kernel against the unfused sequence it replaces.

On a GPU the sequence is torch's, launched on the same stream; with `--host` it is numpy's. Both
sides are timed in turn in one run; a figure is the median. `bc_bench` (kernels/bench.cu) has the
bandwidth against a copy.

    python tools/bench/kernels.py            CUDA kernels against torch
    python tools/bench/kernels.py --host     host kernels against numpy
"""

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from blockcache import kernels

Work = Callable[[], object]
SHAPES = [(2, 4, 64, 64), (8, 4, 128, 128)]  # latents [N, C, H, W]
FEATURES = [(2, 320, 64, 64), (16, 640, 64, 64)]  # a block's output, GPU only: 2.6 and 42 M
ROW = (0.9, 0.1, 0.2, 0.0, 0.5, -0.5, 0.7, 0.0)
GUIDANCE = 5.0


class Case(NamedTuple):
    """One kernel at one shape beside what it replaces."""

    kernel: str
    shape: tuple[int, ...]
    ours: Work
    unfused: Work


def host_cases(shape: tuple[int, ...]) -> list[Case]:
    """float32, as ONNX Runtime has it on a CPU."""
    N = shape[0]
    rng = np.random.default_rng(0)
    x, h0, out, history = (rng.standard_normal(shape).astype(np.float32) for _ in range(4))
    m, next_input = (rng.standard_normal((2 * N, *shape[1:])).astype(np.float32) for _ in range(2))
    scale, shift = rng.standard_normal((2, shape[1])).astype(np.float32)
    table = np.array([ROW], np.float32)
    row, guidance = table[0], np.float32(GUIDANCE)
    step = kernels.bind_guided_solver_step(
        out,
        sample=x,
        model_out=m,
        table=table,
        history_out=history,
        next_input=next_input,
        history0=h0,
        guidance=GUIDANCE,
    )

    def numpy_step() -> None:
        u, c = m[:N], m[N:]
        g = u + guidance * (c - u)
        out[...] = row[0] * x + row[1] * g + row[2] * h0
        history[...] = row[4] * x + row[5] * g
        next_input[:N] = next_input[N:] = row[6] * out

    def numpy_change() -> None:
        _ = np.abs(x - h0).sum() / np.abs(x).sum()

    def numpy_residual() -> None:
        out[...] = x + scale[:, None, None] * h0 + shift[:, None, None]

    return [
        Case("guided_solver_step", shape, lambda: step(0), numpy_step),
        Case("relative_change", shape, lambda: kernels.relative_change(x, h0), numpy_change),
        Case(
            "scale_shift_residual",
            shape,
            lambda: kernels.scale_shift_residual(out, x=x, last=h0, scale=scale, shift=shift),
            numpy_residual,
        ),
    ]


def cuda_solver_case(torch: Any, library: ctypes.CDLL, shape: tuple[int, ...]) -> Case:
    """bfloat16 model, float32 latents."""
    N, M = shape[0], int(np.prod(shape[1:]))
    x, h0, out, history = (torch.randn(shape, device="cuda") for _ in range(4))
    m, next_input = (
        torch.randn(2 * N, *shape[1:], device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    table = torch.tensor([ROW], device="cuda")
    guidance = torch.full((N,), GUIDANCE, device="cuda")
    named = {"next_sample": out, "history_out": history, "next_input": next_input, "sample": x}
    named |= {"model_out": m, "history0": h0, "table": table, "guidance": guidance}
    args = kernels.GuidedSolverStepArgs(N=N, M=M, S=1, dtype=kernels.DTYPES["bfloat16"])
    for name, tensor in named.items():
        setattr(args, name, tensor.data_ptr())
    stream = torch.cuda.current_stream().cuda_stream

    def ours(_alive: object = named) -> None:
        code = library.bc_cuda_guided_solver_step(ctypes.byref(args), 0, stream)
        kernels.check(library, "guided_solver_step", code)

    def unfused() -> None:
        u, c = m.float().chunk(2)
        g = u + GUIDANCE * (c - u)
        out.copy_(ROW[0] * x + ROW[1] * g + ROW[2] * h0)
        history.copy_(ROW[4] * x + ROW[5] * g)
        next_input.copy_(torch.cat([ROW[6] * out] * 2))

    return Case("guided_solver_step", shape, ours, unfused)


def cuda_feature_cases(torch: Any, library: ctypes.CDLL, shape: tuple[int, ...]) -> list[Case]:
    """bfloat16, NCHW."""
    N, C, H, W = shape
    M, T = C * H * W, kernels.DTYPES["bfloat16"]
    x, last, y = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    scale, shift = (torch.randn(C, device="cuda") for _ in range(2))
    changes = torch.empty(N + 1, device="cuda")
    size = library.bc_cuda_relative_change_workspace_bytes(N, M)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    args = kernels.ScaleShiftResidualArgs(N=N, C=C, L=H * W, layout=0, dtype=T)
    named = {"y": y, "x": x, "last": last, "scale": scale, "shift": shift}
    for name, tensor in named.items():
        setattr(args, name, tensor.data_ptr())

    def change() -> None:
        outputs = (changes.data_ptr(), changes.data_ptr() + 4 * N)
        inputs = (x.data_ptr(), last.data_ptr(), N, M, T, workspace.data_ptr(), size, stream)
        code = library.bc_cuda_relative_change(*outputs, *inputs)
        kernels.check(library, "relative_change", code)

    def residual(_alive: object = named) -> None:
        code = library.bc_cuda_scale_shift_residual(ctypes.byref(args), stream)
        kernels.check(library, "scale_shift_residual", code)

    def torch_change() -> None:
        difference = (x.float() - last.float()).abs().flatten(1).sum(1)
        magnitude = x.float().abs().flatten(1).sum(1)
        torch.div(difference, magnitude), torch.div(difference.sum(), magnitude.sum())

    def torch_residual() -> None:
        y.copy_(x + scale[:, None, None] * last + shift[:, None, None])

    return [
        Case("relative_change", shape, change, torch_change),
        Case("scale_shift_residual", shape, residual, torch_residual),
    ]


def wall_us(work: Work) -> float:
    """Microseconds of one call on the CPU."""
    start = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - start) / 1000


def cuda_timer(torch: Any) -> Callable[[Work], float]:
    """A function that times one call on the stream, the second-level cache being cold."""
    properties = torch.cuda.get_device_properties(0)
    flush = torch.empty(4 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time_us(work: Work) -> float:
        flush.zero_()
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1000

    return time_us


def measure(cases: list[Case], time_us: Callable[[Work], float], runs: int) -> list[dict[str, Any]]:
    """Times both sides of every case in turn and prints a line each."""
    results = []
    print(f"{'kernel':22} {'shape':20} {'ours us':>10} {'unfused us':>11} {'ratio':>7}")
    for case in cases:
        ours, unfused = [], []
        for run in range(-3, runs):
            pair = time_us(case.ours), time_us(case.unfused)
            if run >= 0:
                ours.append(pair[0])
                unfused.append(pair[1])
        ours_us, unfused_us = statistics.median(ours), statistics.median(unfused)
        names = {"kernel": case.kernel, "shape": list(case.shape)}
        results.append({**names, "ours_us": ours_us, "unfused_us": unfused_us})
        shape, ratio = "x".join(map(str, case.shape)), unfused_us / ours_us
        print(f"{case.kernel:22} {shape:20} {ours_us:10.1f} {unfused_us:11.1f} {ratio:6.2f}x")
    return results


def cuda_results(runs: int) -> list[dict[str, Any]]:
    """Times the CUDA kernels.

    Raises:
        kernels.KernelError: torch, a device or the CUDA library is missing.
    """
    try:
        import torch
    except ImportError as error:
        raise kernels.KernelError(f"expected torch to compare with: {error}") from error
    library = kernels.cuda_library()
    if not torch.cuda.is_available():
        raise kernels.KernelError("expected a CUDA device, found none; --host times the CPU's")
    if library is None:
        raise kernels.KernelError(
            "expected libblockcache_cuda.so, found none; put nvcc on PATH and install again"
        )
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cold L2, {runs} runs")
    cases = [cuda_solver_case(torch, library, shape) for shape in SHAPES]
    for shape in FEATURES:
        cases += cuda_feature_cases(torch, library, shape)
    return measure(cases, cuda_timer(torch), runs)


def main() -> int:
    """Runs the benchmark; 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", action="store_true", help="host kernels against numpy")
    parser.add_argument("--runs", type=int, default=201, help="timed runs of each side")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    options = parser.parse_args()
    try:
        if options.host:
            cases = [case for shape in SHAPES for case in host_cases(shape)]
            results = measure(cases, wall_us, options.runs)
        else:
            results = cuda_results(options.runs)
    except kernels.KernelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
