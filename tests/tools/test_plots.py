"""Plots are files that hold a picture."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib")
image = pytest.importorskip("PIL.Image")

from blockcache.runtime import Schedule  # noqa: E402
from blockcache.tools.plots import (  # noqa: E402
    plot_change,
    plot_schedule,
    save_grid,
    save_pictures,
)


def colours(path):
    return len(image.open(path).convert("RGB").resize((64, 64)).getcolors(4096))


def test_a_schedule_is_drawn(tmp_path):
    recompute = np.tile([[True], [False], [True], [False]], (1, 3))
    plot_schedule(Schedule(recompute), ["a", "b", "c"], tmp_path / "s.png")
    assert colours(tmp_path / "s.png") > 2


def test_change_is_drawn_with_its_band(tmp_path):
    mean = np.abs(np.random.default_rng(0).standard_normal((6, 2)))
    plot_change(mean, mean / 4, ["a", "b"], tmp_path / "c.svg")
    assert (tmp_path / "c.svg").read_text().count("<path") > 4


def test_pictures_are_set_side_by_side(tmp_path):
    pictures = np.zeros((3, 8, 8, 3), np.uint8)
    pictures[1] = 255
    save_pictures(pictures, tmp_path / "p.png", scale=2)
    assert image.open(tmp_path / "p.png").size == (48, 16)


def test_a_grid_has_a_row_a_run(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), np.uint8)
    save_grid([("x", pictures), ("y", pictures)], ["left", "right"], tmp_path / "g.png")
    assert colours(tmp_path / "g.png") > 50
