"""Export and build a U-Net of full size with random weights: time, memory, kernels, split tax.

    python -m blockcache.tools.bench.full_size OUT --model sd15 --target sm80

Speed and size of engines do not depend on the weights' values, so no checkpoint is needed. Writes
the bundle to OUT and the figures to OUT/full_size.json.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockcache.runtime.files import write_text

if TYPE_CHECKING:
    from blockcache.export.unet.model import SourceModel

CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {  # stable-diffusion-v1-5: 860 M parameters, 512 x 512
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {  # stable-diffusion-xl-base-1.0: 2.6 B parameters, 1024 x 1024
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    },
}

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    model: Annotated[str, typer.Option(help=f"One of {sorted(CONFIGS)}.")] = "sd15",
    precision: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    target: Annotated[str, typer.Option(help="As for blockcache build.")] = "sm80",
    max_batch: Annotated[int, typer.Option(help="Largest engine batch; the usual one is 2.")] = 8,
    whole: Annotated[bool, typer.Option(help="Also the uncut model, for the split tax.")] = True,
    jobs: Annotated[int, typer.Option(help="Engines built at a time.")] = 1,
) -> None:
    """Export and build a U-Net of full size with random weights, and print what it took."""
    from rich.console import Console

    from blockcache.export.engines.build import BuildOptions, ShapeOptions, build_engines
    from blockcache.export.engines.report import report_table
    from blockcache.export.engines.targets import Target
    from blockcache.runtime.bundle import Bundle

    begin = time.perf_counter()
    _export(out, model, precision)
    exported_s, exported_rss = time.perf_counter() - begin, _peak_rss_bytes()
    options = BuildOptions(shapes=ShapeOptions(max_batch=max_batch), whole=whole, jobs=jobs)
    report = build_engines(Bundle.open(out, verify=False), Target.parse(target), options)
    figures = {
        "model": model,
        "export_seconds": round(exported_s, 1),
        "export_peak_rss_bytes": exported_rss,
        **report.to_json(),
    }
    write_text(out / "full_size.json", json.dumps(figures, indent=1) + "\n")
    Console(width=100).print(report_table(report))
    print(f"export: {exported_s:.1f} s, peak memory {exported_rss / 1e9:.1f} GB")


def random_source(model: str, precision: str) -> SourceModel:
    """The U-Net of a config in ``precision`` from the start: float32 would double the memory."""
    import torch
    from diffusers import UNet2DConditionModel

    from blockcache.export.unet.model import TORCH_DTYPES, describe

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(TORCH_DTYPES[precision])
    try:
        unet = UNet2DConditionModel(**CONFIGS[model])
    finally:
        torch.set_default_dtype(default)
    return describe(unet, name=model, scheduler=SCHEDULER)


def _export(out: Path, model: str, precision: str) -> None:
    """The bundle of random weights, unless it is there."""
    from blockcache.export.choose.preset import PresetOptions
    from blockcache.export.graph.to_onnx import ExportOptions
    from blockcache.export.pipeline import CompileOptions, compile_model

    if (out / "manifest.json").is_file():
        return
    options = CompileOptions(
        presets=(PresetOptions.parse("dpm:20"),), export=ExportOptions(precision=precision)
    )
    compile_model(random_source(model, precision), out, options)


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    typer.run(main)
