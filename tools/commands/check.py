"""``blockcache check``: do the engines compute what the graphs say?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def check(
    bundle: Annotated[Path, typer.Argument(help="A bundle with built engines.")],
    target: Annotated[str, typer.Option(help="Whose engines; default what fits this GPU.")] = "",
    preset: Annotated[str, typer.Option(help="Preset of the loop; default the first.")] = "",
    batch: Annotated[int, typer.Option(help="Engine batch of the segment checks.")] = 2,
    loop: Annotated[bool, typer.Option(help="Also run the whole denoising loop.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compare every engine, then the whole loop, with float32 on the CPU. Needs a GPU.

    The tolerance is measured: at most twice the error that rounding every result of the same graph
    to the bundle's precision makes. Exit code 1 where an engine loses more.

    Example: blockcache check sd21 --target sm80
    """
    from rich.console import Console

    from blockcache.runtime.bundle import Bundle
    from blockcache.runtime.engine_files import read_engines
    from blockcache.runtime.engine_trt import TrtBackend, fitting_target
    from blockcache.tools.engine_check import check_loop, check_segments
    from blockcache.tools.progress import StageProgress

    opened = Bundle.open(bundle)
    backend = TrtBackend(target=target)
    name = target or fitting_target(opened, backend.library, backend.device.capability)
    layouts: dict[str, str] = {}
    for entry in read_engines(opened, name).engines.values():
        layouts.update(entry.formats)
    with StageProgress() as progress:
        found = check_segments(
            opened,
            backend,
            layouts,
            batch=batch,
            observer=lambda _, done, total: progress("check", done, total),
        )
    if loop:
        found.append(check_loop(opened, backend, preset or opened.preset_names[0]))
    worst = max(found, key=lambda each: each.ratio)
    rows = [
        {"name": c.name, "error": c.error, "plain_error": c.plain_error, "passed": c.passed}
        for c in found
    ]
    if as_json:
        print(json.dumps({"worst": worst.name, "rows": rows}, indent=1))
    else:
        console = Console()
        for c in found:
            mark = "[green]ok[/]  " if c.passed else "[red]high[/]"
            console.print(
                f"{mark} {c.name:<12} error {c.error:.2e}  plain {c.plain_error:.2e}  "
                f"ratio {c.ratio:.2f}"
            )
        console.print(f"worst: {worst.name}, {worst.ratio:.2f} times the plain error")
    if not all(c.passed for c in found):
        raise typer.Exit(1)
