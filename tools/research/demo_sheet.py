"""The demo model's contact sheet: every concept in every style, from a few seeds, labelled.

python -m blockcache.tools.research.demo_sheet [--model FOLDER] [--out FILE]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw, ImageFont

from blockcache.runtime.files import replacing
from blockcache.tools.demo import model as demo_model
from blockcache.tools.demo.concepts import caption
from blockcache.tools.demo.prompts import EMPTY, SHEET_CONCEPTS, STYLES
from blockcache.tools.report.errors import one_line_errors
from blockcache.tools.research.draw import SampleOptions, initial_noise, sample

CELL = 112  # pixels a picture takes on the sheet
GAP = 6
LABEL_WIDTH = 84
LABEL_HEIGHT = 34
INK = (60, 60, 60)
SEEDS = (1, 2)


def main(
    model: Annotated[
        Path, typer.Option(help="The model folder in diffusers format.")
    ] = demo_model.MODEL_DIR,
    out: Annotated[Path, typer.Option(help="The sheet, a PNG.")] = (
        demo_model.RESULTS_DIR / "samples.png"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is none.")] = 3.0,
) -> None:
    """Draw the contact sheet of a demo model."""
    options = SampleOptions(steps=steps, guidance=guidance)
    write(model, out, SHEET_CONCEPTS, STYLES, SEEDS, options)
    typer.echo(f"wrote {out}")


def draw_pictures(
    folder: Path, concepts: Sequence[str], styles: Sequence[str], options: SampleOptions
) -> np.ndarray:
    """All pairs from one seed: uint8 [len(styles), len(concepts), 3, H, W]."""
    prompts = [caption(style, words) for style in styles for words in concepts]
    states = torch.from_numpy(demo_model.prompt_embeddings([*prompts, EMPTY]))
    unet = demo_model.load_unet(folder)
    noise = initial_noise(len(prompts), unet.config["sample_size"], options.seed)
    scheduler = demo_model.load_scheduler(folder)
    latents = sample(unet, scheduler, states[:-1], states[-1], noise, options)
    with torch.inference_mode():
        images = demo_model.to_uint8(demo_model.load_autoencoder(folder).decode(latents).numpy())
    return images.reshape(len(styles), len(concepts), *images.shape[1:])


def compose(rows: Sequence[tuple[str, np.ndarray]], concepts: Sequence[str]) -> Image.Image:
    """One labelled row per (label, uint8 [len(concepts), 3, H, W])."""
    width = LABEL_WIDTH + len(concepts) * (CELL + GAP)
    sheet = Image.new("RGB", (width, LABEL_HEIGHT + len(rows) * (CELL + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for column, words in enumerate(concepts):
        x = LABEL_WIDTH + column * (CELL + GAP) + CELL / 2
        pen.text((x, LABEL_HEIGHT / 2), _wrap(words), INK, font, anchor="mm", align="center")
    for row, (label, images) in enumerate(rows):
        y = LABEL_HEIGHT + row * (CELL + GAP)
        pen.text((8, y + CELL / 2), label, INK, font, anchor="lm")
        for column, image in enumerate(images):
            picture = Image.fromarray(image.transpose(1, 2, 0)).resize((CELL, CELL), Image.BICUBIC)
            sheet.paste(picture, (LABEL_WIDTH + column * (CELL + GAP), y))
    return sheet


def _wrap(words: str) -> str:
    parts = words.split()
    if len(words) < 16:
        return words
    half = (len(parts) + 1) // 2
    return " ".join(parts[:half]) + "\n" + " ".join(parts[half:])


def write(
    folder: Path,
    path: Path,
    concepts: Sequence[str],
    styles: Sequence[str],
    seeds: Sequence[int],
    options: SampleOptions,
) -> None:
    """Draw and store the sheet: a row per style and seed."""
    drawn = {
        seed: draw_pictures(folder, concepts, styles, replace(options, seed=seed)) for seed in seeds
    }
    rows = [
        (f"{style}\nseed {seed}", drawn[seed][index])
        for index, style in enumerate(styles)
        for seed in seeds
    ]
    write_png(compose(rows, concepts), path)


def write_png(image: Image.Image, path: Path) -> None:
    """Store a picture as a small PNG."""
    with replacing(path) as file:
        image.quantize(256).save(file, "PNG", optimize=True)


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
