"""``blockcache bench``: whole model, split and cached, as ratios of one run."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from blockcache.tools.commands.options import (
    AsJson,
    BackendName,
    BundleFolder,
    PresetName,
    Threads,
)

if TYPE_CHECKING:
    from blockcache.tools.bench.latency import LatencyReport


def bench(
    bundle: BundleFolder,
    preset: PresetName = None,
    images: Annotated[int, typer.Option(help="Images in one call.")] = 1,
    rounds: Annotated[int, typer.Option(help="Timed rounds, after one to warm up.")] = 7,
    backend: BackendName = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Time a bundle: the whole ONNX model, the split one uncached, and the cached preset.

    The three take turns on random prompts; printed are medians over the rounds with their range,
    and the ratios that the project promises.
    """
    from blockcache.runtime import Bundle
    from blockcache.tools.bench.latency import measure_latency
    from blockcache.tools.commands.show import default_preset
    from blockcache.tools.progress import StageProgress

    opened = Bundle.open(bundle)
    with StageProgress(quiet=as_json) as progress:
        report = measure_latency(
            opened,
            preset or default_preset(opened),
            images=images,
            rounds=rounds,
            threads=threads,
            backend=backend,
            progress=progress,
        )
    print(json.dumps(asdict(report), indent=1) if as_json else report_text(report))


def report_text(report: LatencyReport) -> str:
    """The report as Markdown."""
    lines = [
        f"{report.preset}, {report.images} image(s), {report.rounds} rounds; "
        f"{report.machine['cpu']}, onnxruntime {report.machine['onnxruntime']}",
        "",
        "| | seconds, median (range) |",
        "|---|---|",
        *(f"| {name} | {spread} |" for name, spread in report.seconds.items()),
        "",
        "| ratio | median (range) | goal |",
        "|---|---|---|",
        f"| split / whole | {report.split_over_whole} | <= 1.02 |",
        f"| cached / segments it ran | {report.cached_over_ran} | <= 1.03 |",
        f"| speed-up, split / cached | {report.speedup} | |",
        f"| blocks computed | {report.computed_fraction:.3f} | |",
        f"| host time per step and segment | {report.host_us_per_launch:.2f} us | <= 3 us |",
    ]
    return "\n".join(lines)
