"""Plots of schedules, measurements and figures, most of them after the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blockcache.runtime import MissingExtraError, Schedule
from blockcache.runtime.files import replacing
from blockcache.tools.report.spread import Spread


def plot_schedule(schedule: Schedule, paths: Sequence[str], file: Path) -> None:
    """One arrow a cache lifetime, from the step that computes to the last that reuses (Fig. 4)."""
    figure, axes = _figure(schedule.steps * 0.32 + 3, schedule.blocks * 0.3 + 1)
    for k in range(schedule.blocks):
        starts = np.flatnonzero(schedule.recompute[:, k])
        ends = np.append(starts[1:], schedule.steps) - 1
        axes.hlines(np.full(len(starts), k), starts, ends + 0.6, color="#3a6ea5", lw=5)
        axes.plot(starts, np.full(len(starts), k), "o", color="#12263f", ms=5)
    axes.set_yticks(range(schedule.blocks), paths, fontsize=8)
    axes.invert_yaxis()
    axes.set_xticks(range(0, schedule.steps, max(1, schedule.steps // 10)))
    axes.set_xlabel("step")
    axes.set_title("● recomputed, then reused along the bar", fontsize=9, loc="left")
    save_figure(figure, file)


def plot_change(
    mean: np.ndarray, std: np.ndarray, paths: Sequence[str], file: Path, title: str = ""
) -> None:
    """Change per step for every block, mean and standard deviation (Fig. 2b).

    ``mean`` and ``std`` are [S, K]; row 0 has no step before it and is left out.
    """
    steps = np.arange(1, mean.shape[0])
    figure, axes = _figure(8, 4.5)
    colors = pyplot().colormaps["viridis"](np.linspace(0, 0.95, mean.shape[1]))
    for k, path in enumerate(paths):
        axes.plot(steps, mean[1:, k], color=colors[k], lw=1.4, label=path)
        low, high = mean[1:, k] - std[1:, k], mean[1:, k] + std[1:, k]
        axes.fill_between(steps, low, high, color=colors[k], alpha=0.15, lw=0)
    axes.set_xlabel("step")
    axes.set_ylabel("change from the step before, $L1_{rel}$ (eq. 6)")
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(fontsize=7, ncols=2)
    save_figure(figure, file)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A measured figure with its range."""

    label: str
    spread: Spread
    note: str = ""  # behind the bar
    bold: bool = False  # in the colour that stands out


def plot_bars(bars: Sequence[Bar], file: Path, x: str, title: str = "") -> None:
    """One bar a figure, its median with its range, from the top down; ``x`` is the axis' label."""
    figure, axes = _figure(8, 0.32 * len(bars) + 1)
    places = np.arange(len(bars))
    medians = np.array([bar.spread.median for bar in bars])
    ranges = np.array([[bar.spread.low, bar.spread.high] for bar in bars]).T
    colors = ["#3a6ea5" if bar.bold else "#b8c4d0" for bar in bars]
    axes.barh(places, medians, xerr=np.abs(ranges - medians), color=colors, ecolor="#12263f")
    for place, bar in zip(places, bars, strict=True):
        axes.annotate(f" {bar.note}", (ranges[1][place], place), va="center", fontsize=7)
    axes.set_yticks(places, [bar.label for bar in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(x)
    axes.set_title(title, fontsize=10, loc="left")
    save_figure(figure, file)


def plot_alignment(
    before: np.ndarray, after: np.ndarray, paths: Sequence[str], file: Path, title: str = ""
) -> None:
    """What alignment repairs: the error of reused outputs per block and step, before and after.

    ``before`` and ``after`` are [S, K] relative errors of the output used against the true one,
    NaN where the block is recomputed (drawn grey). One colour scale for both.
    """
    figure, axes = pyplot().subplots(
        1, 2, figsize=(0.42 * len(before) + 4, 0.32 * len(paths) + 1.4), sharey=True,
        layout="constrained",
    )  # fmt: skip
    top = float(np.nanmax([before, after])) if np.isfinite([before, after]).any() else 1.0
    colours = pyplot().colormaps["magma"].with_extremes(bad="#d9d9d9")
    for cell, errors, name in zip(axes, (before, after), ("before", "after"), strict=True):
        image = cell.imshow(errors.T, vmin=0, vmax=top, cmap=colours, aspect="auto")
        mean = np.nanmean(errors) if np.isfinite(errors).any() else 0.0
        cell.set_title(f"{name}: mean {mean:.3f}", fontsize=9, loc="left")
        cell.set_xlabel("step")
    axes[0].set_yticks(range(len(paths)), paths, fontsize=8)
    figure.colorbar(image, ax=axes, label="relative error")
    figure.suptitle(title, fontsize=10)
    save_figure(figure, file)


def plot_features(features: Sequence[tuple[str, np.ndarray]], file: Path) -> None:
    """Outputs of blocks over the steps, their first three components as colours (Fig. 2a).

    ``features`` holds (path, float [S, C, h, w]); the components are of all steps of a block.
    """
    steps = len(features[0][1])
    shown = np.unique(np.linspace(0, steps - 1, min(steps, 10)).round().astype(int))
    figure, axes = pyplot().subplots(
        len(features), len(shown), figsize=(1.15 * len(shown) + 2.4, 1.25 * len(features) + 0.3),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for cell, step in zip(axes[0], shown, strict=True):
        cell.set_title(f"step {step}", fontsize=8)
    for row, (path, values) in zip(axes, features, strict=True):
        colours = principal_colours(values)
        for cell, step in zip(row, shown, strict=True):
            cell.imshow(colours[step], interpolation="nearest")
            cell.set_xticks([])
            cell.set_yticks([])
        row[0].set_ylabel(path, rotation=0, ha="right", va="center", fontsize=8)
    save_figure(figure, file)


def principal_colours(features: np.ndarray) -> np.ndarray:
    """Three principal components as red, green, blue in 0..1: [S, C, h, w] to [S, h, w, 3]."""
    steps, channels, height, width = features.shape
    rows = features.transpose(0, 2, 3, 1).reshape(-1, channels).astype(np.float64)
    centred = rows - rows.mean(0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    components = centred @ vectors[:, ::-1][:, :3]
    low, high = np.quantile(components, [0.01, 0.99], axis=0)
    scaled = np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1)
    return scaled.reshape(steps, height, width, -1)


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points of one method with their intervals."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]


def plot_frontiers(panels: Sequence[Panel], file: Path) -> None:
    """Quality against speed-up, one line a method, panels two in a row (as the paper's Fig. 7)."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot().subplots(
        rows, columns, figsize=(6.2 * columns, 4.2 * rows), squeeze=False, layout="constrained"
    )
    for cell in axes.flat[len(panels) :]:
        cell.set_axis_off()
    for cell, panel in zip(axes.flat, panels, strict=False):
        cell.axhline(0, color="#666666", lw=0.8)
        for line in panel.lines:
            _draw_line(cell, line)
        cell.set_xlabel(panel.x)
        cell.set_ylabel(panel.y)
        cell.set_title(panel.title, fontsize=10, loc="left")
        cell.grid(alpha=0.25)
        cell.legend(fontsize=7)
    save_figure(figure, file)


def plot_against_delta(
    qualities: Sequence[Line], speedups: Sequence[float], speed: str, title: str, file: Path
) -> None:
    """Quality (left axis) and speed-up (right axis) against the threshold (Fig. 7).

    A panel for each of ``qualities``, whose label says what it is, as ``speed`` does.
    """
    count = len(qualities)
    figure, axes = pyplot().subplots(
        1, count, figsize=(6.2 * count, 4), squeeze=False, layout="constrained"
    )
    for cell, quality in zip(axes.flat, qualities, strict=True):
        _draw_line(cell, quality)
        cell.set_xlabel("threshold δ")
        cell.set_ylabel(quality.label)
        right = cell.twinx()
        right.plot(quality.x, speedups, "s--", color="#b8562b", ms=4, lw=1.2)
        right.set_ylabel(speed, color="#b8562b")
    figure.suptitle(title, fontsize=10)
    save_figure(figure, file)


def _draw_line(axes: Any, line: Line) -> None:
    """Points joined by a line, with error bars."""
    y = np.asarray(line.y)
    errors = np.clip([y - np.asarray(line.low), np.asarray(line.high) - y], 0, None)
    style = "o--" if line.dashed else "o-"
    axes.errorbar(line.x, y, errors, fmt=style, ms=4, lw=1.3, capsize=2, label=line.label)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    figure, axes = pyplot().subplots(figsize=(width, height), layout="constrained")
    return figure, axes


def save_figure(figure: Any, file: Path) -> None:
    """Write a figure in the format of the file's ending, and close it."""
    with replacing(file) as partial:
        figure.savefig(partial, dpi=130, format=file.suffix.lstrip(".") or "png")
    pyplot().close(figure)


def pyplot() -> Any:
    """matplotlib.pyplot, which draws into files; MissingExtraError where it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError.of("matplotlib", "export", "Plotting") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
