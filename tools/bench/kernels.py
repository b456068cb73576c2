"""Times each kernel against the operations it replaces, and on a GPU against a copy.

    python -m blockcache.tools.bench.kernels            CUDA: torch, device copy, one table
    python -m blockcache.tools.bench.kernels --host     CPU: numpy

On a GPU everything is captured in a CUDA graph, so that the device's work is timed and not
Python's, and every run starts with a cold second-level cache. The copy is of as many bytes within
the device, half read and half written; "of copy" is the kernel's bandwidth as a share of its. All
sides of a row take turns in one run; a figure is the median. `tools/bench/kernels.sh` runs this
behind the tests and compute-sanitizer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockcache import kernels
from blockcache.runtime.files import write_text

if TYPE_CHECKING:
    from blockcache.tools.bench.kernel_cases import Case

Work = Callable[[], object]
Row = dict[str, Any]


def medians(works: dict[str, Work], time_us: Callable[[Work], float], runs: int) -> Row:
    """Median microseconds of each, by name; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for run in range(-3, runs):
        for name, work in works.items():
            taken = time_us(work)
            if run >= 0:
                times[name].append(taken)
    return {f"{name}_us": statistics.median(each) for name, each in times.items()}


def table(rows: Iterable[Row], columns: dict[str, Callable[[Row], str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(cell(row) for cell in columns.values())} |" for row in rows]
    return "\n".join(lines)


COMMON: dict[str, Callable[[Row], str]] = {
    "kernel": lambda row: row["kernel"],
    "shape": lambda row: " x ".join(map(str, row["shape"])),
}
HOST = COMMON | {
    "us": lambda row: f"{row['ours_us']:.1f}",
    "numpy us": lambda row: f"{row['unfused_us']:.1f}",
    "numpy / ours": lambda row: f"{row['unfused_us'] / row['ours_us']:.2f}x",
}
CUDA = COMMON | {
    "MB": lambda row: f"{row['bytes'] / 1e6:.1f}",
    "us": lambda row: f"{row['ours_us']:.1f}",
    "GB/s": lambda row: f"{row['bytes'] / row['ours_us'] / 1e3:.0f}",
    "copy GB/s": lambda row: f"{row['bytes'] / row['copy_us'] / 1e3:.0f}",
    "of copy": lambda row: f"{100 * row['copy_us'] / row['ours_us']:.0f} %",
    "torch us": lambda row: f"{row['unfused_us']:.1f}",
    "torch / ours": lambda row: f"{row['unfused_us'] / row['ours_us']:.1f}x",
}


# -- host ------------------------------------------------------------------------------------------


def wall_us(work: Work) -> float:
    """Microseconds of one call on the CPU."""
    start = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - start) / 1000


def host_rows(runs: int) -> list[Row]:
    """Host kernels against numpy."""
    from blockcache.tools.bench.host_kernel_cases import host_cases

    return [
        {"kernel": case.kernel, "shape": case.shape}
        | medians({"ours": case.ours, "unfused": case.unfused}, wall_us, runs)
        for case in host_cases()
    ]


# -- CUDA ------------------------------------------------------------------------------------------


def captured(torch: Any, work: Work) -> Work:
    """The work as a CUDA graph; returns its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is set up on first use must not be captured
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    replay: Work = graph.replay
    return replay


def cold_timer(torch: Any) -> Callable[[Work], float]:
    """A function that times a replay on the device, the second-level cache being cold."""
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    filler = torch.zeros(cache_bytes, device="cuda")  # float32: four times the cache
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time_us(replay: Work) -> float:
        filler.sum()  # reads: dirty lines would be written back during the measurement
        start.record()
        replay()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1000

    return time_us


def cuda_row(torch: Any, case: Case, time_us: Callable[[Work], float], runs: int) -> Row:
    """One case against torch and against a copy."""
    source, target = (
        torch.empty(case.bytes // 2, dtype=torch.uint8, device="cuda") for _ in range(2)
    )
    works = {"ours": case.ours, "unfused": case.unfused, "copy": lambda: target.copy_(source)}
    replays = {name: captured(torch, work) for name, work in works.items()}
    facts = {"kernel": case.kernel, "shape": case.shape, "bytes": case.bytes}
    return facts | medians(replays, time_us, runs)


def cuda_rows(runs: int) -> tuple[str, list[Row]]:
    """The device's name, and the CUDA kernels checked and timed.

    Raises:
        kernels.KernelError: torch, a device or the CUDA library is missing, or a result is wrong.
    """
    try:
        import torch
    except ImportError as error:
        raise kernels.KernelError(f"expected torch to compare with: {error}") from error
    from blockcache.tools.bench.kernel_cases import Maker, check

    if not torch.cuda.is_available():
        raise kernels.KernelError("expected a CUDA device, found none; --host times the CPU's")
    library = kernels.cuda_library()
    if library is None:
        raise kernels.KernelError(
            "expected libblockcache_cuda.so, found none; put nvcc on PATH and install again"
        )
    maker = Maker(library, "cuda", lambda: torch.cuda.current_stream().cuda_stream)
    time_us, rows = cold_timer(torch), []
    for case in maker.cases():
        check(case)
        rows.append(cuda_row(torch, case, time_us, runs))
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    return device, rows


def main() -> int:
    """Run the benchmark; 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--host", action="store_true", help="host kernels against numpy")
    parser.add_argument("--runs", type=int, default=101, help="timed runs of each side")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    options = parser.parse_args()
    try:
        if options.host:
            device, rows, columns = "CPU", host_rows(options.runs), HOST
        else:
            device, rows = cuda_rows(options.runs)
            columns = CUDA
    except kernels.KernelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{device}, median of {options.runs}\n\n{table(rows, columns)}")
    if options.json:
        write_text(
            Path(options.json), json.dumps({"device": device, "rows": rows}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
