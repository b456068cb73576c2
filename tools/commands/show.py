"""``blockcache show``: what is in a bundle."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockcache.tools.commands.options import AsJson, BundleFolder, PresetName

if TYPE_CHECKING:
    from blockcache.runtime import Bundle


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
    """Print a bundle: segments, what each preset gains and loses, and a schedule as a picture.

    Example: blockcache show demo-out/bundle --plot schedule.svg
    """
    from blockcache.runtime import Bundle
    from blockcache.tools.commands.names import preset_of
    from blockcache.tools.commands.outputs import check_picture
    from blockcache.tools.report.bundle import bundle_facts, print_bundle

    drawn: dict[Callable[[Bundle, str, Path], None], Path | None] = {
        _plot_schedule: plot,
        _plot_change: plot_change,
        _plot_alignment: plot_alignment,
        partial(_plot_features, model): plot_features,
    }
    for file in drawn.values():
        if file is not None:
            check_picture(file)
    opened = Bundle.open(bundle, verify=verify)
    name = preset_of(opened, preset)
    if as_json:
        print(json.dumps(bundle_facts(opened), indent=1))
    else:
        print_bundle(opened, name)
    for draw, file in drawn.items():
        if file is not None:
            draw(opened, name, file)
            print(f"wrote {file}", file=sys.stderr)


def _plot_schedule(bundle: Bundle, preset: str, file: Path) -> None:
    """Which block runs at which step, as the paper's Fig. 4."""
    from blockcache.tools.report import plots

    paths = [block.path for block in bundle.model.blocks]
    plots.plot_schedule(bundle.preset(preset).schedule, paths, file)


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


def _plot_features(model: str | None, bundle: Bundle, preset: str, file: Path) -> None:
    """Outputs of the first, the middle and the last block, as the paper's Fig. 2a."""
    from blockcache.export.measure.sampling import Sampling
    from blockcache.runtime import ConfigError
    from blockcache.runtime.solvers.recorded import recorded_solver
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
    solver = recorded_solver(chosen.solver)
    sampling = Sampling(load_source(name), solver, calibration, chosen.guidance_scale)
    outputs = block_outputs(sampling, [(0, 0)], shown)  # the conditional half is the last
    plots.plot_features(
        [(bundle.model.blocks[k].path, output[:, -1]) for k, output in outputs.items()], file
    )
