"""Pictures and plots: schedules (paper Fig. 4), change over steps (Fig. 2b), image grids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blockcache.runtime import MissingExtraError, Schedule

if TYPE_CHECKING:
    from blockcache.tools.bench.latency import Row


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
    _save(figure, file)


def plot_change(
    mean: np.ndarray, std: np.ndarray, paths: Sequence[str], file: Path, title: str = ""
) -> None:
    """Change per step for every block, mean and standard deviation (Fig. 2b).

    ``mean`` and ``std`` are [S, K]; row 0 has no step before it and is left out.
    """
    steps = np.arange(1, mean.shape[0])
    figure, axes = _figure(8, 4.5)
    colors = _pyplot().colormaps["viridis"](np.linspace(0, 0.95, mean.shape[1]))
    for k, path in enumerate(paths):
        axes.plot(steps, mean[1:, k], color=colors[k], lw=1.4, label=path)
        low, high = mean[1:, k] - std[1:, k], mean[1:, k] + std[1:, k]
        axes.fill_between(steps, low, high, color=colors[k], alpha=0.15, lw=0)
    axes.set_xlabel("step")
    axes.set_ylabel("change from the step before, $L1_{rel}$ (eq. 6)")
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(fontsize=7, ncols=2)
    _save(figure, file)


def plot_latency(rows: Sequence[Row], file: Path, title: str = "") -> None:
    """Seconds of a call, one bar a contestant, median with its range; cached ones stand out."""
    figure, axes = _figure(8, 0.32 * len(rows) + 1)
    places = np.arange(len(rows))
    medians = np.array([row.seconds.median for row in rows])
    ranges = np.array([[row.seconds.low, row.seconds.high] for row in rows]).T
    colors = ["#3a6ea5" if row.kind == "cached" else "#b8c4d0" for row in rows]
    axes.barh(places, medians, xerr=np.abs(ranges - medians), color=colors, ecolor="#12263f")
    for place, row in zip(places, rows, strict=True):
        label = f" {row.speedup.median:.2f}x" if row.speedup else ""
        axes.annotate(label, (ranges[1][place], place), va="center", fontsize=7)
    axes.set_yticks(places, [f"{r.engine} {r.kind} {r.preset}" for r in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds a call (median, range)")
    axes.set_title(title, fontsize=10, loc="left")
    _save(figure, file)


def save_pictures(pictures: np.ndarray, file: Path, scale: int = 2) -> None:
    """uint8 [N, H, W, 3] side by side, enlarged."""
    image = _pillow().fromarray(np.concatenate(list(pictures), axis=1))
    image = image.resize((image.width * scale, image.height * scale), _pillow().LANCZOS)
    _save_image(image, file)


def save_grid(rows: Sequence[tuple[str, np.ndarray]], columns: Sequence[str], file: Path) -> None:
    """A captioned grid: one row a run, one column a prompt.

    Args:
        rows: (caption, pictures uint8 [N, H, W, 3]).
        columns: N captions.
        file: PNG.
    """
    count = len(columns)
    figure, axes = _pyplot().subplots(
        len(rows), count, figsize=(1.55 * count + 2.4, 1.75 * len(rows) + 0.3), squeeze=False
    )
    for row, (caption, pictures) in enumerate(rows):
        for column in range(count):
            cell = axes[row][column]
            cell.imshow(pictures[column], interpolation="lanczos")
            cell.set_xticks([])
            cell.set_yticks([])
            for spine in cell.spines.values():
                spine.set_visible(False)
            if row == 0:
                cell.set_title(columns[column].replace(", ", ",\n"), fontsize=8)
        axes[row][0].set_ylabel(
            caption, rotation=0, ha="right", va="center", fontsize=9, labelpad=8
        )
    figure.tight_layout()
    _save(figure, file)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    figure, axes = _pyplot().subplots(figsize=(width, height), layout="constrained")
    return figure, axes


def _save(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}")
    figure.savefig(partial, dpi=130, format=file.suffix.lstrip(".") or "png")
    _pyplot().close(figure)
    partial.replace(file)


def _save_image(image: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}")
    image.save(partial, format="PNG")
    partial.replace(file)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError.of("matplotlib", "export", "Plotting") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError.of("pillow", "export", "Writing pictures") from error
    return Image
