"""Control pictures for calibration: what ControlNets see while a model is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from blockcache.export.measure.calibration import Calibration
from blockcache.export.unet.model import SourceModel
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import control_names, default_condition


def control_size(model: SourceModel, index: int) -> tuple[int, int]:
    """Height and width in pixels of the pictures of a ControlNet, at the model's own size."""
    (picture,) = (c for c in model.conditions if c.name == control_names(index)[0])
    _, _, height, width = picture.sized(model.sizes())
    return height, width


def with_control_images(
    calibration: Calibration, model: SourceModel, images: Sequence[Sequence[np.ndarray]]
) -> Calibration:
    """Encoded prompts with control pictures beside them, which act fully and at every step.

    Where there are fewer pictures than prompts, they are taken again in turn; further ones are
    left out.

    Args:
        calibration: the prompts.
        model: with its ControlNets.
        images: per ControlNet one picture or more, uint8 [H, W, 3], as large as ``control_size``.

    Raises:
        ConfigError: none for a ControlNet, or pictures of another size.
    """
    nets = len(model.controlnets)
    if len(images) != nets or not all(map(len, images)):
        raise ConfigError(
            f"Expected control pictures for each of {nets} ControlNets of {model.name!r}, which is "
            f"measured with them; got {[len(each) for each in images]}. Give a folder of pictures "
            f"for each, in the order of the ControlNets: --control-images FOLDER."
        )
    positive = dict(calibration.positive)
    for index, given in enumerate(images):
        for each in given:
            _check_picture(each, (*control_size(model, index), 3))
        taken = [given[prompt % len(given)] for prompt in range(calibration.prompts)]
        stacked = np.stack(taken).transpose(0, 3, 1, 2).astype(np.float32) / 255
        picture, scale = control_names(index)
        acting = default_condition(scale)
        assert acting is not None
        positive |= {picture: stacked, scale: acting}
    return replace(calibration, positive=positive)


def _check_picture(picture: np.ndarray, shape: tuple[int, ...]) -> None:
    if picture.shape != shape or picture.dtype != np.uint8:
        raise ConfigError(
            f"Expected control pictures uint8 {list(shape)}, got {picture.dtype} "
            f"{list(picture.shape)}. Resize them to the model's own size."
        )
