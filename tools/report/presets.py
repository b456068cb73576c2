"""What each preset of a bundle gains and loses, as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blockcache.runtime import Bundle
from blockcache.runtime.run_table import flops_run
from blockcache.tools.report.spread import Spread

if TYPE_CHECKING:
    from rich.table import Table

MARK = "*"
"""Stands before the recommended preset."""


@dataclass(frozen=True, kw_only=True)
class PresetRow:
    """The predictions that a bundle holds about one preset."""

    name: str
    steps: int
    computed_fraction: float  # of the blocks' FLOPs
    speedup: float  # over the uncached run that it replaces
    loss: float | None  # relative L2 of the final latents to that run; None: not predicted
    uncached_steps: float  # of the uncached run that costs as much
    recommended: bool


def preset_rows(bundle: Bundle) -> list[PresetRow]:
    """One row a preset, in the bundle's order.

    A speed-up that the compile did not predict is counted in FLOPs.
    """
    rows = []
    for name, entry in bundle.manifest.presets.items():
        made = entry.provenance
        replaced = made.replaced_steps or entry.steps
        uncached = entry.computed_fraction == 1 and replaced == entry.steps
        speedup = made.predicted_speedup or flops_speedup(bundle, name)
        rows.append(
            PresetRow(
                name=name,
                steps=entry.steps,
                computed_fraction=entry.computed_fraction,
                speedup=speedup,
                loss=0.0 if uncached else made.predicted_loss,
                uncached_steps=replaced / speedup,
                recommended=name == bundle.recommended,
            )
        )
    return rows


def image_flops(bundle: Bundle, preset: str) -> float:
    """FLOPs of one image with a preset, at the model's default sizes."""
    return float(flops_run(bundle.segments, bundle.preset(preset).schedule).sum())


def flops_speedup(bundle: Bundle, preset: str) -> float:
    """How many times fewer FLOPs a preset takes than the uncached run that it replaces."""
    entry = bundle.manifest.presets[preset]
    whole = sum(s.flops for s in bundle.segments if s.role in ("trunk", "condition", "block"))
    return (entry.provenance.replaced_steps or entry.steps) * whole / image_flops(bundle, preset)


def presets_table(rows: Sequence[PresetRow]) -> Table:
    """For people: 80 columns wide or less, no name cut."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column(f"{MARK} preset", overflow="fold")
    titles = ("steps", "blocks\nrun", "speed-up", "predicted\nloss", "steps at\nthat cost")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{MARK if row.recommended else ' '} {row.name}",
            str(row.steps),
            f"{row.computed_fraction:.1%}",
            f"{row.speedup:.2f}x",
            loss_text(row.loss),
            f"{row.uncached_steps:.1f}",
            style="bold" if row.recommended else "",
        )
    return table


def loss_text(loss: float | None) -> str:
    """A predicted loss in three digits: "0.0021"; "none" for a run without reuse."""
    if loss is None:
        return "unknown"
    return f"{loss:.3g}" if loss else "none"


def plot_presets(rows: Sequence[PresetRow], file: Path, title: str) -> None:
    """The table as a picture: a bar a preset, as long as its speed-up."""
    from blockcache.tools.report.plots import Bar, plot_bars

    bars = [
        Bar(
            label=row.name,
            spread=Spread(row.speedup, row.speedup, row.speedup),
            note=f"loss {loss_text(row.loss)}, costs {row.uncached_steps:.1f} uncached steps",
            bold=row.recommended,
        )
        for row in rows
    ]
    plot_bars(bars, file, "predicted speed-up (the recommended preset is blue)", title)
