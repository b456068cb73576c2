"""``blockcache demo``: the main job on the demo model, from prompts to a picture."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockcache.tools.commands.options import AsJson

if TYPE_CHECKING:
    import numpy as np

    from blockcache.runtime import Bundle
    from blockcache.tools.report.progress import StageProgress

PROMPTS = (
    "twitter emoji, rocket",
    "noto emoji, panda",
    "flat emoji, fox",
    "noto emoji, hamburger",
    "twitter emoji, house",
    "flat emoji, strawberry",
)
"""Default prompts, all among those whose embeddings ship with the model."""


IMAGES = 16
"""Images to calibrate with: a quarter of the paper's, enough for a demo."""


@dataclass(frozen=True)
class DemoRow:
    """One run of the demo and what it cost."""

    preset: str
    steps: int
    blocks_computed: float  # share of the blocks' FLOPs
    flops_computed: float  # share of the 20-step uncached run's FLOPs
    seconds: float  # denoising of all images, median of the repeats
    distance: float  # relative L2 of the latents to the uncached run, same noise


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the bundle, the picture and the figures.")
    ] = Path("demo-out"),
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 20,
    delta: Annotated[float, typer.Option(help="Threshold of eq. 7, for the paper's row.")] = 0.5,
    speedup: Annotated[float, typer.Option(help="By FLOPs, for the budget's row.")] = 1.3,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 3.0,
    prompt: Annotated[list[str] | None, typer.Option(help="Other prompts; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Image i uses SEED + i.")] = 7,
    repeats: Annotated[int, typer.Option(help="Timed repeats, interleaved.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Compile the demo model and denoise four ways, from the same noise.

    Uncached; cached as in the paper (threshold); cached by a budget with the last two outputs
    aligned; and uncached with as few steps as that budget's cost allows. Ends in a picture.
    """
    from blockcache.runtime.files import write_text
    from blockcache.tools.commands.outputs import check_folder
    from blockcache.tools.report.pictures import save_grid
    from blockcache.tools.report.progress import StageProgress
    from blockcache.tools.sources.codecs import DemoCodec

    check_folder(out)
    prompts = list(prompt or PROMPTS)
    with StageProgress() as progress:
        bundle, names = compile_demo(out / "bundle", steps, delta, speedup, guidance, progress)
        rows, latents = run_presets(bundle, names, prompts, seed, repeats, progress)
    pictures = {name: DemoCodec().decode(latents[name]) for name in names}
    captions = [(_caption(row, rows[0]), pictures[row.preset]) for row in rows]
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
) -> tuple[Bundle, list[str]]:
    """The demo bundle and the names of its presets, in the order of the docstring above."""
    from blockcache.export import (
        AlignmentOptions,
        CalibrationOptions,
        CompileOptions,
        PresetOptions,
        ProfileOptions,
        SensitivityOptions,
        compile_model,
    )
    from blockcache.export.choose.policies import Budget, Threshold
    from blockcache.tools.sources.models import DEMO, load_source
    from blockcache.tools.sources.prompts import calibration_for

    progress("load", 0, 1)
    source, calibration = load_source(DEMO), calibration_for(DEMO, None, None)
    progress("load", 1, 1)
    paper, budget = Threshold(delta), Budget(speedup)
    made = (
        PresetOptions(solver="dpm", steps=steps),
        PresetOptions(solver="dpm", steps=steps, policy=paper),
        PresetOptions(solver="dpm", steps=steps, policy=budget, alignment="history"),
        PresetOptions(solver="dpm", steps=max(1, round(steps / speedup))),
    )
    presets = {preset.name: preset for preset in made}
    calibrated = CalibrationOptions(
        guidance_scale=guidance,
        profile=ProfileOptions(prompts=IMAGES, seeds=1),
        sensitivity=SensitivityOptions(images=IMAGES // 4),
        alignment=AlignmentOptions(images=2 * IMAGES),
    )
    options = CompileOptions(presets=tuple(presets.values()), calibration=calibrated)
    return compile_model(source, folder, options, calibration, progress).bundle, list(presets)


def run_presets(
    bundle: Bundle,
    names: list[str],
    prompts: list[str],
    seed: int,
    repeats: int,
    progress: StageProgress,
) -> tuple[list[DemoRow], dict[str, np.ndarray]]:
    """Denoise the prompts with every preset from the same noise; the first is the reference."""
    import numpy as np

    from blockcache.runtime import Session
    from blockcache.tools.report.presets import image_flops
    from blockcache.tools.sources.codecs import DemoCodec

    codec = DemoCodec()
    positive, negative = (half["encoder_hidden_states"] for half in codec.encode(prompts))
    sessions = {name: Session.open(bundle, preset=name, verify=False) for name in names}
    latents: dict[str, np.ndarray] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats + 1):  # the first round warms up
        for name, session in sessions.items():
            progress("denoise", repeat * len(names) + names.index(name), (repeats + 1) * len(names))
            noise = session.noise(range(seed, seed + len(prompts)))
            begin = time.perf_counter()
            latents[name] = session.denoise(noise, positive, negative).latents
            if repeat:
                seconds[name].append(time.perf_counter() - begin)
    progress("denoise", (repeats + 1) * len(names), (repeats + 1) * len(names))
    reference = latents[names[0]]
    rows = [
        DemoRow(
            preset=name,
            steps=bundle.manifest.presets[name].steps,
            blocks_computed=bundle.manifest.presets[name].computed_fraction,
            flops_computed=round(image_flops(bundle, name) / image_flops(bundle, names[0]), 4),
            seconds=round(float(np.median(seconds[name])), 4),
            distance=round(
                float(np.linalg.norm(latents[name] - reference) / np.linalg.norm(reference)), 4
            ),
        )
        for name in names
    ]
    return rows, latents


def _caption(row: DemoRow, reference: DemoRow) -> str:
    kind = "uncached" if row.blocks_computed == 1 else row.preset
    return (
        f"{kind}\n{row.steps} steps\n{row.seconds:.2f} s ({reference.seconds / row.seconds:.2f}x)\n"
        f"{row.blocks_computed:.0%} of blocks\n{row.flops_computed:.0%} of FLOPs"
    )


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
    for column in ("blocks\nrun", "FLOPs", "seconds", "speed-up", "distance"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.preset,
            str(row.steps),
            f"{row.blocks_computed:.1%}",
            f"{row.flops_computed:.1%}",
            f"{row.seconds:.2f}",
            f"{rows[0].seconds / row.seconds:.2f}x",
            f"{row.distance:.3f}",
        )
    Console().print(table)
    print(f"wrote {picture}", file=sys.stderr)
