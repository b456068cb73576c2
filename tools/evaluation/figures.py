"""Pictures of an evaluation: grids of images, and quality against speed, one line a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from blockcache.tools.evaluation.contest import FEWER, PLAIN, THRESHOLD, UNCACHED, Group
from blockcache.tools.evaluation.pictures import Drawn
from blockcache.tools.evaluation.report import GroupReport, Report, Row
from blockcache.tools.evaluation.resampling import Interval
from blockcache.tools.evaluation.subject import Subject
from blockcache.tools.report import plots
from blockcache.tools.report.pictures import save_grid

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
        for title, x, x_of in _speeds(group.rows)
        if group.comparisons
    ]
    if frontiers:
        plots.plot_frontiers(frontiers, out / "frontier.png")


def _wall(row: Row) -> float | None:
    return None if row.speedup_wall is None else row.speedup_wall.median


_Speed: TypeAlias = tuple[str, str, Callable[[Row], Any]]  # title, label, of a row
_SPEEDS: tuple[_Speed, ...] = (
    ("by computed cost", "speed-up by FLOPs of the whole U-Net", lambda row: row.speedup_flops),
    ("by wall clock", "measured speed-up", _wall),
)


def _speeds(rows: Sequence[Row]) -> list[_Speed]:
    """The computed one, and the measured one where all rows were timed: one axis shows one kind."""
    return [speed for speed in _SPEEDS if all(speed[2](row) is not None for row in rows)]


def _shown(group: GroupReport) -> list[tuple[str, str]]:
    """Metrics of the frontier: distance, and Fréchet distance where there are pictures."""
    uncached = group.yardstick == group.rows[0].preset
    titles = {"distance": f"distance to the {'uncached' if uncached else 'converged'} run"}
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
    """The paired difference where there is one: far narrower than two intervals side by side.

    A distance is one already.
    """
    if key == "distance":
        return row.quality[key]
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
    if group.converged is not None:
        name = group.converged.name
        rows.insert(0, (f"{name} run\n", drawn[name].pictures[:count]))
    save_grid(rows, [subject.caption(image) for image in range(count)], file)


def _caption(row: Row) -> str:
    speed = row.speedup_flops if row.speedup_wall is None else row.speedup_wall.median
    return f"{row.preset}\n{row.method}\n{row.flops_fraction:.0%} of FLOPs, {speed:.2f}x"


def _against_delta(group: GroupReport, file: Path) -> None:
    """Quality and speed against delta (paper, Fig. 7), where several thresholds were compared."""
    reference, *others = group.rows
    rows = sorted((row for row in others if _has_delta(row, reference)), key=_delta)
    if len(rows) < 2:
        return
    deltas = [_delta(row) for row in rows]
    qualities = [_line(group, key, title, deltas, rows) for key, title in _shown(group)]
    _, speed, speed_of = _speeds(rows)[-1]
    title = f"{group.name}: thresholds, reused outputs not aligned"
    plots.plot_against_delta(qualities, [speed_of(row) for row in rows], speed, title, file)


def _has_delta(row: Row, reference: Row) -> bool:
    """An explicit threshold at the reference's steps, unaligned: delta alone differs.

    A threshold that was searched for a speed-up has that speed-up as its value, and no delta.
    """
    explicit = row.policy.get("kind") == THRESHOLD
    return explicit and row.alignment == PLAIN and row.steps == reference.steps


def _delta(row: Row) -> float:
    return float(str(row.policy["value"]))
