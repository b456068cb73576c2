"""The pictures: fetch the npm packages, render their SVGs on white, keep captions beside them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np

from blockcache.runtime.errors import ConfigError
from blockcache.runtime.files import replacing, write_text
from blockcache.tools.demo.concepts import Concept, caption, concept, is_held_out
from blockcache.tools.demo.config import DataConfig, ImageSet

SUPERSAMPLING = 2  # rendered at this multiple of the final size, then averaged


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What is known about one picture."""

    style: str
    words: str
    category: str
    caption: str
    held_out: bool
    weight: float  # relative frequency in training


@dataclass(frozen=True, kw_only=True)
class Icon:
    """One SVG of a set, with its view box already squared."""

    picture: Picture
    svg: str


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """All pictures of the chosen sets."""

    images: np.ndarray  # uint8 [N, 3, H, W]
    pictures: list[Picture]

    def training_weights(self) -> np.ndarray:
        """Sampling weights with the held-out pictures at zero: float64 [N]."""
        return np.array([0.0 if p.held_out else p.weight for p in self.pictures])


def fetch(image_set: ImageSet, folder: Path) -> Path:
    """Download the set's npm package (once); gives the path of the archive."""
    pattern = f"iconify-json-{image_set.package}-[0-9]*.tgz"
    found = sorted(folder.glob(pattern))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"@iconify-json/{image_set.package}"
        try:
            subprocess.run(
                ["npm", "pack", "--silent", name], cwd=folder, check=True, stdout=subprocess.DEVNULL
            )
        except FileNotFoundError as error:
            raise ConfigError(
                f"Expected the npm command to fetch {name}, found none. Install Node.js."
            ) from error
        found = sorted(folder.glob(pattern))
    return found[-1]


def read_member(archive: Path, name: str) -> Any:
    """One JSON file of an npm package's archive."""
    with tarfile.open(archive) as tar:
        member = tar.extractfile(f"package/{name}")
        if member is None:
            raise ConfigError(f"Expected {name} in {archive}, found none. Delete that file.")
        return json.load(member)


def categories(archives: Sequence[Path]) -> dict[str, str]:
    """Unicode's category of every icon key, over all sets."""
    table: dict[str, str] = {}
    for archive in archives:
        for category, keys in read_member(archive, "metadata.json")["categories"].items():
            table.update(dict.fromkeys(keys, category))
    return table


def icons(
    image_set: ImageSet, archive: Path, table: dict[str, str], config: DataConfig
) -> Iterator[Icon]:
    """The icons of one set that the model learns, in the order of their keys."""
    content = read_member(archive, "icons.json")
    for key, icon in sorted(content["icons"].items()):
        found = None if icon.get("hidden") else concept(key, table.get(key))
        if found is None or (config.small_world and not (found.everyday or found.simple)):
            continue
        style = image_set.word
        yield Icon(
            picture=Picture(
                style=style,
                words=found.words,
                category=found.category,
                caption=caption(style, found.words),
                held_out=not found.everyday
                and is_held_out(style, found.words, config.held_out_percent),
                weight=sampling_weight(found, config),
            ),
            svg=square_svg(icon, content),
        )


def sampling_weight(found: Concept, config: DataConfig) -> float:
    """How often training shows the concept, relative to an ordinary one."""
    if found.everyday:
        return config.everyday_weight
    return config.flag_weight if found.category == "Flags" else 1.0


def square_svg(icon: dict[str, Any], content: dict[str, Any]) -> str:
    """A complete SVG document around an icon's body, centred in a square."""
    width = icon.get("width", content.get("width", 16))
    height = icon.get("height", content.get("height", 16))
    side = max(width, height)
    left = icon.get("left", 0) - (side - width) / 2
    top = icon.get("top", 0) - (side - height) / 2
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {side} {side}" width="{side}" height="{side}">{icon["body"]}</svg>'
    )


def render(svg: str, pixels: int) -> np.ndarray:
    """An SVG document on white: uint8 [3, pixels, pixels]."""
    import resvg_py
    from PIL import Image

    size = SUPERSAMPLING * pixels
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    rgba = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"), np.float32)
    alpha = rgba[..., 3:] / 255
    white = rgba[..., :3] * alpha + 255 * (1 - alpha)
    blocks = white.reshape(pixels, SUPERSAMPLING, pixels, SUPERSAMPLING, 3)
    return (blocks.mean((1, 3)) + 0.5).astype(np.uint8).transpose(2, 0, 1)


def _render_job(job: tuple[str, int]) -> np.ndarray:
    return render(*job)


def build(config: DataConfig, work: Path) -> Dataset:
    """Fetch and render all sets, and store the result under `work`."""
    archives = [fetch(image_set, work / "packages") for image_set in config.sets]
    table = categories(archives)
    found = [
        icon
        for image_set, archive in zip(config.sets, archives, strict=True)
        for icon in icons(image_set, archive, table, config)
    ]
    with Pool(os.cpu_count()) as pool:
        images = pool.map(_render_job, [(i.svg, config.pixels) for i in found], chunksize=32)
    dataset = Dataset(images=np.stack(images), pictures=[i.picture for i in found])
    save(dataset, work)
    return dataset


def save(dataset: Dataset, work: Path) -> None:
    """Write images.npy and pictures.json."""
    with replacing(work / "images.npy") as file:
        np.save(file, dataset.images, allow_pickle=False)
    listed = json.dumps([asdict(p) for p in dataset.pictures], indent=0)
    write_text(work / "pictures.json", listed)


def load(work: Path) -> Dataset:
    """Read what `build` stored.

    Raises:
        ConfigError: `build` has not run yet.
    """
    if not (work / "pictures.json").exists():
        raise ConfigError(
            f"Expected pictures.json in {work}, found none. Run the command data first."
        )
    listed = json.loads((work / "pictures.json").read_text())
    return Dataset(
        images=np.load(work / "images.npy", allow_pickle=False),
        pictures=[Picture(**entry) for entry in listed],
    )
