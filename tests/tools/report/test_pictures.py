"""Pictures are files of the right size and content."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib")
image = pytest.importorskip("PIL.Image")

from blockcache.tools.report.pictures import beside_differences, save_grid, save_pictures  # noqa: E402


def test_pictures_are_set_side_by_side(tmp_path):
    pictures = np.zeros((3, 8, 8, 3), np.uint8)
    pictures[1] = 255
    save_pictures(pictures, tmp_path / "p.png")
    assert image.open(tmp_path / "p.png").size == (24, 8)


def test_a_grid_has_a_row_a_run(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), np.uint8)
    save_grid([("x", pictures), ("y", pictures)], ["left", "right"], tmp_path / "g.png")
    drawn = image.open(tmp_path / "g.png").convert("RGB").resize((64, 64))
    assert len(drawn.getcolors(4096)) > 50


def test_a_difference_is_white_where_there_is_none_and_darkens_with_the_gain():
    pictures = np.full((1, 2, 2, 3), 100, np.uint8)
    reference = pictures.copy()
    reference[0, 0, 0] = (110, 120, 100)  # the mean of the channels is 10 away
    reference[0, 1, 1] = 255
    made = beside_differences(pictures, reference, gain=6.0)
    assert made.shape == (1, 2, 4, 3)
    np.testing.assert_array_equal(made[:, :, :2], pictures)
    assert made[0, :, 2:, 0].tolist() == [[195, 255], [255, 0]]
