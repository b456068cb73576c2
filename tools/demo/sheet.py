"""The contact sheet: every concept in every style, from a few seeds, labelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from blockcache.runtime.files import replacing
from blockcache.tools.demo import model
from blockcache.tools.demo.concepts import caption
from blockcache.tools.demo.prompts import EMPTY
from blockcache.tools.demo.sample import SampleOptions, initial_noise, sample

CELL = 112  # pixels a picture takes on the sheet
GAP = 6
LABEL_WIDTH = 84
LABEL_HEIGHT = 34
INK = (60, 60, 60)


def draw_pictures(
    folder: Path, concepts: Sequence[str], styles: Sequence[str], options: SampleOptions
) -> np.ndarray:
    """All pairs from one seed: uint8 [len(styles), len(concepts), 3, H, W]."""
    prompts = [caption(style, words) for style in styles for words in concepts]
    states = torch.from_numpy(model.prompt_embeddings([*prompts, EMPTY]))
    unet = model.load_unet(folder)
    noise = initial_noise(len(prompts), unet.config["sample_size"], options.seed)
    latents = sample(unet, model.load_scheduler(folder), states[:-1], states[-1], noise, options)
    with torch.inference_mode():
        images = model.to_uint8(model.load_autoencoder(folder).decode(latents).numpy())
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
