"""``blockcache compile``: a U-Net becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockcache.tools.commands.options import AsJson

if TYPE_CHECKING:
    from blockcache.export.pipeline import CompileOptions
    from blockcache.runtime import Bundle

Presets = Annotated[
    list[str] | None,
    typer.Option(
        help="SOLVER:STEPS[:POLICY[:ALIGNMENT]], repeatable. SOLVER: dpm, ddim, euler. POLICY: "
        "0.5 (threshold of eq. 7), x1.5 (speed-up; least predicted loss), ms250 (the same, in "
        "milliseconds an image), j1.5 (as x1.5, with fewer steps too), c1.5 (least change), t1.5 "
        "(by threshold), every3, deepcache3, smooth0.1, FILE.json; none: uncached. ALIGNMENT: "
        "least-squares, history, distil, history-distil; none: reuse as it is."
    ),
]
CachedBlocks = Annotated[
    str, typer.Option(help="What may be cached: transformers (as the paper), or resnets.")
]
Hoist = Annotated[
    bool, typer.Option(help="Take what does not depend on the sample out of the loop.")
]
BudgetTimings = Annotated[
    Path | None,
    typer.Option(help="Segment times for budgets (blockcache bench --timings); default FLOPs."),
]
BudgetGpu = Annotated[
    str | None,
    typer.Option(help="A GPU to predict such times for, in half precision: a100, h100, ..."),
]


def compile_bundle(
    model: Annotated[str, typer.Argument(help="A diffusers folder, a hub id, or 'demo'.")],
    out: Annotated[Path, typer.Argument(help="The bundle's folder; resumed if it is there.")],
    preset: Presets = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale, as in use.")] = 5.0,
    precision: Annotated[
        str, typer.Option(help="float32 (ONNX Runtime on CPU), bfloat16 or float16 (TensorRT).")
    ] = "float32",
    history: Annotated[
        bool, typer.Option("--history", help="Let a reuse combine a block's last two outputs.")
    ] = False,
    blocks: CachedBlocks = "transformers",
    hoist: Hoist = True,
    prompts: Annotated[
        Path | None, typer.Option(help="Profile with these prompts, one a line.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Profile with these encoded prompts (safetensors).")
    ] = None,
    profile_prompts: Annotated[int, typer.Option(help="Prompts to profile with.")] = 32,
    profile_seeds: Annotated[int, typer.Option(help="Seeds a prompt.")] = 2,
    images_at_once: Annotated[int, typer.Option(help="Batch size of the profile.")] = 8,
    align_images: Annotated[int, typer.Option(help="Images to fit an alignment on.")] = 48,
    timings: BudgetTimings = None,
    gpu: BudgetGpu = None,
    as_json: AsJson = False,
) -> None:
    """Profile a U-Net, derive schedules, and write a bundle.

    Interrupt it at any time: the same command resumes. Stages whose inputs did not change are
    taken as they are.

    Example: blockcache compile stabilityai/stable-diffusion-2-1 sd21 --preset dpm:20:x1.5:history
    """
    from blockcache.export.align.fit import AlignmentOptions
    from blockcache.export.choose.preset import PresetOptions
    from blockcache.export.costs.roofline import gpu as data_sheet
    from blockcache.export.costs.timings import read_timings
    from blockcache.export.graph.to_onnx import ExportOptions
    from blockcache.export.measure.change import ProfileOptions
    from blockcache.export.measurements import CalibrationOptions
    from blockcache.export.pipeline import CompileOptions
    from blockcache.tools.commands.show import print_bundle

    options = CompileOptions(
        presets=tuple(PresetOptions.parse(text) for text in preset or ["dpm:20:0.5", "dpm:20"]),
        export=ExportOptions(precision=precision, outputs=2 if history else 1, hoist=hoist),
        calibration=CalibrationOptions(
            guidance_scale=guidance,
            profile=ProfileOptions(
                prompts=profile_prompts, seeds=profile_seeds, images_at_once=images_at_once
            ),
            alignment=AlignmentOptions(images=align_images),
        ),
        timings=None if timings is None else read_timings(timings),
        processor=None if gpu is None else data_sheet(gpu),
    )
    bundle = _compile(model, out, options, calibration, prompts, blocks)
    print_bundle(bundle, as_json=as_json)


def _compile(
    model: str,
    out: Path,
    options: CompileOptions,
    calibration: Path | None,
    prompts: Path | None,
    blocks: str,
) -> Bundle:
    """Load, encode and compile under a progress bar."""
    from blockcache.export.pipeline import compile_model
    from blockcache.tools.report.progress import StageProgress
    from blockcache.tools.sources.models import load_source
    from blockcache.tools.sources.prompts import calibration_for

    with StageProgress() as progress:
        progress("load", 0, 1)
        measured = any(made.calibrated for made in options.presets)
        # Profiles are measured in float32; the export converts the weights afterwards.
        dtype = "float32" if measured else options.export.precision
        source = load_source(model, dtype, blocks)
        encoded = calibration_for(model, calibration, prompts) if measured else None
        progress("load", 1, 1)
        return compile_model(source, out, options, encoded, progress)
