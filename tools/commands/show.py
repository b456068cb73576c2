"""``blockcache show``: what is in a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockcache.tools.commands.options import AsJson, BundleFolder, PresetName

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from blockcache.runtime import Bundle, Schedule


def show(
    bundle: BundleFolder,
    preset: PresetName = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write the schedule as a picture: FILE.png or FILE.svg.")
    ] = None,
    plot_change: Annotated[
        Path | None,
        typer.Option(help="Write the measured change per block and step: FILE.png or FILE.svg."),
    ] = None,
    plot_alignment: Annotated[
        Path | None,
        typer.Option(help="Write what alignment repairs, per block and step: FILE.png or .svg."),
    ] = None,
    plot_features: Annotated[
        Path | None,
        typer.Option(help="Write blocks' outputs over the steps as colours: FILE.png or .svg."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="For --plot-features: 'demo' or a diffusers folder."),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Check the sha256 of every file.")] = True,
    as_json: AsJson = False,
) -> None:
    """Print a bundle: segments, presets, and a schedule as a picture (blocks by steps)."""
    from blockcache.runtime import Bundle

    opened = Bundle.open(bundle, verify=verify)
    print_bundle(opened, preset=preset, as_json=as_json)
    name = preset or default_preset(opened)
    if plot is not None:
        from blockcache.tools.report.plots import plot_schedule

        paths = [block.path for block in opened.model.blocks]
        plot_schedule(opened.preset(name).schedule, paths, plot)
    if plot_change is not None:
        _plot_change(opened, name, plot_change)
    if plot_alignment is not None:
        _plot_alignment(opened, name, plot_alignment)
    if plot_features is not None:
        _plot_features(opened, name, model, plot_features)


def _plot_change(bundle: Bundle, preset: str, file: Path) -> None:
    """The profile behind a preset's schedule, as the paper's Fig. 2b."""
    from blockcache.runtime import ConfigError
    from blockcache.tools.report import plots

    made = bundle.manifest.presets[preset].provenance
    if made.profile is None:
        raise ConfigError(
            f"Preset {preset!r} was made without measurements, so there is no change to plot. "
            f"Choose another: --preset NAME."
        )
    tensors = bundle.tensors(made.profile)
    paths = [block.path for block in bundle.model.blocks]
    title = f"{preset}: mean and standard deviation over {made.images} images"
    plots.plot_change(tensors["mean"], tensors["std"], paths, file, title)


def _plot_alignment(bundle: Bundle, preset: str, file: Path) -> None:
    """The error of reused outputs before and after alignment, as the compile measured it."""
    import numpy as np

    from blockcache.runtime import ConfigError
    from blockcache.tools.report import plots

    chosen = bundle.preset(preset)
    made = chosen.provenance
    if made.alignment_report is None:
        raise ConfigError(
            f"Preset {preset!r} holds no report of an alignment. Choose one that is aligned: "
            f"--preset NAME."
        )
    tensors = bundle.tensors(made.alignment_report)
    reused = ~chosen.schedule.recompute
    before, after = (np.where(reused, tensors[name], np.nan) for name in ("before", "after"))
    paths = [block.path for block in bundle.model.blocks]
    title = f"{preset}: error of reused outputs, {made.alignment}"
    plots.plot_alignment(before, after, paths, file, title)


def _plot_features(bundle: Bundle, preset: str, model: str | None, file: Path) -> None:
    """Outputs of the first, the middle and the last block, as the paper's Fig. 2a."""
    from blockcache.export.measure.sampling import Sampling
    from blockcache.runtime import ConfigError, SolverConfig
    from blockcache.tools.report import plots
    from blockcache.tools.sources.block_outputs import block_outputs
    from blockcache.tools.sources.models import DEMO, load_source
    from blockcache.tools.sources.prompts import calibration_for

    name = model or (DEMO if bundle.model.name == DEMO else None)
    if name is None:
        raise ConfigError(
            "Expected --model FOLDER: blocks' outputs over the steps come from the source model."
        )
    blocks = len(bundle.model.blocks)
    shown = sorted({0, blocks // 2, blocks - 1})
    calibration = calibration_for(name, None, None)
    chosen = bundle.preset(preset)
    solver = SolverConfig.from_json(chosen.solver)
    sampling = Sampling(load_source(name), solver, calibration, chosen.guidance_scale)
    outputs = block_outputs(sampling, [(0, 0)], shown)  # the conditional half is the last
    plots.plot_features(
        [(bundle.model.blocks[k].path, output[:, -1]) for k, output in outputs.items()], file
    )


def default_preset(bundle: Bundle) -> str:
    """The first preset that reuses anything, else the first."""
    for name, entry in bundle.manifest.presets.items():
        if entry.computed_fraction < 1:
            return name
    return bundle.preset_names[0]


def print_bundle(bundle: Bundle, *, preset: str | None = None, as_json: bool = False) -> None:
    """Print a bundle for people, or its facts as JSON."""
    if as_json:
        print(json.dumps(bundle_facts(bundle), indent=1))
        return
    from rich.console import Console

    console = Console()
    console.print(_header(bundle))
    console.print(_segments_table(bundle))
    console.print(_presets_table(bundle))
    chosen = preset or default_preset(bundle)
    console.print(f"\nschedule of [bold]{chosen}[/]: █ recomputed, · reused")
    paths = [block.path for block in bundle.model.blocks]
    console.print(schedule_text(bundle.preset(chosen).schedule, paths))


def bundle_facts(bundle: Bundle) -> dict[str, object]:
    """The figures of ``print_bundle``."""
    return {
        "folder": str(bundle.folder),
        "model": bundle.model.name,
        "precision": bundle.model.precision,
        "blocks": [block.path for block in bundle.model.blocks],
        "bytes": sum(entry.bytes for entry in bundle.manifest.files.values()),
        "segments": [
            {"name": s.name, "role": s.role, "gflops": round(s.flops / 1e9, 4)}
            for s in bundle.segments
        ],
        "presets": {
            name: {"steps": entry.steps, "computed_fraction": entry.computed_fraction}
            for name, entry in bundle.manifest.presets.items()
        },
    }


def _header(bundle: Bundle) -> str:
    model = bundle.model
    total = sum(entry.bytes for entry in bundle.manifest.files.values())
    return (
        f"[bold]{model.name}[/]  {model.precision}, {len(model.blocks)} blocks, "
        f"{total / 1e6:.1f} MB, latents {model.channels} x {model.sizes.height} x "
        f"{model.sizes.width}"
    )


def _segments_table(bundle: Bundle) -> Table:
    from rich.table import Table

    table = Table("segment", "source", title="segments", title_justify="left")
    for column in ("GFLOP", "share", "inputs", "outputs"):
        table.add_column(column, justify="right")
    loop = sum(s.flops for s in bundle.segments if s.role in ("trunk", "block", "condition"))
    for segment in bundle.segments:
        block = segment.block
        source = bundle.model.blocks[block].path if block is not None else segment.role
        in_loop = segment.role in ("trunk", "block", "condition")
        table.add_row(
            segment.name,
            source,
            f"{segment.flops / 1e9:.3f}",
            f"{segment.flops / loop:.1%}" if in_loop else "",
            str(len(segment.inputs)),
            str(len(segment.outputs)),
            style="cyan" if segment.role == "block" else "",
        )
    return table


def _presets_table(bundle: Bundle) -> Table:
    from rich.table import Table

    table = Table("preset", "solver", "policy", title="presets", title_justify="left")
    for column in ("steps", "blocks computed", "guidance"):
        table.add_column(column, justify="right")
    for name, entry in bundle.manifest.presets.items():
        shown = ("value", "alignment", "images", "costs")
        made = entry.provenance.to_json()
        policy = " ".join(f"{k}={v}" for k, v in made.items() if k in shown)
        table.add_row(
            name,
            str(entry.solver["solver"]),
            f"{entry.provenance.kind} {policy}".strip(),
            str(entry.steps),
            f"{entry.computed_fraction:.1%}",
            f"{entry.guidance_scale:g}",
        )
    return table


def schedule_text(schedule: Schedule, paths: list[str]) -> Text:
    """Blocks by steps, as in the paper's Fig. 4."""
    from rich.text import Text

    width = max(len(path) for path in paths)
    lines = []
    for k, path in enumerate(paths):
        marks = "".join("█" if on else "·" for on in schedule.recompute[:, k])
        count = int(schedule.recompute[:, k].sum())
        lines.append(f"{path:>{width}} {marks} {count:>3}/{schedule.steps}")
    return Text("\n".join(lines))
