"""The table: every row, interval and finding arrives in the report, its JSON and its Markdown."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")

from blockcache.tools.evaluation import figures
from blockcache.tools.evaluation.alignment_table import alignment_tables
from blockcache.tools.evaluation.contest import make_groups
from blockcache.tools.evaluation.markdown import markdown
from blockcache.tools.evaluation.options import EvaluationOptions
from blockcache.tools.evaluation.report import Report, group_report
from blockcache.tools.evaluation.resampling import Resampled

HALF = np.tile([[True, True], [False, False]], (2, 1))
NOISE = np.linspace(-1, 1, 41)


@pytest.fixture
def report(preset_of, presets_only):
    bundle = presets_only(
        [
            preset_of("dpm-4", 4),
            preset_of("dpm-3", 3),
            preset_of("dpm-4-half", 4, HALF, kind="threshold", value=0.5),
        ]
    )
    (group,) = make_groups(bundle)

    def quality(frechet, distance):
        return {
            "frechet": Resampled(frechet, frechet + NOISE),
            "distance": Resampled(distance, distance + NOISE / 100),
        }

    made = group_report(
        group,
        {"dpm-4": quality(20, 0), "dpm-3": quality(25, 0.1), "dpm-4-half": quality(19, 0.3)},
        {"dpm-4": 0.0, "dpm-3": 0.05, "dpm-4-half": 0.06},
        {"dpm-4": [4.0, 8.0], "dpm-3": [2.0, 5.0], "dpm-4-half": [1.0, 4.0]},
        timed_images=2,
        floor={"frechet": [5.0, 6.0, 7.0]},
        ceiling={},
    )
    return Report(
        bundle="b",
        model="m",
        subject="random prompts",
        reference="9 real pictures",
        options=EvaluationOptions(),
        machine={"cpu": "x"},
        groups=[made],
    )


def test_fractions_are_of_the_uncached_run(report):
    rows = {row.preset: row for row in report.groups[0].rows}
    assert rows["dpm-4-half"].flops_fraction == pytest.approx((7 + 400 + 200) / (7 + 800))
    assert rows["dpm-4-half"].blocks_fraction == 0.5
    assert rows["dpm-3"].blocks_fraction == 0.75
    assert rows["dpm-3"].speedup_flops == pytest.approx(807 / 607)


def test_speed_is_a_median_of_rounds_and_speedup_of_their_ratios(report):
    rows = {row.preset: row for row in report.groups[0].rows}
    half = rows["dpm-4-half"]
    assert (half.speedup_wall.median, half.speedup_wall.low, half.speedup_wall.high) == (3, 2, 4)
    assert half.images_per_s.median == pytest.approx((2 / 1 + 2 / 4) / 2)
    assert rows["dpm-4"].speedup_wall.low == rows["dpm-4"].speedup_wall.high == 1


def test_the_uncached_run_is_not_judged_by_its_distance_to_itself(report):
    found = {(c.subject, c.against): c for c in report.groups[0].comparisons}
    assert set(found["dpm-4-half", "uncached"].findings) == {"frechet"}
    assert set(found["dpm-4-half", "fewer steps"].findings) == {"frechet", "distance"}
    assert found["dpm-4-half", "fewer steps"].verdict == "mixed"
    assert found["dpm-4-half", "uncached"].verdict == "no finding"
    assert found["dpm-4-half", "fewer steps"].flops_ratio == pytest.approx(1.0)


def test_json_holds_every_number(report):
    read = json.loads(report.to_json())
    half = next(row for row in read["groups"][0]["rows"] if row["preset"] == "dpm-4-half")
    assert half["quality"]["distance"]["value"] == 0.3
    assert half["policy"] == {"kind": "threshold", "value": 0.5}
    assert half["distance_std"] == 0.06
    assert read["groups"][0]["floor"]["frechet"] == [5.0, 6.0, 7.0]
    assert read["options"]["draw"]["images"] == 256
    assert read["groups"][0]["comparisons"][0]["findings"]["frechet"]["verdict"] == "worse"


def test_markdown_has_a_line_a_preset_and_all_columns_fit(report):
    text = markdown(report)
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert len(tables[0].splitlines()) == 2 + 1 + 3
    assert "6.0 (5.0 to 7.0)" in tables[0]
    assert "| `dpm-4-half` | threshold | 75% | 50% | 1.33x | 3.00x (2.00 to 4.00) |" in tables[0]
    assert "0.3000 ± 0.0600 (0.2903 to 0.3097)" in tables[0]
    assert "+0.2000 (0.2000 to 0.2000) worse" in tables[1]
    assert "9 real pictures" in text


def test_a_comparison_at_unequal_cost_says_so(preset_of, presets_only):
    bundle = presets_only([preset_of("dpm-4", 4), preset_of("dpm-1", 1),
                           preset_of("dpm-4-half", 4, HALF, kind="interval")])  # fmt: skip
    (group,) = make_groups(bundle)
    quality = {"distance": Resampled(0.1, NOISE)}
    names = [contestant.name for contestant in group.contestants]
    made = group_report(
        group, dict.fromkeys(names, quality), dict.fromkeys(names, 0.0), {}, 1,
        floor={}, ceiling={},
    )  # fmt: skip
    report = Report(bundle="b", model="m", subject="s", reference="", machine={},
                    options=EvaluationOptions(), groups=[made])  # fmt: skip
    assert "| `dpm-4-half` | fewer steps: `dpm-1` | 2.93 (unequal) |" in markdown(report)
    assert "images/s" not in markdown(report)


def test_alignments_stand_side_by_side_for_one_schedule(preset_of, presets_only):
    last = np.array([[True, True]] * 3 + [[False, True]])
    bundle = presets_only(
        [
            preset_of("dpm-4", 4),
            preset_of("dpm-3", 3),
            preset_of("a", 4, HALF, kind="threshold", value=0.5),
            preset_of("a-history", 4, HALF, kind="threshold", value=0.5, alignment="history"),
            preset_of("b-ls", 4, last, kind="budget", value=1.1, alignment="scale-shift"),
        ]
    )
    (group,) = make_groups(bundle)
    distances = {"dpm-4": 0, "dpm-3": 0.1, "a": 0.4, "a-history": 0.2, "b-ls": 0.05}
    made = group_report(
        group, {name: {"distance": Resampled(d, d + NOISE)} for name, d in distances.items()},
        dict.fromkeys(distances, 0.0), {}, 1, floor={}, ceiling={},
    )  # fmt: skip
    (table,) = alignment_tables(made)
    assert table.splitlines() == [
        "| distance, schedule of | FLOPs | blocks | plain reuse | history | scale-shift "
        "| fewer steps |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| `b-ls` | 96% | 92% |  |  | 0.0500 | 0.1000 (3 steps, 75%) |",
        "| `a` | 75% | 50% | 0.4000 | 0.2000 |  | 0.1000 (3 steps, 75%) |",
    ]


def test_without_alignments_there_is_no_such_table(report):
    assert alignment_tables(report.groups[0]) == []


def test_the_frontier_shows_paired_differences(report, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(figures.plots, "plot_frontiers", lambda panels, file: drawn.extend(panels))
    figures.draw(report, [SimpleNamespace(name="dpm-4")], None, {}, tmp_path)
    assert [(panel.y.split(",")[0], panel.x.split(" ")[0]) for panel in drawn] == [
        ("distance to the uncached run", "speed-up"),
        ("distance to the uncached run", "measured"),
        ("Fréchet distance", "speed-up"),
        ("Fréchet distance", "measured"),
    ]
    lines = {line.label: line for line in drawn[3].lines}
    assert set(lines) == {"fewer steps", "threshold"}
    line = lines["threshold"]
    assert (line.x, line.y, line.low, line.high) == ([3.0], [-1.0], [-1.0], [-1.0])
    distance = next(line for line in drawn[0].lines if line.label == "threshold")
    assert distance.y == [0.3]
    assert distance.low[0] < 0.3 < distance.high[0]
