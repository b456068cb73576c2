"""Pictures are files of the right size and content."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib")
image = pytest.importorskip("PIL.Image")

from blockcache.tools.report.pictures import save_grid, save_pictures  # noqa: E402


def test_pictures_are_set_side_by_side(tmp_path):
    pictures = np.zeros((3, 8, 8, 3), np.uint8)
    pictures[1] = 255
    save_pictures(pictures, tmp_path / "p.png", scale=2)
    assert image.open(tmp_path / "p.png").size == (48, 16)


def test_a_grid_has_a_row_a_run(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), np.uint8)
    save_grid([("x", pictures), ("y", pictures)], ["left", "right"], tmp_path / "g.png")
    drawn = image.open(tmp_path / "g.png").convert("RGB").resize((64, 64))
    assert len(drawn.getcolors(4096)) > 50
