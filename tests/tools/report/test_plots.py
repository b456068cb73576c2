"""Plots are files that hold a picture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("matplotlib")
image = pytest.importorskip("PIL.Image")

from blockcache.runtime import Schedule  # noqa: E402
from blockcache.tools.report.plots import (  # noqa: E402
    Bar,
    Line,
    Panel,
    plot_against_delta,
    plot_alignment,
    plot_bars,
    plot_change,
    plot_features,
    plot_frontiers,
    plot_schedule,
    principal_colours,
)
from blockcache.tools.report.spread import Spread  # noqa: E402


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


def test_bars_stand_for_figures_and_those_in_bold_stand_out(tmp_path):
    spread = Spread(2.0, 1.5, 2.5)
    bars = [Bar(label="uncut", spread=spread), Bar(label="cached", spread=spread, note="1.5x")]
    plot_bars(bars, tmp_path / "plain.svg", "seconds", "title")
    plot_bars([bars[0], replace(bars[1], bold=True)], tmp_path / "bold.svg", "seconds", "title")
    plain, bold = ((tmp_path / f"{name}.svg").read_text() for name in ("plain", "bold"))
    assert (plain.count("#3a6ea5"), bold.count("#3a6ea5")) == (0, 1)
    assert all(text in bold for text in ("<!-- uncut -->", "<!-- cached -->", "<!--  1.5x -->"))


LINE = Line(label="x", x=[1.0, 2.0], y=[3.0, 4.0], low=[2.0, 3.5], high=[3.5, 5.0])


def test_a_frontier_has_a_panel_a_metric(tmp_path):
    panels = [Panel(title=f"panel {i}", x="speed", y="quality", lines=[LINE]) for i in range(3)]
    plot_frontiers(panels, tmp_path / "f.svg")
    text = (tmp_path / "f.svg").read_text()
    assert all(f"<!-- panel {i} -->" in text for i in range(3))


def test_quality_and_speed_are_drawn_against_delta(tmp_path):
    plot_against_delta([LINE, LINE], [1.2, 1.9], "measured speed", "dpm-20", tmp_path / "d.svg")
    text = (tmp_path / "d.svg").read_text()
    assert text.count("<!-- threshold δ -->") == 2
    assert text.count("<!-- x -->") == 2
    assert text.count("<!-- measured speed -->") == 2


def test_alignment_is_drawn_grey_where_nothing_is_reused(tmp_path):
    before = np.full((6, 2), 0.5)
    before[0] = before[3, 1] = np.nan
    plot_alignment(before, before / 2, ["a", "b"], tmp_path / "a.png", "title")
    pixels = image.open(tmp_path / "a.png").convert("RGB").getcolors(1 << 24)
    assert max(count for count, colour in pixels if colour == (0xD9, 0xD9, 0xD9)) > 500
    plot_alignment(before, before / 2, ["a", "b"], tmp_path / "a.svg", "title")
    text = (tmp_path / "a.svg").read_text()
    assert "<!-- before: mean 0.500 -->" in text
    assert "<!-- after: mean 0.250 -->" in text


def test_an_alignment_without_reuse_is_drawn(tmp_path):
    nothing = np.full((3, 2), np.nan)
    plot_alignment(nothing, nothing, ["a", "b"], tmp_path / "a.png")
    assert colours(tmp_path / "a.png") > 1


def test_features_become_colours_that_follow_the_first_component(tmp_path):
    signal = np.linspace(-1, 1, 4 * 8 * 8).reshape(4, 1, 8, 8)
    direction = np.random.default_rng(0).standard_normal((1, 5, 1, 1))
    noise = 1e-3 * np.random.default_rng(1).standard_normal((4, 5, 8, 8))
    found = principal_colours(signal * direction + noise)
    assert found.shape == (4, 8, 8, 3)
    assert found.min() == 0
    assert found.max() == 1
    assert abs(np.corrcoef(found[..., 0].ravel(), signal.ravel())[0, 1]) > 0.99
    plot_features([("a", noise), ("b", noise)], tmp_path / "p.svg")
    text = (tmp_path / "p.svg").read_text()
    assert all(text.count(f"<!-- step {step} -->") == 1 for step in range(4))
    assert text.count("<image") == 8
