"""Times each kernel against the operations it replaces, and on a GPU against a copy.

    python -m blockcache.tools.bench.kernels            CUDA: torch, device copy, one table
    python -m blockcache.tools.bench.kernels --host     CPU: numpy

All sides of a row take turns in one run; a figure is the median. ``tools/bench/kernels/gpu.sh``
builds and tests the kernels first and runs compute-sanitizer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from blockcache import kernels
from blockcache.runtime.files import write_text
from blockcache.tools.bench.kernels.medians import Row
from blockcache.tools.report.tables import markdown_table

Columns: TypeAlias = Mapping[str, Callable[[Row], str]]

COMMON: Columns = {
    "kernel": lambda row: row["kernel"],
    "shape": lambda row: " x ".join(map(str, row["shape"])),
}
HOST: Columns = {
    **COMMON,
    "us": lambda row: f"{row['ours_us']:.1f}",
    "numpy us": lambda row: f"{row['unfused_us']:.1f}",
    "numpy / ours": lambda row: f"{row['unfused_us'] / row['ours_us']:.2f}x",
}
CUDA: Columns = {
    **COMMON,
    "MB": lambda row: f"{row['bytes'] / 1e6:.1f}",
    "us": lambda row: f"{row['ours_us']:.1f}",
    "GB/s": lambda row: f"{row['bytes'] / row['ours_us'] / 1e3:.0f}",
    "copy GB/s": lambda row: f"{row['bytes'] / row['copy_us'] / 1e3:.0f}",
    "of copy": lambda row: f"{100 * row['copy_us'] / row['ours_us']:.0f} %",
    "torch us": lambda row: f"{row['unfused_us']:.1f}",
    "torch / ours": lambda row: f"{row['unfused_us'] / row['ours_us']:.1f}x",
}


def table(rows: Sequence[Row], columns: Columns) -> str:
    """The rows in Markdown."""
    cells = [[cell(row) for cell in columns.values()] for row in rows]
    return markdown_table(list(columns), cells, words=len(COMMON))


def measured(runs: int, *, host: bool) -> tuple[str, list[Row], Columns]:
    """The device's name, its rows, and the columns that show them."""
    if host:
        from blockcache.tools.bench.kernels.host import host_rows

        return "CPU", host_rows(runs), HOST
    try:
        from blockcache.tools.bench.kernels.cuda import cuda_rows
    except ImportError as error:
        raise kernels.KernelError(f"expected torch to compare with: {error}") from error
    return *cuda_rows(runs), CUDA


def main() -> int:
    """Run the benchmark; 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--host", action="store_true", help="host kernels against numpy")
    parser.add_argument("--runs", type=int, default=101, help="timed runs of each side")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    options = parser.parse_args()
    try:
        device, rows, columns = measured(options.runs, host=options.host)
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
