"""What a ControlNet costs beside its U-Net, and what one schedule over both saves of that.

    python -m blockcache.tools.research.control_pair OUT
    python -m blockcache.tools.research.control_pair OUT --preset dpm:20:branch2:history

A tiny U-Net and a tiny ControlNet with random weights are compiled together, measured under random
control pictures, and denoise pictures that measured nothing. The FLOPs of the ControlNet are those
of both together less those of the U-Net alone under the same schedule, segment by segment. The
distance is the relative L2 of the final latents to the same steps without reuse, mean over images.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from blockcache.export import Calibration, SourceModel
from blockcache.runtime import Bundle, Preset, Schedule, Session
from blockcache.runtime.plan import Segment
from blockcache.runtime.run_table import flops_run
from blockcache.tools.report.errors import one_line_errors

STEPS = 20
PRESETS = ("dpm:20:blocks1.5:history", "dpm:20:branch1.5:history", "dpm:20:branch2:history")
PROMPT = "encoder_hidden_states"
GUIDANCE = 5.0


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the bundle and of the U-Net's segments.")],
    preset: Annotated[
        list[str] | None, typer.Option(help=f"Of {STEPS} steps of dpm; repeatable.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="To draw and to compare.")] = 8,
) -> None:
    """Compile a random pair, and print what its ControlNet costs and what caching saves."""
    from blockcache.export import CompileOptions, MeasurementOptions, PresetOptions, compile_model
    from blockcache.tools.bench.random_unet import random_source
    from blockcache.tools.report.tables import markdown_table

    pair = replace(random_source("sd15", "float32", small=True, controlnets=1), tokens=8)
    pair.unet.register_to_config(sample_size=16)
    made = [PresetOptions.parse(text) for text in preset or PRESETS]
    options = CompileOptions(
        presets=(*made, PresetOptions.parse(f"dpm:{STEPS}")),
        measurement=MeasurementOptions(guidance_scale=GUIDANCE),
    )
    bundle = compile_model(pair, out / "pair", options, random_prompts(pair, 16, seed=0)).bundle
    alone = segments_alone(pair, bundle, out / "unet")
    uncached = bundle.preset(f"dpm-{STEPS}")
    plain = draw(bundle, uncached.name, images)
    full = spent(bundle, alone, uncached)
    rows = []
    for name in bundle.preset_names:
        both, unet = spent(bundle, alone, bundle.preset(name))
        control, all_of_it = both - unet, full[0] - full[1]
        rows.append(
            [
                name,
                f"{STEPS * both / full[0]:.2f}",
                f"{STEPS * (unet + all_of_it) / full[0]:.2f}",
                f"{control / both:.3f}",
                f"{control / all_of_it:.3f}",
                f"{distance(draw(bundle, name, images), plain):.4f}",
            ]
        )
    titles = [
        "preset",
        "FLOPs, in steps",
        "with the ControlNet in full",
        "ControlNet's share",
        "of it computed",
        "distance",
    ]
    print(markdown_table(titles, rows))
    print(
        f"without the ControlNet: {distance(draw(bundle, uncached.name, images, 0.0), plain):.4f}"
    )


def random_prompts(model: SourceModel, count: int, seed: int) -> Calibration:
    """Random conditions, with control pictures."""
    from blockcache.export import control_size, with_control_images

    rng = np.random.default_rng(seed)
    sides = [
        {PROMPT: rng.standard_normal((rows, model.tokens, 768)).astype(np.float32)}
        for rows in (count, 1)
    ]
    shape = (*control_size(model, 0), 3)
    pictures = [rng.integers(0, 256, shape, np.uint8) for _ in range(count)]
    return with_control_images(Calibration(*sides), model, [pictures])


def segments_alone(pair: SourceModel, bundle: Bundle, folder: Path) -> tuple[Segment, ...]:
    """The segments of the U-Net without its ControlNet, cut at the same places."""
    from blockcache.export import ExportOptions
    from blockcache.export.graph.to_onnx import export_segments
    from blockcache.export.unet.model import describe

    cuts = tuple(block.cut for block in bundle.model.blocks if block.cut is not None)
    unet = replace(describe(pair.unet, name="unet"), tokens=pair.tokens)
    return export_segments(unet, folder, ExportOptions(outputs=bundle.model.outputs, cuts=cuts))


def spent(bundle: Bundle, alone: tuple[Segment, ...], preset: Preset) -> tuple[float, float]:
    """FLOPs of a loop, with the ControlNet and without it."""
    own = [not block.path.startswith("controlnet.") for block in bundle.model.blocks]
    without = Schedule(preset.schedule.recompute[:, own])
    both = flops_run(bundle.segments, preset.schedule).sum()
    return float(both), float(flops_run(alone, without).sum())


def draw(bundle: Bundle, preset: str, images: int, scale: float = 1.0) -> np.ndarray:
    """Final latents [N, C, H, W] of random requests that calibrated nothing."""
    session = Session.open(bundle, preset=preset, verify=False)
    rng = np.random.default_rng(1)
    sizes = replace(bundle.model.sizes, batch=images)
    shapes = {spec.name: spec.shape(sizes) for spec in bundle.model.conditions}
    prompts = [rng.standard_normal(shapes[PROMPT]).astype(np.float32) for _ in range(2)]
    control = {
        "control_image": rng.random(shapes["control_image"], np.float32),
        "control_scale": session.control_scale(scale),
    }
    noise = session.noise(range(images))
    return session.denoise(noise, *prompts, conditions=control, guidance_scale=GUIDANCE).latents


def distance(latents: np.ndarray, reference: np.ndarray) -> float:
    """Relative L2, mean over images."""
    axes = tuple(range(1, latents.ndim))
    apart = np.sqrt(np.square(latents - reference).sum(axes))
    return float((apart / np.sqrt(np.square(reference).sum(axes))).mean())


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
