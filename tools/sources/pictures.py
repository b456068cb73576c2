"""Pictures of files, as models and requests take them: in colour, as a mask, as depths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from blockcache.runtime.errors import ConfigError, MissingExtraError

TABLE = ".npy"
"""The suffix of depths that are not a picture."""


def read_picture(file: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """A picture as uint8 [H, W, 3], resized as the pipelines of diffusers do it.

    Args:
        file: of any kind that Pillow reads.
        size: height and width in pixels; default the file's own.

    Raises:
        ConfigError: no picture.
        MissingExtraError: Pillow is not installed.
    """
    with _opened(file) as image:
        coloured = image.convert("RGB")
        if size is not None:
            coloured = coloured.resize(size[::-1], _pillow().Resampling.LANCZOS)
        return np.asarray(coloured)


def read_mask(file: Path) -> np.ndarray:
    """A mask as uint8 [H, W]: what is white is drawn anew.

    Raises:
        ConfigError: no picture.
        MissingExtraError: Pillow is not installed.
    """
    with _opened(file) as image:
        return np.asarray(image.convert("L"))


def read_depths(file: Path, size: tuple[int, int]) -> np.ndarray:
    """Depths as float32 [h, w], near is large, resized bicubically as diffusers does it.

    Args:
        file: a grey picture of 8, 16 or 32 bits, or FILE.npy of two dimensions.
        size: of the latents.

    Raises:
        ConfigError: neither of both, or a table that does not hold finite numbers.
        MissingExtraError: Pillow is not installed.
    """
    if file.suffix == TABLE:
        image = _pillow().fromarray(_table(file))
        return np.asarray(image.resize(size[::-1], _pillow().Resampling.BICUBIC))
    with _opened(file) as image:
        return np.asarray(image.convert("F").resize(size[::-1], _pillow().Resampling.BICUBIC))


def _table(file: Path) -> np.ndarray:
    """float32 [h, w] of a file of numpy's."""
    try:
        values = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"Expected depths in {file}, got: {error}.") from error
    if values.ndim != 2 or values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise ConfigError(
            f"Expected depths as finite numbers [h, w] in {file}, got {values.dtype} "
            f"{list(values.shape)}."
        )
    return values.astype(np.float32)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A picture while it is read; what cannot be read is a ConfigError that names the file."""
    try:
        with _pillow().open(file) as image:
            yield image
    except OSError as error:  # what is no picture is one, too
        raise ConfigError(f"Expected a picture in {file}, got: {error}.") from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError.of("pillow", "cli", "Reading pictures") from error
    return Image
