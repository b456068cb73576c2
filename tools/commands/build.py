"""``blockcache build``: a bundle's segments become TensorRT engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockcache.tools.commands.options import AsJson, BundleFolder

if TYPE_CHECKING:
    from blockcache.export import BuildOptions, Target


def build(
    bundle: BundleFolder,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="sm80, a100, current, ...; repeatable. Several joined by '+' share one engine "
            "(TensorRT-RTX)."
        ),
    ] = None,
    library: Annotated[str, typer.Option(help="tensorrt_rtx, tensorrt or auto.")] = "auto",
    min_batch: Annotated[int, typer.Option(help="Smallest engine batch.")] = 1,
    opt_batch: Annotated[int, typer.Option(help="Usual one: 2 is an image with guidance.")] = 2,
    max_batch: Annotated[int, typer.Option(help="Largest engine batch.")] = 8,
    resolution: Annotated[
        list[str] | None,
        typer.Option(help="Latent HEIGHTxWIDTH, repeatable; default the model's own."),
    ] = None,
    dynamic: Annotated[
        bool,
        typer.Option("--dynamic", help="Every size between the resolutions; the first is usual."),
    ] = False,
    weights: Annotated[
        str, typer.Option(help="included, refittable or stripped; the last two need a GPU.")
    ] = "included",
    whole: Annotated[
        bool, typer.Option("--whole", help="Also the uncut model, to show the split tax.")
    ] = False,
    level: Annotated[int, typer.Option(help="Builder optimisation level, 0 to 5.")] = 3,
    jobs: Annotated[
        int,
        typer.Option(help="Engines built at a time, each in a process of its own; 0: in this one."),
    ] = 1,
    memory_gb: Annotated[float, typer.Option(help="Memory that side-by-side builds may use.")] = 12,
    as_json: AsJson = False,
) -> None:
    """Build TensorRT engines for one or several targets; no GPU needed with TensorRT-RTX.

    Engines whose inputs did not change are kept. Interrupt it at any time: the same command
    resumes.

    Example: blockcache build sd21 --target a100
    """
    from blockcache.export import BuildOptions, ShapeOptions, Target

    targets = [Target.parse(text) for text in target or ["sm80"]]
    options = BuildOptions(
        library=library,
        shapes=ShapeOptions(
            min_batch=min_batch,
            opt_batch=opt_batch,
            max_batch=max_batch,
            resolutions=tuple(_resolution(text) for text in resolution or []),
            dynamic=dynamic,
        ),
        weights=weights,
        whole=whole,
        level=level,
        jobs=jobs,
        memory_gb=memory_gb,
    )
    _build_all(bundle, targets, options, as_json=as_json)


def _build_all(
    folder: Path, targets: list[Target], options: BuildOptions, *, as_json: bool
) -> None:
    from rich.console import Console

    from blockcache.export import build_engines
    from blockcache.export.engines.report import report_table
    from blockcache.runtime.bundles.bundle import Bundle
    from blockcache.tools.commands.names import warn_of_float32
    from blockcache.tools.commands.outputs import check_folder
    from blockcache.tools.report.progress import StageProgress

    opened = Bundle.open(folder)
    check_folder(folder)
    warn_of_float32(opened.model.precision, targets[0].name)
    reports = []
    for target in targets:
        with StageProgress() as progress:
            reports.append(build_engines(opened, target, options, progress))
    if as_json:
        print(json.dumps([report.to_json() for report in reports], indent=1))
        return
    for report in reports:
        Console().print(report_table(report))


def _resolution(text: str) -> tuple[int, int]:
    from blockcache.runtime.errors import ConfigError

    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise ConfigError(f"Expected a latent resolution such as 64x64, got {text!r}.")
    return int(height), int(width)
