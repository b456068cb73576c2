"""The same schedules with every alignment, beside fewer steps: is a reused output repaired?"""

from __future__ import annotations

from blockcache.tools.evaluation.contest import FEWER, PLAIN
from blockcache.tools.evaluation.quality import BY_KEY, Metric
from blockcache.tools.evaluation.report import GroupReport, Row
from blockcache.tools.report.tables import markdown_table

SHOWN = ("distance", "frechet")


def alignment_tables(group: GroupReport) -> list[str]:
    """A table for each metric, a row for each schedule, a column for each alignment.

    [] where nothing is aligned.
    """
    alignments = list(dict.fromkeys(row.alignment for row in _cached(group)))
    if alignments in ([], [PLAIN]):
        return []
    alignments.sort(key=_plain_first)
    shown = [BY_KEY[key] for key in SHOWN if key in group.rows[0].quality]
    return [_table(group, metric, alignments) for metric in shown]


def _table(group: GroupReport, metric: Metric, alignments: list[str]) -> str:
    head = [f"{metric.title}, schedule of", "FLOPs", "blocks"]
    head += ["plain reuse" if name == PLAIN else name for name in alignments]
    lines = []
    schedules = dict.fromkeys(map(_schedule, sorted(_cached(group), key=_flops)))
    for schedule in schedules:
        rows = [row for row in _cached(group) if _schedule(row) == schedule]
        found = {row.alignment: metric.layout.format(row.quality[metric.key].value) for row in rows}
        first = min(rows, key=lambda row: len(row.preset))
        cells = [f"`{first.preset}`", f"{first.flops_fraction:.0%}", f"{first.blocks_fraction:.0%}"]
        cells += [found.get(name, "") for name in alignments]
        lines.append([*cells, _fewer_steps(group, first, metric)])
    return markdown_table([*head, "fewer steps"], lines)


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
