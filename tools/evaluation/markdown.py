"""The report as Markdown: one table of rows and one of findings for every group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from blockcache.tools.evaluation.alignment_table import alignment_tables
from blockcache.tools.evaluation.quality import METRICS, Metric
from blockcache.tools.evaluation.report import Comparison, GroupReport, Report, Row
from blockcache.tools.evaluation.resampling import Interval
from blockcache.tools.evaluation.verdict import NO_FINDING, Finding
from blockcache.tools.report.spread import Spread
from blockcache.tools.report.tables import markdown_table

FAR = 0.1  # a comparison is called unequal where FLOPs differ by more


def markdown(report: Report) -> str:
    """The whole report."""
    draw, timing = report.options.draw, report.options.timing
    machine = ", ".join(f"{name} {value}" for name, value in report.machine.items())
    parts = [
        f"# Evaluation of {report.bundle}",
        f"Model {report.model}; {draw.images} images, the same noise for every preset (seed "
        f"{draw.seed}); {report.subject}. Machine: {machine}.",
        _notes(report),
    ]
    for group in report.groups:
        parts += [f"## {group.name}", _rows(group), _comparisons(group), *alignment_tables(group)]
    if any(row.images_per_s for group in report.groups for row in group.rows):
        parts.append(
            f"Images/s and wall-clock speed-up: median (range) of {timing.rounds} rounds in which "
            f"all presets take turns, {timing.images} images a call, denoising alone."
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def _notes(report: Report) -> str:
    lines = []
    if report.reference:
        lines.append(
            f"Fréchet distance and KID (EfficientNet-Lite0 features, lower is better) are taken "
            f"to {report.reference}."
        )
    if any(group.floor and group.ceiling for group in report.groups):
        lines.append(
            "The first line of a table compares real pictures with real ones: as many random ones "
            "as there are images (at most half) against the others, mean and range of three draws; "
            "its caption score is the ceiling."
        )
    lines.append(
        f"{_distance(report)} Mean over images (standard deviation over images behind ±). In "
        f"brackets: 90 % intervals from {report.options.resamples} random halves of the images, "
        f"the same halves for every preset. A difference is called better or worse where its "
        f"paired interval leaves out 0; the verdict needs more than the Fréchet distance. "
        f"Fractions are of the uncached run."
    )
    return "  \n".join(lines)


def _distance(report: Report) -> str:
    """What the distance is."""
    if report.options.yardstick == "uncached":
        return "Distance: relative L2 of the final latents to the uncached run from the same noise."
    return (
        "Distance: relative L2 of the final latents to the converged run: the same noise in so "
        "many steps that more change nothing. Beside it stands the distance to the uncached run on "
        "the preset's own steps. (Solvers that add noise at every step have no converged run: "
        "there the distance is to the uncached run.) Presets of one solver compete wherever their "
        "steps lie."
    )


def _rows(group: GroupReport) -> str:
    metrics = [m for m in METRICS if any(m.key in row.quality for row in group.rows)]
    timed = any(row.images_per_s for row in group.rows)
    head = ["preset", "method", "FLOPs", "blocks", "speed-up FLOPs"]
    head += ["wall clock", "images/s"] if timed else []
    head += [metric.title for metric in metrics]
    lines = []
    if group.floor:
        cells = ["*real against real*"] + [""] * (6 if timed else 4)
        lines.append(cells + [_floor(group, metric) for metric in metrics])
    for row in group.rows:
        cells = [f"`{row.preset}`", row.method, f"{row.flops_fraction:.0%}"]
        cells += [f"{row.blocks_fraction:.0%}", f"{row.speedup_flops:.2f}x"]
        cells += [_spread(row.speedup_wall, "x"), _spread(row.images_per_s)] if timed else []
        lines.append(cells + [_quality(row, metric, group.yardstick) for metric in metrics])
    return markdown_table(head, lines, words=2)


def _floor(group: GroupReport, metric: Metric) -> str:
    values = group.floor.get(metric.key)
    if values:
        low, high = (metric.layout.format(value) for value in (min(values), max(values)))
        return f"{metric.layout.format(sum(values) / len(values))} ({low} to {high})"
    ceiling = group.ceiling.get(metric.key)
    return "" if ceiling is None else metric.layout.format(ceiling)


def _quality(row: Row, metric: Metric, yardstick: str) -> str:
    if metric.key not in row.quality:
        return ""
    if row.preset == yardstick and metric.key == "psnr_db":
        return ""
    found = row.quality[metric.key]
    if row.preset == yardstick and metric.key == "distance":
        return metric.layout.format(found.value)
    text = metric.layout.format(found.value)
    if metric.key == "distance":
        text += f" ± {metric.layout.format(row.distance_std)}"
    return f"{text} {_bracket(found, metric)}"


def _comparisons(group: GroupReport) -> str:
    used = [m for m in METRICS if any(m.key in c.findings for c in group.comparisons)]
    if not used:
        return ""
    head = ["preset", "against", "FLOPs ratio", *(metric.title for metric in used), "verdict"]
    lines = [_comparison(found, used) for found in group.comparisons if found.findings]
    return markdown_table(head, lines, words=2)


def _comparison(comparison: Comparison, used: Sequence[Metric]) -> list[str]:
    ratio = comparison.flops_ratio
    unequal = comparison.against != "uncached" and abs(ratio - 1) > FAR
    cells = [f"`{comparison.subject}`", f"{comparison.against}: `{comparison.other}`"]
    cells.append(f"{ratio:.2f}" + (" (unequal)" if unequal else ""))
    cells += [_finding(comparison.findings, metric) for metric in used]
    return [*cells, f"**{comparison.verdict}**"]


def _finding(findings: Mapping[str, Finding], metric: Metric) -> str:
    found = findings.get(metric.key)
    if found is None:
        return ""
    text = f"{_signed(found.difference.value, metric)} {_bracket(found.difference, metric)}"
    return text if found.verdict == NO_FINDING else f"{text} {found.verdict}"


def _signed(value: float, metric: Metric) -> str:
    return metric.layout.replace("{:", "{:+").format(value)


def _bracket(interval: Interval, metric: Metric) -> str:
    low, high = (metric.layout.format(value) for value in (interval.low, interval.high))
    return f"({low} to {high})"


def _spread(spread: Spread | None, unit: str = "") -> str:
    if spread is None:
        return ""
    return f"{spread.median:.2f}{unit} ({spread.low:.2f} to {spread.high:.2f})"
