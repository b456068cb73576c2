"""A latency report as Markdown, and one line of it for the results over commits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from blockcache.runtime.files import write_text
from blockcache.tools.bench.latency import LatencyReport, Row
from blockcache.tools.bench.pictures import PictureRow
from blockcache.tools.report.plots import Bar, plot_bars
from blockcache.tools.report.tables import markdown_table

PAPER = {20: 1.65, 50: 1.82}
"""Speed-up of the paper's Table 1 with scale-shift by steps: A100, bf16, LDM-512."""


def report_text(report: LatencyReport) -> str:
    """Everything, for people."""
    sizes = report.sizes
    parts = [
        f"**{report.model}**, {report.images} image(s), latents {sizes.height} x "
        f"{sizes.width}, guidance, {report.rounds} rounds in turns"
        f"{'' if report.warm_up else ', no warm-up'}"
        f"{', CPU seconds but for the first' if report.cpu_time else ''}; median (range).",
        "; ".join(f"{name} {value}" for name, value in report.machine.items() if value),
        "while it ran: " + "; ".join(f"{k} {v}" for k, v in report.steadiness.items()),
        _table1(report.rows),
        _picture_table(report.pictures),
        _promise_table(report),
        _memory_table(report.rows),
        *(_segment_table(report, engine) for engine in report.timings),
        "\n".join(f"- not run: {who}: {why}" for who, why in report.absent.items()),
    ]
    return "\n\n".join(part for part in parts if part)


def _table1(rows: Sequence[Row]) -> str:
    columns = ["", "steps", "blocks", "s", "images/s", "speed-up", "paper", "open s", "first s"]
    cells = []
    for row in rows:
        paper = PAPER.get(row.steps) if row.kind == "cached" else None
        cells.append(
            [
                f"{row.engine} {row.kind} {row.preset}",
                str(row.steps),
                f"{row.computed_fraction:.0%}",
                str(row.seconds),
                f"{row.images_per_s:.3g}",
                f"{row.speedup.median:.2f}x" if row.speedup else "",
                f"{paper:.2f}x" if paper else "",
                f"{row.open_s:.2f}",
                f"{row.first_s:.2f}",
            ]
        )
    return markdown_table(columns, cells)


def _picture_table(rows: Sequence[PictureRow]) -> str:
    """Parts and sum, and both speed-ups, over the first row."""
    if not rows:
        return ""
    columns = ["from prompt to picture", "text ms", "denoising ms", "decoding ms", "sum ms"]
    columns += ["share of text and decoding", "denoising faster", "whole faster"]
    cells = [
        [
            f"{row.engine} {row.kind} {row.preset}",
            *(
                f"{1e3 * spread.median:.4g}"
                for spread in (row.text, row.denoising, row.decoding, row.total)
            ),
            f"{row.parts_share:.1%}",
            f"{row.denoising_speedup.median:.2f}x",
            f"{row.total_speedup.median:.2f}x",
        ]
        for row in rows
    ]
    return markdown_table(columns, cells)


def _promise_table(report: LatencyReport) -> str:
    cells = [
        [f"{p.name}, {p.engine} {p.preset}", str(p.ratio), f"<= {p.goal:g}" if p.goal else ""]
        for p in report.promises
    ]
    host = f"{report.host_us_per_launch:.2f} µs"
    cells.append(["host time per step and segment, empty engines", host, "<= 3 µs"])
    return markdown_table(["promise", "measured", "goal"], cells)


def _memory_table(rows: Sequence[Row]) -> str:
    uses = list(dict.fromkeys(use for row in rows for use in row.memory))
    cells = [
        [f"{row.engine} {row.kind} {row.preset}"]
        + [f"{row.memory[use] / 1e6:.2f}" if use in row.memory else "" for use in uses]
        for row in rows
    ]
    return markdown_table(["MB", *(use.replace("_", " ") for use in uses)], cells)


def _segment_table(report: LatencyReport, engine: str) -> str:
    times = report.timings[engine].segment_ms
    loop = sum(ms for name, ms in times.items() if name != "prompt")
    cells = [
        [name, f"{ms:.4f}", "" if name == "prompt" else f"{ms / loop:.1%}"]
        for name, ms in times.items()
    ]
    return markdown_table([f"segment on {engine}", "ms", "of a step"], cells)


def report_json(report: LatencyReport) -> str:
    """Everything, for machines."""
    return json.dumps(asdict(report), indent=1)


def write_report(report: LatencyReport, folder: Path) -> None:
    """``report.md``, ``report.json`` and ``latency.svg``."""
    write_text(folder / "report.md", report_text(report) + "\n")
    write_text(folder / "report.json", report_json(report) + "\n")
    plot_bars(
        [_bar(row) for row in report.rows],
        folder / "latency.svg",
        "seconds a call (median, range)",
        f"{report.model}, {report.images} image(s)",
    )


def _bar(row: Row) -> Bar:
    return Bar(
        label=f"{row.engine} {row.kind} {row.preset}",
        spread=row.seconds,
        note=f"{row.speedup.median:.2f}x" if row.speedup else "",
        bold=row.kind == "cached",
    )


def append_figures(file: Path, report: LatencyReport) -> None:
    """Add one line of JSON: the figures to watch from commit to commit."""
    line = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": report.machine.get("commit", ""),
        "machine": report.machine.get("name", report.machine["cpu"]),
        "model": report.model,
        "images": report.images,
        "rounds": report.rounds,
        "warm_up": report.warm_up,
        "cpu_time": report.cpu_time,
        "host_us_per_launch": round(report.host_us_per_launch, 3),
        "rows": {
            f"{r.engine} {r.kind} {r.preset}": {
                "s": round(r.seconds.median, 5),
                "open_s": round(r.open_s, 3),
                "first_s": round(r.first_s, 3),
            }
            for r in report.rows
        },
        "promises": {
            f"{p.name}, {p.engine} {p.preset}": round(p.ratio.median, 4) for p in report.promises
        },
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as history:
        history.write(json.dumps(line) + "\n")
