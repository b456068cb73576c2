"""The same schedules with every alignment, beside fewer steps: is a reused output repaired?"""

from __future__ import annotations

from collections.abc import Sequence

from blockcache.tools.evaluation.contest import FEWER, PLAIN
from blockcache.tools.evaluation.quality import BY_KEY, Metric
from blockcache.tools.evaluation.report import GroupReport, Row

SHOWN = ("distance", "frechet")


def alignment_tables(group: GroupReport) -> list[str]:
    """One table a metric, a line a schedule, a column an alignment; [] where nothing is aligned."""
    alignments = list(dict.fromkeys(row.alignment for row in _cached(group)))
    if alignments in ([], [PLAIN]):
        return []
    lines: list[str] = []
    for key in SHOWN:
        if key in group.rows[0].quality:
            lines += ["", *_table(group, BY_KEY[key], sorted(alignments, key=_plain_first))]
    return lines


def line(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def _table(group: GroupReport, metric: Metric, alignments: list[str]) -> list[str]:
    head = [f"{metric.title}, schedule of", "FLOPs", "blocks"]
    head += ["plain reuse" if name == PLAIN else name for name in alignments]
    lines = [line([*head, "fewer steps"]), line(["---"] * (len(head) + 1))]
    schedules = dict.fromkeys(map(_schedule, sorted(_cached(group), key=_flops)))
    for schedule in schedules:
        rows = [row for row in _cached(group) if _schedule(row) == schedule]
        found = {row.alignment: metric.layout.format(row.quality[metric.key].value) for row in rows}
        first = min(rows, key=lambda row: len(row.preset))
        cells = [f"`{first.preset}`", f"{first.flops_fraction:.0%}", f"{first.blocks_fraction:.0%}"]
        cells += [found.get(name, "") for name in alignments]
        lines.append(line([*cells, _fewer_steps(group, first, metric)]))
    return lines


def _fewer_steps(group: GroupReport, row: Row, metric: Metric) -> str:
    """The uncached run of about the same FLOPs."""
    for comparison in group.comparisons:
        if comparison.subject == row.preset and comparison.against == FEWER:
            other = next(r for r in group.rows if r.preset == comparison.other)
            value = metric.layout.format(other.quality[metric.key].value)
            return f"{value} ({other.steps} steps, {other.flops_fraction:.0%})"
    return ""


def _cached(group: GroupReport) -> list[Row]:
    return [row for row in group.rows[1:] if row.method != FEWER]


def _schedule(row: Row) -> tuple[int, str]:
    """A group may hold several step counts: their schedules are never the same."""
    return row.steps, row.schedule


def _flops(row: Row) -> float:
    return -row.flops_fraction


def _plain_first(alignment: str) -> tuple[bool, str]:
    return alignment != PLAIN, alignment
