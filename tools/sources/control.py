"""Control pictures of a folder, as large as a model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from blockcache.runtime.errors import ConfigError
from blockcache.tools.sources.pictures import read_picture

if TYPE_CHECKING:
    from blockcache.export import Calibration, SourceModel

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def control_files(folder: Path) -> list[Path]:
    """The pictures of a folder, by name.

    Raises:
        ConfigError: no such folder, or none in it.
    """
    if not folder.is_dir():
        raise ConfigError(f"Expected a folder of control pictures at {folder}, found none.")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ConfigError(f"Expected pictures ({', '.join(SUFFIXES)}) in {folder}, found none.")
    return found


def check_control(controlnets: Sequence[str], folders: Sequence[Path], *, needed: bool) -> None:
    """Raise ConfigError unless every ControlNet has its folder of pictures.

    Args:
        controlnets: folders or hub ids.
        folders: of pictures.
        needed: whether something is measured that needs them.
    """
    from blockcache.export.unet.hub import check_name

    for each in controlnets:
        check_name(each)
    for folder in folders:
        control_files(folder)
    if len(folders) != len(controlnets) and (folders or needed):
        raise ConfigError(
            f"Expected --control-images FOLDER once for each --controlnet, in their order: "
            f"{len(controlnets)}; got {len(folders)}. The model is measured with these pictures."
        )


def controlled(
    calibration: Calibration, model: SourceModel, folders: Sequence[Path]
) -> Calibration:
    """Encoded prompts with the pictures of a folder for each ControlNet of the model."""
    from blockcache.export import control_size, with_control_images

    images = [
        read_control_images(folder, control_size(model, index))
        for index, folder in enumerate(folders)
    ]
    return with_control_images(calibration, model, images)


def read_control_images(folder: Path, size: tuple[int, int]) -> list[np.ndarray]:
    """The pictures of a folder, uint8 [H, W, 3], of one size.

    Args:
        folder: of ``control_files``.
        size: height and width in pixels.

    Raises:
        ConfigError: a file that is no picture.
        MissingExtraError: Pillow is not installed.
    """
    return [read_picture(file, size) for file in control_files(folder)]
