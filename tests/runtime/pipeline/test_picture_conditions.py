"""Masks and depth maps as they are given, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from blockcache.runtime import InputError
from blockcache.runtime.pipeline.picture_conditions import as_depths, as_masks

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
