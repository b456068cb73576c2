"""What the step interface and the diffusers drop-in cost beside ``Session.denoise``.

    python -m blockcache.tools.bench.drop_in BUNDLE [--preset dpm-20] [--rounds 9]

BUNDLE is of the demo model. Two figures, each a median over rounds of one run:

- the host's time for ``predict`` on engines that do nothing, per segment that is launched;
- a diffusers pipeline with the bundle attached, over ``Session.denoise``, which take turns. The
  pipeline does its own guidance and has its own loop; it gets encoded prompts and gives latents.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated, Any

import numpy as np
import torch
import typer

from blockcache.runtime import Bundle, Session
from blockcache.runtime.drop_in import attach
from blockcache.tools.report.errors import one_line_errors
from blockcache.tools.sources.models import DEMO, load_source


def main(
    bundle: Annotated[str, typer.Argument(help="A bundle of the demo model.")],
    preset: Annotated[str, typer.Option(help="One of its presets.")] = "dpm-20",
    rounds: Annotated[int, typer.Option(min=3, help="Of each; the first is not counted.")] = 9,
) -> None:
    """Measure and print."""
    opened = Bundle.open(bundle)
    print(f"predict on empty engines: {predict_us(opened, preset, rounds):.2f} us a segment")
    pipeline, denoise = seconds(opened, preset, rounds)
    ratios = [ours / theirs for ours, theirs in zip(pipeline, denoise, strict=True)]
    print(
        f"pipeline over denoise: {statistics.median(ratios):.3f} ({min(ratios):.3f} to "
        f"{max(ratios):.3f}); denoise {statistics.median(denoise):.3f} s"
    )


def predict_us(bundle: Bundle, preset: str, rounds: int) -> float:
    """Microseconds of the host for each segment that a run of ``predict`` launches."""
    found = []
    with Session.open(bundle, preset=preset, backend="empty") as session:
        prompt, latents = _prompt(bundle), np.repeat(session.noise([0]), 2, axis=0)
        for _ in range(rounds):
            with session.begin(prompt) as request:
                begin = time.perf_counter()
                for step in range(session.steps):
                    request.predict(step, latents)
                spent = time.perf_counter() - begin
            found.append(1e6 * spent / float(request.record.ran.sum()))
    return statistics.median(found[1:])


def seconds(bundle: Bundle, preset: str, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of the pipeline and of ``denoise``, the same request, in turns."""
    pipe = _pipeline()
    unet = attach(pipe, bundle, preset=preset)
    prompt, session = _prompt(bundle), unet.session
    negative, positive = (torch.from_numpy(half) for half in np.split(prompt, 2))
    noise, scale = session.noise([0]), 3.0
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        begin = time.perf_counter()
        pipe(
            prompt_embeds=positive, negative_prompt_embeds=negative, guidance_scale=scale,
            latents=torch.from_numpy(noise), output_type="latent",
            num_inference_steps=session.steps,
        )  # fmt: skip
        spent[0].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        session.denoise(noise, prompt[1:], prompt[:1], guidance_scale=scale, seeds=[0])
        spent[1].append(time.perf_counter() - begin)
    return spent[0][1:], spent[1][1:]


def _prompt(bundle: Bundle) -> np.ndarray:
    """Made-up prompt states, unconditional and conditional: float32 [2, tokens, D]."""
    (spec,) = (s for s in bundle.model.conditions if s.name == "encoder_hidden_states")
    shape = spec.shape(bundle.model.sizes.for_images(1, guided=True))
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _pipeline() -> Any:
    """A pipeline around the demo model's U-Net, without text encoder; its VAE is not called."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    source = load_source(DEMO)
    levels = len(source.unet.config.block_out_channels)
    vae = AutoencoderKL(
        block_out_channels=(32,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
    )
    config = {**source.scheduler, "clip_sample": False, "steps_offset": 1}
    pipe = StableDiffusionPipeline(
        vae=vae,
        unet=source.unet,
        scheduler=DDIMScheduler.from_config(config),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
