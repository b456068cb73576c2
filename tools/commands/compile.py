"""``blockcache compile``: a U-Net becomes a bundle."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockcache.tools.commands.options import AsJson

if TYPE_CHECKING:
    from collections.abc import Callable

    from blockcache.export import (
        Calibration,
        Compiled,
        CompileOptions,
        Parts,
        PresetOptions,
        Processor,
        SourceModel,
    )

DEFAULT_PRESETS = ("dpm:20:0.5", "dpm:20")
BLOCKS = ("transformers", "resnets")
PARTS = ("all", "unet")
PLOT = "presets.svg"
"""The plot that ends a compile, in the bundle's folder; no part of the bundle."""

Presets = Annotated[
    list[str] | None,
    typer.Option(
        help="SOLVER[-GRID]:STEPS[:POLICY[:ALIGNMENT]], repeatable. SOLVER: dpm, unipc, ddim, "
        "euler; with fresh noise at every step euler-a, dpm-sde, lcm; scheduler: see --scheduler. "
        "GRID: auto (measured: nearest to a converged run), karras, exponential, beta, lu, "
        "ays-sd15, ays-sdxl, linspace, leading, trailing; none: the scheduler's own. POLICY: "
        "x2 (twice as fast; steps, grid and reuse chosen together), ms250 (the same, in "
        "milliseconds an image); to compare: branch2 (branches of all steps reused), 0.5 "
        "(threshold of eq. 7), blocks1.5, blocksms250 (blocks alone reused; least predicted "
        "loss), c1.5 (least change), t1.5 (by threshold), every3, deepcache3, smooth0.1, "
        "FILE.json; none: uncached. ALIGNMENT: scale-shift, history, distil, history-distil; "
        "none: the policy's own (x2: history), else reuse as it is."
    ),
]
Recommended = Annotated[
    str | None,
    typer.Option(
        metavar="PRESET",
        help="What Session, run and show take when none is named; default the first that caches.",
    ),
]
CachedBlocks = Annotated[
    str, typer.Option(help="What may be cached: transformers (as the paper), or resnets.")
]
Hoist = Annotated[
    bool, typer.Option(help="Take what does not depend on the sample out of the loop.")
]
ExportedParts = Annotated[
    str,
    typer.Option(
        help="all: text encoders and autoencoder, too, so that the bundle draws from prompts; "
        "unet: the U-Net alone."
    ),
]
EngineTarget = Annotated[
    str | None,
    typer.Option(
        help="The GPU that 'blockcache build' will build for: a100, sm80, ...; sets the precision."
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="float32 (fp32) for ONNX Runtime on the CPU, bfloat16 (bf16) or float16 (fp16) for "
        "TensorRT. Default float32; with --target bfloat16."
    ),
]
BudgetTimings = Annotated[
    Path | None,
    typer.Option(help="Segment times that budgets count in (of bench --timings); default FLOPs."),
]
BudgetGpu = Annotated[
    str | None,
    typer.Option(help="A GPU to predict such times for, in half precision: a100, h100, ..."),
]


Scheduler = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|CLASS",
        help="What a preset such as scheduler:20 runs: a scheduler of diffusers, as a folder with "
        "scheduler_config.json or a class (HeunDiscreteScheduler); default the model's own. "
        "The preset is named for it, and may name a class itself: HeunDiscreteScheduler:20. "
        "Measured with it; runs in a diffusers pipeline, not in 'run'.",
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE[:SCALE]",
        help="A LoRA (.safetensors, as diffusers or kohya's scripts save it), merged into the "
        "weights; repeatable. The graphs stay those of the plain model.",
    ),
]
Like = Annotated[
    Path | None,
    typer.Option(
        metavar="BUNDLE",
        help="Take the presets of this bundle of the same U-Net as they are, measuring nothing: "
        "a session that has opened it can then swap its weights for the new ones.",
    ),
]
Variant = Annotated[
    str | None,
    typer.Option(
        help="Which of the model's weights: fp16, bf16, ema, ... Default those without a variant, "
        "else fp16, bf16 or fp32."
    ),
]


ExtraInputs = Annotated[
    str | None,
    typer.Option(
        metavar="KIND|NAME:CHANNELS,...",
        help="What a U-Net with more input channels reads in them: inpaint, instruct-pix2pix, "
        "depth2img, upscale, or names and channels (mask:1,masked_image_latents:4). Default what "
        "the pipeline's class says; without one, the number of channels.",
    ),
]


ControlNets = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FOLDER",
        help="A ControlNet (a diffusers folder or hub id) that runs with the U-Net, under the "
        "same schedule; repeatable: several add up.",
    ),
]
ControlImages = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FOLDER",
        help="Control pictures to measure with, one a prompt, in turn; once for each --controlnet.",
    ),
]


def compile_bundle(
    model: Annotated[str, typer.Argument(help="A diffusers folder, a hub id, or 'demo'.")],
    out: Annotated[Path, typer.Argument(help="The bundle's folder; resumed if it is there.")],
    preset: Presets = None,
    variant: Variant = None,
    lora: Loras = None,
    like: Like = None,
    extra_inputs: ExtraInputs = None,
    controlnet: ControlNets = None,
    control_images: ControlImages = None,
    recommend: Recommended = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale of later requests.")] = 5.0,
    target: EngineTarget = None,
    precision: Precision = None,
    scheduler: Scheduler = None,
    blocks: CachedBlocks = "transformers",
    hoist: Hoist = True,
    parts: ExportedParts = "all",
    clip_skip: Annotated[
        int | None, typer.Option(min=1, help="Leave out so many of CLIP's last layers.")
    ] = None,
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
    candidates: Annotated[
        int, typer.Option(min=1, help="Plans of an x or ms preset to try; more find better ones.")
    ] = 8,
    trial_images: Annotated[int, typer.Option(min=1, help="Images to try the best plans on.")] = 12,
    moves: Annotated[
        int, typer.Option(min=0, help="Changes to try on the best of these plans.")
    ] = 0,
    distil_iterations: Annotated[
        int, typer.Option(min=1, help="How long to train the alignments distil, history-distil.")
    ] = 40,
    timings: BudgetTimings = None,
    gpu: BudgetGpu = None,
    as_json: AsJson = False,
) -> None:
    """Profile a U-Net, derive schedules, and write a bundle, or add presets to one.

    Interrupt it at any time: the bundle that was there still opens, and the same command resumes.
    Stages whose inputs did not change are taken as they are.

    Example: blockcache compile stabilityai/stable-diffusion-2-1 sd21 --preset dpm:20:x2
    """
    from blockcache.export import PresetOptions, read_timings
    from blockcache.runtime import Bundle
    from blockcache.tools.commands.names import precision_for, warn_of_float32
    from blockcache.tools.sources.control import check_control, controlled
    from blockcache.tools.sources.models import load_parts_of, load_source
    from blockcache.tools.sources.prompts import calibration_for

    theirs = None if like is None else Bundle.open(like)
    wanted = preset or (() if theirs is not None else DEFAULT_PRESETS)
    presets = tuple(PresetOptions.parse(text) for text in wanted)
    if scheduler is not None:
        presets = _with_scheduler(presets, scheduler)
    recommended = None if recommend is None else PresetOptions.parse(recommend).name
    if theirs is not None and precision is None and target is None:
        precision = theirs.model.precision
    dtype = precision_for(precision, target)
    times = None if timings is None else read_timings(timings)
    processor = None if gpu is None else _processor(gpu)
    _check(model, out, blocks, parts, calibration, prompts)
    nets, pictures = tuple(controlnet or ()), tuple(control_images or ())
    measured = any(made.calibrated for made in presets)
    check_control(nets, pictures, needed=measured and calibration is None)
    if target is not None:
        warn_of_float32(dtype, target)

    from blockcache.export import (
        AlignmentOptions,
        CompileOptions,
        DistillationOptions,
        ExportOptions,
        Lora,
        MeasurementOptions,
        ProfileOptions,
        TrialOptions,
    )

    loras = tuple(Lora.parse(text) for text in lora or ())

    options = CompileOptions(
        presets=presets,
        recommended=recommended,
        like=theirs,
        processor=processor,
        timings=times,
        export=ExportOptions(precision=dtype, hoist=hoist),
        measurement=MeasurementOptions(
            guidance_scale=guidance,
            profile=ProfileOptions(
                prompts=profile_prompts, seeds=profile_seeds, images_at_once=images_at_once
            ),
            alignment=AlignmentOptions(images=align_images),
            distillation=DistillationOptions(iterations=distil_iterations),
            trials=TrialOptions(candidates=candidates, images=trial_images, moves=moves),
        ),
    )
    beside = (
        None if parts == "unet" else partial(load_parts_of, model, clip_skip, loras, extra_inputs)
    )
    load = partial(
        load_source,
        model,
        cached=blocks,
        variant=variant,
        loras=loras,
        extra_inputs=extra_inputs,
        controlnets=nets,
    )

    def encode(source: SourceModel) -> Calibration:
        encoded = calibration_for(model, calibration, prompts, loras)
        return controlled(encoded, source, pictures) if pictures else encoded

    made = _compile(load, out, options, encode, beside)
    _report(made, as_json=as_json)


def _with_scheduler(
    presets: tuple[PresetOptions, ...], scheduler: str
) -> tuple[PresetOptions, ...]:
    """The presets, those that run a scheduler of diffusers with the one that was named."""
    from blockcache.runtime import ConfigError

    def own(preset: PresetOptions) -> bool:
        return preset.solver == "scheduler" and preset.scheduler is None

    if not any(own(preset) for preset in presets):
        names = ", ".join(preset.name for preset in presets)
        raise ConfigError(
            f"--scheduler {scheduler}: expected a preset that runs it, such as "
            f"--preset scheduler:20:branch2, got {names}."
        )
    return tuple(
        replace(preset, scheduler=scheduler, name="") if own(preset) else preset
        for preset in presets
    )


def _processor(gpu: str) -> Processor:
    """The data sheet of a GPU."""
    from blockcache.export import gpu as data_sheet

    return data_sheet(gpu)


def _check(
    model: str,
    out: Path,
    blocks: str,
    parts: str,
    calibration: Path | None,
    prompts: Path | None,
) -> None:
    """Refuse what cannot work before torch is imported or anything is loaded."""
    from blockcache.export.measure.encoded_prompts import read_encoded_prompts
    from blockcache.runtime import ConfigError
    from blockcache.tools.commands.outputs import check_folder
    from blockcache.tools.sources.models import check_source
    from blockcache.tools.sources.prompts import read_prompts

    if blocks not in BLOCKS:
        raise ConfigError(f"Expected blocks of {' or '.join(BLOCKS)}, got {blocks!r}.")
    if parts not in PARTS:
        raise ConfigError(f"Expected parts of {' or '.join(PARTS)}, got {parts!r}.")
    check_source(model)
    if calibration is not None:
        read_encoded_prompts(calibration)
    if prompts is not None:
        read_prompts(prompts)
    check_folder(out)


def _compile(
    load: Callable[[str], SourceModel],
    out: Path,
    options: CompileOptions,
    encode: Callable[[SourceModel], Calibration],
    beside: Callable[[], Parts] | None,
) -> Compiled:
    """Load, encode and compile under a progress bar."""
    from blockcache.export import Parts, compile_model
    from blockcache.tools.report.progress import StageProgress

    with StageProgress() as progress:
        progress("load", 0, 1)
        measured = any(made.calibrated for made in options.presets)
        # Profiles are measured in float32; the export converts the weights afterwards.
        dtype = "float32" if measured else options.export.precision
        source = load(dtype)
        encoded = encode(source) if measured else None
        parts = Parts(parts=()) if beside is None else beside()
        progress("load", 1, 1)
        return compile_model(source, out, options, encoded, progress, parts)


def _report(made: Compiled, *, as_json: bool) -> None:
    """The bundle, what became of its presets, and these as a picture beside the manifest."""
    from blockcache.tools.report.bundle import bundle_facts, print_bundle
    from blockcache.tools.report.presets import plot_presets, preset_rows

    bundle = made.bundle
    changes = {
        "added": list(made.added),
        "replaced": list(made.replaced),
        "kept": list(made.kept),
        "removed": dict(made.removed),
    }
    if as_json:
        print(json.dumps({**bundle_facts(bundle), "changes": changes}, indent=1))
    else:
        print_bundle(bundle)
        named = [f"{word} {', '.join(names)}" for word, names in changes.items() if names]
        print("\n" + "; ".join(named))
    print(f"measured with {made.evaluations:,} evaluations of the U-Net", file=sys.stderr)
    for name, reason in made.removed.items():
        print(f"removed preset {name}: {reason}", file=sys.stderr)
    if made.unreadable:
        print(f"the earlier bundle was replaced: {made.unreadable}", file=sys.stderr)
    picture = bundle.folder / PLOT
    plot_presets(preset_rows(bundle), picture, f"{bundle.model.name}, {bundle.model.precision}")
    print(f"wrote {picture}", file=sys.stderr)
