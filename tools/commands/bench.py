"""``blockcache bench``: a bundle beside everything that its user could run instead."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockcache.tools.commands.options import AsJson, BundleFolder, Threads

if TYPE_CHECKING:
    from blockcache.tools.bench.latency import LatencyReport

Against = Annotated[
    Path | None,
    typer.Option(help="Another bundle of the model, same presets: its segments take turns too."),
]
WarmUp = Annotated[
    bool,
    typer.Option(
        help="First a call of each and an untimed round; --no-warm-up where a call takes minutes."
    ),
]
ReportFolder = Annotated[
    Path | None, typer.Option(help="Folder for report.md, report.json and latency.svg.")
]


GPU_ENGINES = ("trt", "ort-tensorrt", "ort-cuda")


def bench(
    bundle: BundleFolder,
    preset: Annotated[
        list[str] | None, typer.Option(help="A preset, repeatable; default all.")
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="ort, ort-cuda, ort-tensorrt, trt, torch, torch-compile, deepcache, "
            "diffusers-pab; repeatable; default all that are there."
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Where PyTorch gets its U-Net: demo, sd15, sdxl, folder, hub id.")
    ] = "",
    images: Annotated[int, typer.Option(help="Images in one call.")] = 1,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 7,
    warm_up: WarmUp = True,
    threads: Threads = None,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="CPU seconds, where others use the machine too.")
    ] = False,
    against: Against = None,
    out: ReportFolder = None,
    timings: Annotated[
        Path | None,
        typer.Option(help="Write each segment's time on the first engine, for compile, estimate."),
    ] = None,
    append: Annotated[
        Path | None, typer.Option(help="Append the main figures to this file, one line a run.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time a bundle: uncut, split, every preset, and other ways to run the same model.

    All take turns on random prompts, so that a busy machine disturbs all alike.

    Example: blockcache bench demo-out/bundle --model demo --out bench-out
    """
    from blockcache.runtime import Bundle
    from blockcache.tools.bench.latency import BenchOptions, measure_latency
    from blockcache.tools.bench.report import report_json, report_text
    from blockcache.tools.commands.names import warn_of_float32
    from blockcache.tools.commands.outputs import check_file, check_folder, check_plots
    from blockcache.tools.report.progress import StageProgress

    options = BenchOptions(
        presets=tuple(preset or ()),
        engines=tuple(engine or ()),
        model=model,
        images=images,
        rounds=rounds,
        warm_up=warm_up,
        threads=threads,
        cpu_time=cpu_time,
    )
    if out is not None:
        check_plots()
        check_folder(out)
    for file in (timings, append):
        if file is not None:
            check_file(file)
    opened = Bundle.open(bundle)
    other = Bundle.open(against) if against is not None else None
    gpu_engines = [name for name in options.engines if name in GPU_ENGINES]
    if gpu_engines:
        warn_of_float32(opened.model.precision, gpu_engines[0])
    with StageProgress() as progress:
        report = measure_latency(opened, options, progress, other)
    print(report_json(report) if as_json else report_text(report))
    _write(report, out, timings, append)


def _write(
    report: LatencyReport, out: Path | None, timings: Path | None, append: Path | None
) -> None:
    """The files that were asked for."""
    from blockcache.export.costs.timings import write_timings
    from blockcache.tools.bench.latency import own_timings
    from blockcache.tools.bench.report import append_figures, write_report

    if out is not None:
        write_report(report, out)
    if append is not None:
        append_figures(append, report)
    if timings is not None:  # the last one: it may find nothing to write
        write_timings(timings, own_timings(report))
    for written in (out, append, timings):
        if written is not None:
            print(f"wrote {written}", file=sys.stderr)
