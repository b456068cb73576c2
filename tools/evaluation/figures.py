"""Pictures of an evaluation: grids of images, and quality against speed, one line a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blockcache.tools import plots
from blockcache.tools.evaluation.contest import FEWER, PLAIN, THRESHOLD, UNCACHED, Group
from blockcache.tools.evaluation.pictures import Drawn
from blockcache.tools.evaluation.report import GroupReport, Report, Row
from blockcache.tools.evaluation.resampling import Interval
from blockcache.tools.evaluation.subject import Subject

COLUMNS = 8  # images in a row of the grid


def draw(
    report: Report,
    groups: Sequence[Group],
    subject: Subject,
    drawn: Mapping[str, Drawn],
    out: Path,
) -> None:
    """Write ``grid-GROUP.png`` for every group, ``frontier.png`` and ``delta-GROUP.png``."""
    for group, found in zip(groups, report.groups, strict=True):
        if drawn:
            _grid(group, found, subject, drawn, out / f"grid-{group.name}.png")
        _against_delta(found, out / f"delta-{group.name}.png")
    frontiers = [
        plots.Panel(title=f"{group.name}: {title}", x=x, y=y, lines=_lines(group, key, x_of))
        for group in report.groups
        for key, y in _shown(group)
        for title, x, x_of in _SPEEDS
        if group.comparisons and all(x_of(row) is not None for row in group.rows)
    ]
    if frontiers:
        plots.plot_frontiers(frontiers, out / "frontier.png")


def _wall(row: Row) -> float | None:
    return None if row.speedup_wall is None else row.speedup_wall.median


_SPEEDS: tuple[tuple[str, str, Callable[[Row], Any]], ...] = (
    ("by computed cost", "speed-up by FLOPs of the whole U-Net", lambda row: row.speedup_flops),
    ("by wall clock", "measured speed-up", _wall),
)


def _shown(group: GroupReport) -> list[tuple[str, str]]:
    """Metrics of the frontier: distance, and Fréchet distance where there are pictures."""
    titles = {"distance": "distance to the uncached run"}
    titles["frechet"] = "Fréchet distance, difference to the uncached run"
    return [(key, titles[key]) for key in titles if key in group.rows[0].quality]


def _lines(group: GroupReport, key: str, x_of: Callable[[Row], Any]) -> list[plots.Line]:
    """One line a method, ordered by cost; the uncached run is the zero that all start from."""
    methods = dict.fromkeys(row.method for row in group.rows if row.method != UNCACHED)
    lines = []
    for method in methods:
        found = [row for row in group.rows if row.method == method]
        rows = sorted(found, key=lambda row: row.speedup_flops)  # measured speed is noisy
        x = [x_of(row) for row in rows]
        lines.append(_line(group, key, method, x, rows))
    return lines


def _line(
    group: GroupReport, key: str, label: str, x: Sequence[float], rows: Sequence[Row]
) -> plots.Line:
    y = [_to_uncached(group, key, row) for row in rows]
    return plots.Line(
        label=label,
        x=x,
        y=[found.value for found in y],
        low=[found.low for found in y],
        high=[found.high for found in y],
        dashed=label == FEWER,
    )


def _to_uncached(group: GroupReport, key: str, row: Row) -> Interval:
    """The paired difference where there is one: far narrower than two intervals side by side."""
    for comparison in group.comparisons:
        if comparison.subject == row.preset and comparison.against == UNCACHED:
            finding = comparison.findings.get(key)
            if finding is not None:
                return finding.difference
    return row.quality[key]


def _grid(
    group: Group, found: GroupReport, subject: Subject, drawn: Mapping[str, Drawn], file: Path
) -> None:
    """Rows presets, columns prompts, the same noise in a column (paper, Fig. 6)."""
    count = min(COLUMNS, len(subject.prompts))
    rows = [(_caption(row), drawn[row.preset].pictures[:count]) for row in found.rows]
    plots.save_grid(rows, [subject.caption(image) for image in range(count)], file)


def _caption(row: Row) -> str:
    speed = row.speedup_flops if row.speedup_wall is None else row.speedup_wall.median
    return f"{row.preset}\n{row.method}\n{row.flops_fraction:.0%} of FLOPs, {speed:.2f}x"


def _against_delta(group: GroupReport, file: Path) -> None:
    """Quality and speed against delta (paper, Fig. 7), where several thresholds were compared."""
    plain = [row for row in group.rows if row.alignment == PLAIN]
    rows = sorted((row for row in plain if row.policy.get("kind") == THRESHOLD), key=_delta)
    if len(rows) < 2:
        return
    deltas = [_delta(row) for row in rows]
    key, title = _shown(group)[-1]
    quality = _line(group, key, title, deltas, rows)
    speeds = [_wall(row) or row.speedup_flops for row in rows]
    plots.plot_against_delta(quality, speeds, group.name, file)


def _delta(row: Row) -> float:
    return float(str(row.policy.get("delta", row.policy.get("value"))))
