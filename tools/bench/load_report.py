"""What a load test found: as a page, as data, and as a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blockcache.runtime.files import write_text
from blockcache.tools.report.tables import markdown_table


@dataclass(frozen=True, kw_only=True)
class Served:
    """How one way served some arrivals."""

    way: str
    preset: str
    arrivals: str
    requests: int
    requests_per_second: float | None  # that arrived; None: all at once
    images_per_second: float  # from the first arrival to the last result
    cpu_s_an_image: float  # of this process: what others on the machine do matters less to it
    p50_s: float
    p95_s: float
    images_a_launch: float

    def __str__(self) -> str:
        return (
            f"{self.arrivals}, {self.preset}, {self.way}: {self.images_per_second:.2f} images/s, "
            f"p95 {self.p95_s:.2f} s"
        )


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """All measurements of a run, in the order in which they were made."""

    model: str
    threads: int  # of the engines
    guidance: float
    machine: Mapping[str, str]
    steadiness: Mapping[str, str]
    served: Sequence[Served]

    def of(self, arrivals: str, preset: str) -> list[Served]:
        """Every way, on one kind of arrivals with one preset."""
        return [s for s in self.served if (s.arrivals, s.preset) == (arrivals, preset)]

    @property
    def kinds(self) -> list[str]:
        """Of arrivals."""
        return list(dict.fromkeys(s.arrivals for s in self.served))

    @property
    def presets(self) -> list[str]:
        """That were measured."""
        return list(dict.fromkeys(s.preset for s in self.served))


def write_load(report: LoadReport, folder: Path) -> None:
    """``load.md``, ``load.json`` and ``load.svg``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "load.json", json.dumps(asdict(report), indent=1) + "\n")
    plot_load(report, folder / "load.svg")
    title = "# Many requests at once"
    write_text(
        folder / "load.md", f"{title}\n\n{load_text(report)}\n\n![the same as bars](load.svg)\n"
    )


def load_text(report: LoadReport) -> str:
    """Everything, for people: a table for each kind of arrivals."""
    requests = report.served[0].requests
    parts = [
        f"**{report.model}**, guidance {report.guidance:g}, {requests} requests a measurement, "
        f"engines on {report.threads} thread(s), one run.",
        "; ".join(f"{name} {value}" for name, value in report.machine.items() if value),
        "while it ran: " + "; ".join(f"{k} {v}" for k, v in report.steadiness.items()),
    ]
    for kind in report.kinds:
        rows = [s for preset in report.presets for s in report.of(kind, preset)]
        parts.append(f"**{kind}**\n\n{_table(rows)}")
    return "\n\n".join(parts)


def _table(rows: Sequence[Served]) -> str:
    figures = {
        "images/s": "images_per_second",
        "CPU s an image": "cpu_s_an_image",
        "p50 s": "p50_s",
        "p95 s": "p95_s",
        "images a launch": "images_a_launch",
    }
    arriving = any(s.requests_per_second for s in rows)
    columns = ["preset", "way", *(["arrive/s"] if arriving else []), *figures]
    cells = [
        [
            s.preset,
            s.way,
            *([f"{s.requests_per_second:.2f}"] if s.requests_per_second else []),
            *(f"{getattr(s, name):.2f}" for name in figures.values()),
        ]
        for s in rows
    ]
    return markdown_table(columns, cells, words=2)


def plot_load(report: LoadReport, file: Path) -> None:
    """A bar a way: what it serves of a burst, and how long requests that come singly take."""
    from blockcache.tools.report.plots import pyplot, save_figure

    figure, axes = pyplot().subplots(
        1,
        len(report.kinds),
        figsize=(6 * len(report.kinds), 4),
        squeeze=False,
        layout="constrained",
    )
    for cell, kind in zip(axes.flat, report.kinds, strict=True):
        singly = any(s.requests_per_second for s in report.served if s.arrivals == kind)
        cell.set_title(
            f"{kind}: latency in s, median and (light) p95"
            if singly
            else f"{kind}: images a second",
            fontsize=9,
            loc="left",
        )
        _bars(cell, report, kind, ("p95_s", "p50_s") if singly else ("images_per_second",))
    axes.flat[0].legend(fontsize=7)
    save_figure(figure, file)


def _bars(axes: Any, report: LoadReport, kind: str, fields: Sequence[str]) -> None:
    """Of each preset a group; the last field stands before the others, which are light."""
    from blockcache.tools.report.plots import pyplot

    ways = list(dict.fromkeys(s.way for s in report.served))
    colours = pyplot().colormaps["viridis"](np.linspace(0, 0.9, len(ways)))
    width = 0.8 / len(ways)
    for group, preset in enumerate(report.presets):
        for served in report.of(kind, preset):
            place = ways.index(served.way)
            for field in fields:
                front = field == fields[-1]
                axes.bar(
                    group + place * width,
                    getattr(served, field),
                    width,
                    color=colours[place],
                    alpha=1.0 if front else 0.4,
                    label=served.way if front and group == 0 else None,
                )
    axes.set_xticks(np.arange(len(report.presets)) + 0.4 - width / 2, report.presets, fontsize=8)
