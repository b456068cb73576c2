"""Which rows the plots show, and what their axes say."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")

from blockcache.tools.evaluation import figures
from blockcache.tools.evaluation.alignment_table import alignment_tables
from blockcache.tools.evaluation.contest import make_groups
from blockcache.tools.evaluation.options import EvaluationOptions
from blockcache.tools.evaluation.report import Report, group_report
from blockcache.tools.evaluation.resampling import Resampled

HALF = np.tile([[True, True], [False, False]], (2, 1))
LAST = np.array([[True, True]] * 3 + [[False, True]])
NOISE = np.linspace(-1, 1, 41)
METRICS = ("frechet", "distance")


@pytest.fixture
def group(preset_of, presets_only):
    """Explicit deltas, thresholds for a speed-up and aligned ones, at four and three steps."""
    threshold, searched = {"kind": "threshold"}, {"kind": "threshold-speedup", "value": 1.3}
    bundle = presets_only(
        [
            preset_of("dpm-4", 4),
            preset_of("dpm-3", 3),
            preset_of("dpm-4-d0.5", 4, HALF, **threshold, value=0.5),
            preset_of("dpm-4-d0.1", 4, LAST, **threshold, value=0.1),
            preset_of("dpm-4-d0.2-h", 4, HALF, **threshold, value=0.2, alignment="history"),
            preset_of("dpm-4-t1.3", 4, HALF, **searched),
            preset_of("dpm-3-d0.3", 3, HALF[:3], **threshold, value=0.3),
            preset_of("dpm-3-d0.3-h", 3, HALF[:3], **threshold, value=0.3, alignment="history"),
        ]
    )
    return make_groups(bundle, reference="dpm-4")[0]


def reported(group, seconds, metrics=METRICS):
    """A report of made-up quality: 0 for the reference, then 1, 2, ... in the group's order."""
    quality = {
        contestant.name: {key: Resampled(place, place + NOISE) for key in metrics}
        for place, contestant in enumerate(group.contestants)
    }
    return group_report(
        group, quality, dict.fromkeys(quality, 0.0), seconds, 1, floor={}, ceiling={}
    )


def drawn(made, monkeypatch, tmp_path):
    """What is handed to the plots: panels of the frontier, arguments of the plot against delta."""
    panels, deltas = [], []
    monkeypatch.setattr(figures.plots, "plot_frontiers", lambda found, file: panels.extend(found))
    monkeypatch.setattr(figures.plots, "plot_against_delta", lambda *all: deltas.extend(all))
    report = Report(bundle="b", model="m", subject="s", reference="", machine={},
                    options=EvaluationOptions(), groups=[made])  # fmt: skip
    figures.draw(report, [SimpleNamespace(name=made.name)], None, {}, tmp_path)
    return panels, deltas


def test_deltas_are_explicit_unaligned_and_of_the_references_steps(group, monkeypatch, tmp_path):
    _, (qualities, speedups, speed, title, file) = drawn(reported(group, {}), monkeypatch, tmp_path)
    assert [line.label.split(",")[0] for line in qualities] == [
        "distance to the uncached run",
        "Fréchet distance",
    ]
    places = [contestant.name for contestant in group.contestants]
    expected = [places.index("dpm-4-d0.1"), places.index("dpm-4-d0.5")]
    for line in qualities:
        assert (line.x, line.y) == ([0.1, 0.5], expected)
    assert speedups == pytest.approx([807 / (607 + 170), 807 / 607])
    assert speed == "speed-up by FLOPs of the whole U-Net"
    assert title == "dpm-4: thresholds, reused outputs not aligned"
    assert file.name == "delta-dpm-4.png"


def test_latents_alone_show_the_distance_alone(group, monkeypatch, tmp_path):
    made = reported(group, {}, ["distance"])
    _, (qualities, *_) = drawn(made, monkeypatch, tmp_path)
    assert [line.label for line in qualities] == ["distance to the uncached run"]


def test_a_single_delta_is_no_curve(group, monkeypatch, tmp_path):
    made = reported(group, {})
    rows = [row for row in made.rows if row.preset != "dpm-4-d0.1"]
    fewer = type(made)(
        name="n", yardstick="dpm-4", floor={}, ceiling={}, rows=rows, comparisons=made.comparisons
    )
    assert drawn(fewer, monkeypatch, tmp_path)[1] == []


@pytest.mark.parametrize("untimed", [(), ("dpm-4-d0.1",)], ids=["all timed", "one not timed"])
def test_measured_speed_is_shown_where_all_rows_have_it(group, monkeypatch, tmp_path, untimed):
    seconds = {
        contestant.name: [4.0] for contestant in group.contestants if contestant.name not in untimed
    }
    _, (_, speedups, speed, *_) = drawn(reported(group, seconds), monkeypatch, tmp_path)
    assert speed.split(" ")[0] == ("speed-up" if untimed else "measured")
    assert (speedups == [1.0, 1.0]) == (not untimed)


def test_fewer_steps_with_caching_are_lines_of_their_own(group, monkeypatch, tmp_path):
    panels, _ = drawn(reported(group, {}), monkeypatch, tmp_path)
    lines = {line.label: line for line in panels[0].lines}
    assert {label: line.dashed for label, line in lines.items()} == {
        "fewer steps": True,
        "fewer steps + threshold": False,
        "fewer steps + threshold + history": False,
        "threshold": False,
        "threshold + history": False,
    }
    # Of the reference's FLOPs: two of three steps recomputed, and three trunks.
    assert lines["fewer steps + threshold"].x == pytest.approx([807 / (7 + 300 + 200)])


def test_a_line_of_the_alignment_table_is_of_one_step_count(group):
    (table,) = alignment_tables(reported(group, {}, ["distance"]))
    lines = table.splitlines()[2:]
    assert [line.split(" | ")[:1] for line in lines] == [
        ["| `dpm-4-d0.1`"],
        ["| `dpm-4-d0.5`"],
        ["| `dpm-3-d0.3`"],
    ]
    assert lines[-1].count("(3 steps, 75%)") == 1
