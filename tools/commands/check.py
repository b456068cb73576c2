"""``blockcache check``: do the engines compute what the graphs say, and how long do they take?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockcache.tools.commands.options import AsJson, BundleFolder, PresetName

if TYPE_CHECKING:
    from blockcache.export.engines.reference import Comparison
    from blockcache.runtime import Bundle


def check(
    bundle: BundleFolder,
    backend: Annotated[str, typer.Option(help="trt, ort-cuda or ort-tensorrt.")] = "trt",
    target: Annotated[str, typer.Option(help="Whose engines; default what fits this GPU.")] = "",
    preset: PresetName = None,
    batch: Annotated[int, typer.Option(help="Engine batch of the segment checks.")] = 2,
    loop: Annotated[bool, typer.Option(help="Also run the whole denoising loop.")] = True,
    times: Annotated[
        bool, typer.Option(help="Time every engine and write that into the bundle, for budgets.")
    ] = True,
    save: Annotated[
        Path | None, typer.Option(help="Keep every segment's inputs and outputs in this folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare every engine, then the whole loop, with float32 on the CPU. Needs a GPU.

    The tolerance is measured: at most twice the error that rounding every result of the same graph
    to the bundle's precision makes. Exit code 1 where an engine loses more.

    Example: blockcache check sd21 --target sm80
    """
    from blockcache.runtime.bundles.bundle import Bundle
    from blockcache.tools.check.loop import check_loop
    from blockcache.tools.check.segments import check_segments
    from blockcache.tools.check.times import time_segments
    from blockcache.tools.commands.names import preset_of
    from blockcache.tools.commands.outputs import check_folder
    from blockcache.tools.report.progress import StageProgress

    opened = Bundle.open(bundle)
    engines, layouts = _engines(opened, backend, target)
    if save is not None:
        check_folder(save)
    with StageProgress() as progress:

        def observe(_: str, done: int, total: int) -> None:
            progress("check", done, total)

        found = check_segments(opened, engines, layouts, batch=batch, save=save, observer=observe)
        if loop:
            found.append(check_loop(opened, engines, preset_of(opened, preset)))
        measured = time_segments(opened, engines, batch=batch) if times else {}
    if measured:
        _record(opened, engines, measured, batch)
    print(json.dumps(_as_json(found, measured), indent=1) if as_json else _text(found, measured))
    if not all(comparison.passed for comparison in found):
        raise typer.Exit(1)


def _engines(bundle: Bundle, backend: str, target: str) -> tuple[Any, dict[str, str]]:
    """The engine library, and the layouts that its engines expect."""
    from blockcache.runtime.engines.choice import make_backend
    from blockcache.runtime.engines.files import read_engines
    from blockcache.runtime.engines.trt import TrtBackend, fitting_target
    from blockcache.runtime.errors import ConfigError

    if backend in ("ort-cuda", "ort-tensorrt"):
        return make_backend(backend, bundle=bundle), {}
    if backend != "trt":
        raise ConfigError(f"Expected a backend of trt, ort-cuda or ort-tensorrt, got {backend!r}.")
    engines = TrtBackend(target=target)
    name = target or fitting_target(bundle, engines.library, engines.device.capability)
    layouts: dict[str, str] = {}
    for entry in read_engines(bundle, name).engines.values():
        layouts.update(entry.formats)
    return engines, layouts


def _record(bundle: Bundle, engines: Any, measured: dict[str, float], batch: int) -> None:
    """Write the times into the bundle."""
    from blockcache.export import Timings
    from blockcache.export.costs.bundle_timings import keep_timings
    from blockcache.runtime.devices.cuda_driver import device_label

    sizes = replace(bundle.model.sizes, batch=batch)
    keep_timings(bundle, Timings(engines.engine, device_label(), sizes, measured))


def _as_json(found: list[Comparison], measured: dict[str, float]) -> dict[str, Any]:
    rows = [
        {
            "name": c.name,
            "error": c.error,
            "plain_error": c.plain_error,
            "passed": c.passed,
            "ms": measured.get(c.name),
        }
        for c in found
    ]
    return {"worst": max(found, key=lambda c: c.ratio).name, "rows": rows}


def _text(found: list[Comparison], measured: dict[str, float]) -> str:
    """One line a segment, then the worst."""
    worst = max(found, key=lambda c: c.ratio)
    lines = [
        f"{'ok  ' if c.passed else 'HIGH'} {c.name:<12} error {c.error:.2e}  "
        f"plain {c.plain_error:.2e}  ratio {c.ratio:.2f}"
        + (f"  {measured[c.name]:.3f} ms" if c.name in measured else "")
        for c in found
    ]
    return "\n".join([*lines, f"worst: {worst.name}, {worst.ratio:.2f} times the plain error"])
