"""``blockcache demo``: the main job on the demo model, from prompts to a picture."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockcache.tools.commands.options import AsJson

if TYPE_CHECKING:
    import numpy as np

    from blockcache.runtime import Bundle, Drawn
    from blockcache.tools.report.progress import StageProgress

PROMPTS = (
    "twitter emoji, rocket",
    "noto emoji, panda",
    "noto emoji, hamburger",
    "twitter emoji, house",
)
"""Default prompts, all among those whose embeddings ship with the model."""


IMAGES = 16
"""Images to calibrate with: a quarter of the paper's, enough for a demo."""


CONVERGED = 100
"""Steps of the run that all others are held against; more change nothing that can be seen."""
GAIN = 6.0
"""How much the differences in the picture are amplified."""


@dataclass(frozen=True)
class DemoRow:
    """One run of the demo and what it cost."""

    preset: str
    about: str  # what it is, for people
    steps: int
    flops: float  # share of the first row's
    seconds: float  # denoising of all images, median of the repeats
    distance: float  # relative L2 of the latents to the converged run, same noise, mean over images


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the bundle, the picture and the figures.")
    ] = Path("demo-out"),
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 20,
    delta: Annotated[float, typer.Option(help="Threshold of eq. 7, for the paper's row.")] = 0.5,
    speedup: Annotated[float, typer.Option(help="By FLOPs, for blockcache's row.")] = 2.0,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 3.0,
    prompt: Annotated[list[str] | None, typer.Option(help="Other prompts; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Image i uses SEED + i.")] = 7,
    repeats: Annotated[int, typer.Option(help="Timed repeats, interleaved.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Compile the demo model and denoise in several ways, from the same noise.

    As the scheduler has it; with steps, grid and reused branches chosen together, at SPEEDUP times
    fewer FLOPs; with as many fewer steps, as well placed as can be; and by the paper's threshold.
    All are held against the converged run. Ends in a picture: right of every image, its
    difference to the converged one.
    """
    from blockcache.runtime.files import write_text
    from blockcache.tools.commands.outputs import check_folder
    from blockcache.tools.report.pictures import beside_differences, save_grid
    from blockcache.tools.report.progress import StageProgress
    from blockcache.tools.sources.models import check_demo_prompts

    check_folder(out)
    check_demo_prompts()
    prompts = list(prompt or PROMPTS)
    with StageProgress() as progress:
        bundle, about = compile_demo(out / "bundle", steps, delta, speedup, guidance, progress)
        drawn, seconds = run_presets(bundle, list(about), prompts, seed, repeats, progress)
    rows = demo_rows(bundle, about, {name: drawn[name].latents for name in about}, seconds)
    converged = drawn[rows[-1].preset].images
    captions = [
        (_caption(row, rows[0]), beside_differences(drawn[row.preset].images, converged, GAIN))
        for row in rows
    ]
    save_grid(captions, prompts, out / "demo.png")
    write_text(out / "demo.json", json.dumps([asdict(row) for row in rows], indent=1))
    _print(rows, out / "demo.png", as_json)


def compile_demo(
    folder: Path,
    steps: int,
    delta: float,
    speedup: float,
    guidance: float,
    progress: StageProgress,
) -> tuple[Bundle, dict[str, str]]:
    """The demo bundle, and what each of its presets is; the converged run comes last."""
    from blockcache.export import (
        AlignmentOptions,
        CompileOptions,
        ConvergedOptions,
        MeasurementOptions,
        PresetOptions,
        ProfileOptions,
        SensitivityOptions,
        TrialOptions,
        compile_model,
    )
    from blockcache.export.choose.policies import Joint, Threshold
    from blockcache.tools.sources.models import DEMO, load_parts_of, load_source
    from blockcache.tools.sources.prompts import calibration_for

    progress("load", 0, 1)
    source, calibration = load_source(DEMO), calibration_for(DEMO, None, None)
    parts = load_parts_of(DEMO)
    progress("load", 1, 1)
    fewer = max(1, round(steps / speedup))
    cached = PresetOptions(solver="dpm", steps=steps, policy=Joint(speedup))
    made = {
        PresetOptions(solver="dpm", steps=steps): f"{steps} steps,\nthe scheduler's own",
        cached: f"blockcache,\n{speedup:g}x fewer FLOPs",
        PresetOptions(solver="dpm", steps=fewer, grid="auto"): f"{fewer} steps,\nplaced best",
        PresetOptions(solver="dpm", steps=steps, policy=Threshold(delta)): (
            f"the paper's threshold,\ndelta {delta:g}"
        ),
        PresetOptions(solver="dpm", steps=CONVERGED, grid="karras"): "converged run",
    }
    measurement = MeasurementOptions(
        guidance_scale=guidance,
        converged=ConvergedOptions(images=4),
        trials=TrialOptions(candidates=4, images=IMAGES),
        profile=ProfileOptions(prompts=IMAGES, seeds=1),
        sensitivity=SensitivityOptions(images=2),
        alignment=AlignmentOptions(images=IMAGES),
    )
    options = CompileOptions(presets=tuple(made), measurement=measurement, recommended=cached.name)
    bundle = compile_model(source, folder, options, calibration, progress, parts).bundle
    return bundle, {preset.name: about for preset, about in made.items()}


def run_presets(
    bundle: Bundle,
    names: list[str],
    prompts: list[str],
    seed: int,
    repeats: int,
    progress: StageProgress,
) -> tuple[dict[str, Drawn], dict[str, float]]:
    """The prompts drawn by every preset from the same noise, and seconds of denoising (medians).

    The presets take turns. The last one, the converged run, is drawn once and not timed.
    """
    import numpy as np

    from blockcache.runtime import Pipeline

    drawn: dict[str, Drawn] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    turns = [name for _ in range(repeats + 1) for name in names[:-1]] + names[-1:]
    pipelines = {name: Pipeline.open(bundle, preset=name, verify=False) for name in names}
    for turn, name in enumerate(turns):
        progress("denoise", turn, len(turns))
        drawn[name] = pipelines[name](prompts, seeds=range(seed, seed + len(prompts)))
        seconds[name].append(drawn[name].record.total_ms / 1e3)
    progress("denoise", len(turns), len(turns))
    # The first turn of each warms up, where there are others.
    return drawn, {n: float(np.median(taken[1:] or taken)) for n, taken in seconds.items()}


def demo_rows(
    bundle: Bundle,
    about: dict[str, str],
    latents: dict[str, np.ndarray],
    seconds: dict[str, float],
) -> list[DemoRow]:
    """Cost and distance of every run; the last one is the converged run."""
    from blockcache.tools.evaluation.quality import relative_distance
    from blockcache.tools.report.presets import image_flops

    names = list(about)
    whole = image_flops(bundle, names[0])
    return [
        DemoRow(
            preset=name,
            about=about[name],
            steps=bundle.manifest.presets[name].steps,
            flops=round(image_flops(bundle, name) / whole, 4),
            seconds=round(seconds[name], 4),
            distance=round(float(relative_distance(latents[name], latents[names[-1]]).mean()), 4),
        )
        for name in names
    ]


def _caption(row: DemoRow, reference: DemoRow) -> str:
    cost = f"{row.flops:.0%} of FLOPs"
    if row.distance == 0:
        return f"{row.about}\n{row.steps} steps\n{cost}"
    speedup = f"{reference.seconds / row.seconds:.2f}x by the clock"
    return f"{row.about}\n{cost}, {speedup}\ndistance {row.distance:.3f}"


def _print(rows: list[DemoRow], picture: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "picture": str(picture)}))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("preset", overflow="fold")
    table.add_column("steps", justify="right")
    for column in ("FLOPs", "seconds", "speed-up", "distance to\nconverged"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.preset,
            str(row.steps),
            f"{row.flops:.1%}",
            f"{row.seconds:.2f}",
            f"{rows[0].seconds / row.seconds:.2f}x",
            f"{row.distance:.3f}",
        )
    Console().print(table)
    print(f"wrote {picture}", file=sys.stderr)
