"""Generated pictures as files: side by side, or as a captioned grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blockcache.runtime import MissingExtraError
from blockcache.runtime.files import replacing
from blockcache.tools.report.plots import pyplot, save_figure


def save_pictures(pictures: np.ndarray, file: Path) -> None:
    """uint8 [N, H, W, 3] side by side."""
    _save_image(_pillow().fromarray(np.concatenate(list(pictures), axis=1)), file)


def save_grid(rows: Sequence[tuple[str, np.ndarray]], columns: Sequence[str], file: Path) -> None:
    """A captioned grid: one row a run, one column a prompt.

    Args:
        rows: (caption, pictures uint8 [N, H, W, 3]).
        columns: N captions.
        file: PNG.
    """
    count = len(columns)
    height, width = rows[0][1].shape[1:3]
    size = (1.55 * count * width / height + 2.4, 1.75 * len(rows) + 0.3)
    figure, axes = pyplot().subplots(len(rows), count, figsize=size, squeeze=False)
    for row, (caption, pictures) in enumerate(rows):
        for column in range(count):
            cell = axes[row][column]
            cell.imshow(pictures[column], interpolation="lanczos")
            cell.set_xticks([])
            cell.set_yticks([])
            for spine in cell.spines.values():
                spine.set_visible(False)
            if row == 0:
                cell.set_title(columns[column].replace(", ", ",\n"), fontsize=8)
        axes[row][0].set_ylabel(
            caption, rotation=0, ha="right", va="center", fontsize=9, labelpad=8
        )
    figure.tight_layout()
    save_figure(figure, file)


def beside_differences(pictures: np.ndarray, reference: np.ndarray, gain: float) -> np.ndarray:
    """Each picture, and right of it how far it is from another one: uint8 [N, H, 2 W, 3].

    White is no difference; a mean difference of the channels by 255 / ``gain`` or more is black.
    """
    apart = np.abs(pictures.astype(np.float64) - reference).mean(axis=3, keepdims=True)
    shade = (255 - gain * apart).clip(0, 255).astype(np.uint8)
    return np.concatenate([pictures, np.repeat(shade, 3, axis=3)], axis=2)


def _save_image(image: Any, file: Path) -> None:
    with replacing(file) as partial:
        image.save(partial, format="PNG")


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError.of("pillow", "cli", "Writing pictures") from error
    return Image
