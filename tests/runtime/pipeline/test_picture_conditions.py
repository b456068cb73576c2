"""Masks and depth maps as they are given, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from blockcache.runtime import InputError
from blockcache.runtime.pipeline.picture_conditions import (
    as_depths,
    as_masks,
    upscale_conditions,
)

MASK = np.array([[0, 127, 128, 255]], np.uint8)
MARKED = [[False, False, True, True]]


@pytest.mark.parametrize(
    "mask",
    [MASK, MASK[None], [MASK], MASK >= 128, np.array([[0, 0.499, 0.5, 1]], np.float32)],
    ids=["uint8", "several", "list", "bool", "float"],
)
def test_a_mask_is_drawn_anew_from_the_middle_on(mask):
    """As diffusers binarizes: 0.5 counts."""
    found = as_masks(mask)
    assert found.dtype == np.bool_
    np.testing.assert_array_equal(found, [MARKED])


def test_a_mask_of_pillow_is_taken_by_its_brightness():
    pillow = pytest.importorskip("PIL.Image")
    picture = pillow.fromarray(np.repeat(MASK[..., None], 3, axis=2))
    np.testing.assert_array_equal(as_masks([picture, picture]), [MARKED, MARKED])


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (MASK.astype(np.int64), "expected bool, uint8 or finite float32 in 0..1, got int64."),
        (MASK.astype(np.float32), "expected float32 in 0..1, got 0 to 255."),
        (np.full((1, 4), np.nan, np.float32), "expected bool, uint8 or finite float32"),
        (MASK[0], r"expected \[H, W\] or \[N, H, W\]"),
        ([MASK, MASK[:, :2]], r"got shapes \[\(1, 2\), \(1, 4\)\]"),
        ([MASK[None]], r"expected \[H, W\] or"),
    ],
)
def test_what_is_no_mask_is_refused(mask, error):
    with pytest.raises(InputError, match=f"^mask_image: .*{error}"):
        as_masks(mask)


def test_depths_are_one_map_or_several():
    assert as_depths(np.zeros((2, 3), np.float32)).shape == (1, 2, 3)
    assert as_depths(np.zeros((5, 2, 3), np.float32)).shape == (5, 2, 3)


@pytest.mark.parametrize(
    "depth", [np.zeros(3, np.float32), np.zeros((2, 3)), np.full((2, 3), np.inf, np.float32), "a"]
)
def test_what_is_no_depth_is_refused(depth):
    with pytest.raises(InputError, match=r"^depth_map: expected finite float32 \[h, w\] or"):
        as_depths(depth)


LEVELS = tuple(np.linspace(1, 0.2, 5))


def test_an_upscalers_picture_is_noised_by_its_seeds():
    images = np.random.default_rng(0).integers(0, 256, (1, 8, 12, 3)).astype(np.uint8)
    made = upscale_conditions(images, [3, 4], 2, LEVELS)
    assert (made["image"].shape, made["image"].dtype) == ((2, 3, 8, 12), np.float32)
    np.testing.assert_array_equal(made["class_labels"], [2])
    clear = upscale_conditions(images, [3, 4], 0, LEVELS)["image"]
    np.testing.assert_allclose(clear, np.repeat(_signed(images), 2, axis=0), atol=1e-6)
    noise = (made["image"] - LEVELS[2] ** 0.5 * clear) / (1 - LEVELS[2]) ** 0.5
    assert abs(noise.mean()) < 0.2
    assert abs(noise.std() - 1) < 0.1
    alone = upscale_conditions(images, [4], 2, LEVELS)["image"]
    np.testing.assert_array_equal(alone[0], made["image"][1])
    assert not np.array_equal(*made["image"])


def _signed(images):
    return images.transpose(0, 3, 1, 2) / 127.5 - 1


@pytest.mark.parametrize("level", [-1, 5, 2.5, True])
def test_a_noise_level_is_one_of_the_schedules(level):
    with pytest.raises(InputError, match=r"^noise_level: expected a whole number"):
        upscale_conditions(np.zeros((1, 8, 8, 3), np.uint8), [0], level, LEVELS)
