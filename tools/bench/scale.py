"""Compile a U-Net of full size with random weights: time and peak memory of every stage.

    python -m blockcache.tools.bench.scale OUT --model sdxl --precision bfloat16
    python -m blockcache.tools.bench.scale OUT --model sd15 --check
    python -m blockcache.tools.bench.scale OUT --model sd15 --controlnets 1 --precision bfloat16
    python -m blockcache.tools.bench.scale OUT --model sd15 --parts    # text encoders and VAE, too
    python -m blockcache.tools.bench.scale OUT --model sdxl --parts --small    # these alone

Neither speed nor memory depends on the weights' values, so no checkpoint is needed. ``--check``
denoises the float32 bundle on the CPU by a made-up schedule and made-up alignment, and compares the
latents with PyTorch's. The bundle stays in OUT: ``blockcache bench`` and ``estimate`` take it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from blockcache.export import ExportOptions, Parts, SourceModel
from blockcache.runtime import (
    Bundle,
    ConfigError,
    Preset,
    Session,
    SolverConfig,
)
from blockcache.runtime.files import write_text
from blockcache.tools.bench.made_up import MADE_UP, add_preset, made_up
from blockcache.tools.bench.random_parts import random_parts
from blockcache.tools.bench.random_unet import CONFIGS, random_source
from blockcache.tools.bench.stage_meter import StageMeter, peak_bytes
from blockcache.tools.report.errors import one_line_errors


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    model: Annotated[str, typer.Option(help="sd15 or sdxl.")] = "sd15",
    precision: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "float32",
    steps: Annotated[
        list[int] | None, typer.Option(help="Of the made-up presets; repeatable. Default 2.")
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(help="One that measures nothing, such as ddim:20:quick:none; repeatable."),
    ] = None,
    hoist: Annotated[
        bool, typer.Option(help="Take what does not depend on the sample out of the loop.")
    ] = True,
    parts: Annotated[bool, typer.Option(help="The whole pipeline.")] = False,
    small: Annotated[
        bool, typer.Option("--small", help="A tiny U-Net, where the parts are what matters.")
    ] = False,
    controlnets: Annotated[
        int, typer.Option(min=0, help="So many ControlNets of its size with the U-Net.")
    ] = 0,
    check: Annotated[bool, typer.Option(help="Denoise on the CPU, compare with PyTorch.")] = False,
    figures: Annotated[Path | None, typer.Option(help="Also write the figures there.")] = None,
) -> None:
    """Compile a U-Net of full size with random weights, and print what it took."""
    from blockcache.tools.bench.published import published_rows
    from blockcache.tools.report.machine import machine_facts
    from blockcache.tools.report.tables import markdown_table

    if model not in CONFIGS:
        raise ConfigError(f"--model: expected {' or '.join(CONFIGS)}, got {model!r}.")
    meter = StageMeter()
    meter.enter("weights at random")
    if check and small:
        raise ConfigError("--check: expected a U-Net of full size, got --small.")
    if check and controlnets:
        raise ConfigError("--check: expected a U-Net alone, got --controlnets.")
    source = random_source(model, precision, small=small, controlnets=controlnets)
    export = ExportOptions(precision=precision, hoist=hoist)
    presets = [*(f"ddim:{count}" for count in steps or [2]), *(preset or ())]
    bundle = _compile(source, out, export, presets, random_parts(model) if parts else None, meter)
    del source
    gc.collect()
    found: dict[str, Any] = {
        "model": f"{model}, small U-Net" if small else model,
        "controlnets": controlnets,
        "precision": precision,
        "machine": machine_facts(),
        "weights_bytes": weights_bytes(bundle),
        "stages": [dataclasses.asdict(stage) for stage in meter.stages],
        "published": [] if small or controlnets else published_rows(bundle),
    }
    found["peak_over_weights"] = max(s.peak_bytes for s in meter.stages) / found["weights_bytes"]
    if check:
        found["check"] = check_against_torch(bundle, model, precision)
    rows = [[s.name, f"{s.seconds:.1f}", f"{s.peak_bytes / 1e9:.2f}"] for s in meter.stages]
    print(markdown_table([f"{model}, {precision}", "s", "peak GB"], rows))
    print(json.dumps({k: v for k, v in found.items() if k != "stages"}, indent=1))
    if figures is not None:
        write_text(figures, json.dumps(found, indent=1) + "\n")


def _compile(
    source: SourceModel,
    out: Path,
    export: ExportOptions,
    presets: list[str],
    parts: Parts | None,
    meter: StageMeter,
) -> Bundle:
    """The bundle with its presets, and for each uncached one a made-up one."""
    from blockcache.export import CompileOptions, PresetOptions, compile_model

    options = CompileOptions(
        presets=tuple(PresetOptions.parse(text) for text in presets),
        export=export,
    )
    bundle = compile_model(source, out, options, observer=meter.observe, parts=parts).bundle
    meter.enter("")
    for uncached in [p for p in bundle.presets.values() if p.schedule.recompute.all()]:
        bundle = add_preset(bundle, made_up(uncached))
    return bundle


def weights_bytes(bundle: Bundle) -> int:
    """Of the U-Net and of all parts."""
    return bundle.weights.bytes + sum(bundle.weights_of(p).bytes for p in bundle.manifest.parts)


def check_against_torch(bundle: Bundle, model: str, precision: str) -> dict[str, float]:
    """The made-up preset in the runtime and in PyTorch, one after the other to save memory."""
    name = next(name for name in bundle.preset_names if name.endswith(MADE_UP))
    rng = np.random.default_rng(0)
    sizes = dataclasses.replace(bundle.model.sizes, batch=1)
    conditions = [
        {c.name: rng.standard_normal(c.shape(sizes), np.float32) for c in bundle.model.conditions}
        for _ in range(2)
    ]
    with _timed() as opened:
        session = Session.open(bundle, preset=name, backend="ort", verify=False)
    noise = session.noise([0])
    positive, negative = (dict(side) for side in conditions)
    with _timed() as ran:
        result = session.denoise(
            noise,
            positive.pop("encoder_hidden_states"),
            negative.pop("encoder_hidden_states"),
            conditions=positive,
            negative_conditions=negative,
            seeds=[0],
        )
    preset, latents = session.preset, result.latents
    del session
    gc.collect()
    cuts = [block.cut for block in bundle.model.blocks if block.cut is not None]
    with _timed() as torch_ran:
        source = random_source(model, precision).cut_at(cuts)
        reference = _torch_latents(source, preset, noise, conditions)
    return {
        "relative_error": float(np.abs(latents - reference).max() / np.abs(reference).max()),
        "open_seconds": opened[0],
        "denoise_seconds": ran[0],
        "torch_seconds": torch_ran[0],
        "steps": preset.schedule.steps,
        "computed_fraction": result.record.computed_fraction,
        "peak_bytes": peak_bytes(),
    }


def _torch_latents(
    source: SourceModel, preset: Preset, noise: np.ndarray, conditions: list[dict[str, np.ndarray]]
) -> np.ndarray:
    """The oracle: float32 [N, C, H, W]."""
    import torch

    from blockcache.export import Calibration
    from blockcache.export.unet.cached_unet import CachedUNet, Denoiser
    from blockcache.export.unet.steps import TableSteps
    from blockcache.runtime.solvers.solver import solver_tables

    tables = solver_tables(SolverConfig.from_json(preset.solver))
    scale, start = preset.guidance_scale, torch.from_numpy(noise)
    picked = Calibration(*conditions).pick([0], guided=scale > 1)
    source.unet.eval()
    with CachedUNet(source) as cached:
        denoiser = Denoiser(cached, TableSteps(tables, seeds=[0]), picked, scale)
        latents = denoiser.denoise(start, preset.schedule, preset.alignment)
    result: np.ndarray = latents.numpy()
    return result


@contextlib.contextmanager
def _timed() -> Iterator[list[float]]:
    """A list that holds the seconds of the body once it is over."""
    seconds: list[float] = []
    begin = time.perf_counter()
    yield seconds
    seconds.append(time.perf_counter() - begin)


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
