"""From prompt to picture: text, denoising and decoding apart, beside the same in PyTorch.

    python -m blockcache.tools.bench.prompt_to_picture BUNDLE [--preset dpm-20] [--rounds 5]

BUNDLE is of the demo model. Presets and PyTorch take turns on one prompt after another, so that no
text is in the cache. PyTorch is what a diffusers pipeline runs: MiniLM, the U-Net under diffusers'
scheduler with guidance, the decoder. The decoder does not shrink, so there are two speed-ups.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
import typer

from blockcache.runtime import Bundle, Pipeline
from blockcache.tools.demo import model as demo
from blockcache.tools.report.errors import one_line_errors
from blockcache.tools.report.tables import markdown_table

GUIDANCE = 3.0
TORCH = "PyTorch"
STEPS = 20
"""Of the scheduler in PyTorch."""


def main(
    bundle: Annotated[str, typer.Argument(help="A bundle of the demo model.")],
    preset: Annotated[
        list[str] | None, typer.Option(help="Its presets, the first is held against; repeatable.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Of each; the first is not counted.")] = 5,
    images: Annotated[int, typer.Option(min=1, help="Pictures a request.")] = 1,
) -> None:
    """Measure and print."""
    opened = Bundle.open(bundle)
    names = preset or list(opened.preset_names)
    contestants: dict[str, Callable[[list[str]], tuple[float, float, float]]] = {
        name: _ours(Pipeline.open(opened, preset=name)) for name in names
    }
    contestants[TORCH] = _theirs()
    spent: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for name, draw in contestants.items():
            spent[name].append(draw([f"noto emoji, {turn} {i} foxes" for i in range(images)]))
    medians = {
        name: [statistics.median(part) for part in zip(*times[1:], strict=True)]
        for name, times in spent.items()
    }
    base = medians[names[0]]
    rows = []
    for name, (text, denoising, decoding) in medians.items():
        total = text + denoising + decoding
        rows.append(
            [
                name,
                *(f"{ms:.1f}" for ms in (text, denoising, decoding, total)),
                f"{(text + decoding) / total:.1%}",
                f"{base[1] / denoising:.2f}x",
                f"{sum(base) / total:.2f}x",
            ]
        )
    titles = ["what runs", "text ms", "denoising ms", "decoding ms", "sum ms",
              "share of text and decoding", "denoising faster", "whole faster"]  # fmt: skip
    print(markdown_table(titles, rows))


def _ours(pipeline: Pipeline) -> Callable[[list[str]], tuple[float, float, float]]:
    """Milliseconds of the parts of a request by a bundle."""

    def draw(prompts: list[str]) -> tuple[float, float, float]:
        drawn = pipeline(prompts, seeds=range(len(prompts)), guidance_scale=GUIDANCE)
        return drawn.text_ms, drawn.record.total_ms, drawn.decode_ms

    return draw


def _theirs() -> Callable[[list[str]], tuple[float, float, float]]:
    """Milliseconds of the parts of a request in PyTorch."""
    unet, scheduler = demo.load_unet(), demo.load_scheduler()

    def draw(prompts: list[str]) -> tuple[float, float, float]:
        begin = time.perf_counter()
        states = torch.from_numpy(demo.prompt_embeddings([*[""] * len(prompts), *prompts]))
        middle = time.perf_counter()
        latents = _denoise(unet, scheduler, states, len(prompts))
        late = time.perf_counter()
        demo.decode(latents)
        end = time.perf_counter()
        return 1e3 * (middle - begin), 1e3 * (late - middle), 1e3 * (end - late)

    return draw


@torch.inference_mode()
def _denoise(unet: Any, scheduler: Any, states: torch.Tensor, images: int) -> np.ndarray:
    """The loop of a diffusers pipeline with guidance: float32 [N, 4, 16, 16]."""
    scheduler.set_timesteps(STEPS)
    size = unet.config.sample_size
    latents = torch.randn(images, 4, size, size) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        doubled = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        plain, prompted = unet(doubled, timestep, states, return_dict=False)[0].chunk(2)
        output = plain + GUIDANCE * (prompted - plain)
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    result: np.ndarray = latents.numpy()
    return result


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
