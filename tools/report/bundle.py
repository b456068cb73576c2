"""What is in a bundle, for people (80 columns) and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from blockcache.runtime import Bundle, Schedule
from blockcache.tools.report.presets import preset_rows, presets_table

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

COLUMNS = 80
IN_THE_LOOP = ("trunk", "block", "condition")
"""Roles of segments that run at a step."""


def print_bundle(bundle: Bundle, preset: str | None = None) -> None:
    """Print segments, one preset's schedule (default the recommended one), and all presets."""
    from rich.console import Console

    console = Console()
    chosen = preset or bundle.recommended
    console.print(_header(bundle), highlight=False)
    console.print(_segments_table(bundle))
    console.print(f"schedule of {chosen}: █ recomputed, · reused", highlight=False)
    paths = [block.path for block in bundle.model.blocks]
    console.print(schedule_text(bundle.preset(chosen).schedule, paths))
    console.print(presets_table(preset_rows(bundle)))
    console.print(_footnote(bundle), style="dim", highlight=False)


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """The same as plain data."""
    rows = [asdict(row) for row in preset_rows(bundle)]
    return {
        "folder": str(bundle.folder),
        "model": bundle.model.name,
        "precision": bundle.model.precision,
        "blocks": [block.path for block in bundle.model.blocks],
        "bytes": sum(entry.bytes for entry in bundle.manifest.files.values()),
        "segments": [
            {"name": s.name, "role": s.role, "gflops": round(s.flops / 1e9, 4)}
            for s in bundle.segments
        ],
        "parts": [
            {"name": p.name, "role": p.role, "gflops": round(p.flops / 1e9, 4)}
            for p in bundle.manifest.parts
        ],
        "recommended": bundle.recommended,
        "presets": {row.pop("name"): row for row in rows},
    }


def schedule_text(schedule: Schedule, paths: Sequence[str], columns: int = COLUMNS) -> Text:
    """Blocks by steps, as in the paper's Fig. 4; many steps take several bands."""
    from rich.text import Text

    label = max(len(path) for path in paths)
    room = max(10, columns - label - 9)  # beside the marks: the path, "  20/20"
    bands = -(-schedule.steps // room)
    width = -(-schedule.steps // bands)
    lines = []
    for start in range(0, schedule.steps, width):
        band = schedule.recompute[start : start + width]
        if bands > 1:
            lines.append(f"steps {start} to {start + len(band) - 1}")
        for k, path in enumerate(paths):
            marks = "".join("█" if on else "·" for on in band[:, k])
            lines.append(f"{path:>{label}} {marks} {int(band[:, k].sum()):>3}/{len(band)}")
    return Text("\n".join(lines))


def _header(bundle: Bundle) -> str:
    model, sizes = bundle.model, bundle.model.sizes
    total = sum(entry.bytes for entry in bundle.manifest.files.values())
    return (
        f"[bold]{model.name}[/]  {model.precision}, {len(model.blocks)} blocks, "
        f"{total / 1e6:.1f} MB, latents {model.channels} x {sizes.height} x {sizes.width}"
    )


def _segments_table(bundle: Bundle) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("segment", no_wrap=True)
    table.add_column("source", overflow="fold")
    for title in ("GFLOP", "share", "inputs", "outputs"):
        table.add_column(title, justify="right", no_wrap=True)
    loop = sum(s.flops for s in bundle.segments if s.role in IN_THE_LOOP)
    for segment in (*bundle.segments, *bundle.manifest.parts):
        block = segment.block
        source = bundle.model.blocks[block].path if block is not None else segment.role
        table.add_row(
            segment.name,
            source,
            f"{segment.flops / 1e9:.3f}",
            f"{segment.flops / loop:.1%}" if segment.role in IN_THE_LOOP else "",
            str(len(segment.inputs)),
            str(len(segment.outputs)),
            style="cyan" if segment.role == "block" else "",
        )
    return table


def _footnote(bundle: Bundle) -> str:
    """What the table of presets leaves open: guidance, and whose costs the speed-ups count."""
    entries = bundle.manifest.presets.values()
    guidance = ", ".join(sorted({f"{entry.guidance_scale:g}" for entry in entries}))
    costs = ", ".join(sorted({entry.provenance.costs or "FLOPs" for entry in entries}))
    return (
        f"* recommended. Guidance {guidance}; costs: {costs}. Predicted loss: relative L2 of the "
        f"final latents to the uncached run (of x and ms: to the converged run). Steps at that "
        f"cost: of an uncached run."
    )
