"""Control pictures beside the prompts that a model is measured with."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from blockcache.export.measure.calibration import Calibration, check_calibration
from blockcache.export.measure.control_images import (
    control_size,
    with_control_images,
)
from blockcache.runtime import ConfigError


@pytest.fixture
def prompts(tiny_models, conditions_of):
    """A model with two ControlNets, and three encoded prompts."""
    model = tiny_models("sdxl-controlled")
    given = {n: v for n, v in conditions_of(model, 3).items() if not n.startswith("control")}
    negative = {n: v[:1] for n, v in given.items()}
    return model, Calibration(given, negative)


def picture(value, size=(64, 64)):
    return np.full((*size, 3), value, np.uint8)


def test_prompts_get_the_pictures_in_turn(prompts):
    model, calibration = prompts
    assert control_size(model, 0) == (64, 64), "four times the latents' 16"
    made = with_control_images(calibration, model, [[picture(0), picture(255)], [picture(51)]])
    check_calibration(model, made, guided=True)
    assert made.positive["control_image"].shape == (3, 3, 64, 64)
    assert made.positive["control_image"][:, 0, 0, 0].tolist() == [0, 1, 0]
    assert np.unique(made.positive["control_image_2"]).tolist() == [np.float32(0.2)]
    assert made.positive["control_scale_2"][:, 0].tolist() == [1]
    for name in ("control_image", "control_scale"):
        assert made.unconditional(name) is made.positive[name]


def test_pictures_are_needed_for_every_controlnet(prompts):
    model, calibration = prompts
    for given, told in (([], r"\[\]"), ([[picture(0)], []], r"\[1, 0\]")):
        with pytest.raises(ConfigError, match=f"each of 2 ControlNets .*; got {told}. Give a fold"):
            with_control_images(calibration, model, given)
    with pytest.raises(ConfigError, match="expected control_image, which 'tiny-sdxl-controlled'"):
        check_calibration(model, calibration, guided=True)


@pytest.mark.parametrize("wrong", [picture(0, (64, 32)), np.zeros((64, 64, 3))])
def test_pictures_of_another_size_or_type_are_refused(prompts, wrong):
    model, calibration = prompts
    with pytest.raises(ConfigError, match=r"Expected control pictures uint8 \[64, 64, 3\], got"):
        with_control_images(calibration, model, [[picture(0)], [wrong]])
