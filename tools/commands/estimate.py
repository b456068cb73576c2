"""``blockcache estimate``: latency on a GPU that is not here, by a roofline."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockcache.tools.commands.options import AsJson, BundleFolder

if TYPE_CHECKING:
    from blockcache.tools.bench.estimate import Estimate, PresetRow, SegmentRow


HOST = "host"
"""This machine's CPU, in place of a GPU's name."""


def estimate(
    bundle: BundleFolder,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu", help="a100, h100, ..., repeatable; 'host' is this CPU, measured in a second."
        ),
    ] = None,
    images: Annotated[int, typer.Option(help="Images in one call.")] = 1,
    height: Annotated[int | None, typer.Option(help="Of the latents; default the model's.")] = None,
    width: Annotated[int | None, typer.Option(help="Of the latents; default the model's.")] = None,
    timings: Annotated[
        Path | None,
        typer.Option(help="Measured by 'bench --timings': print the error beside the prediction."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict latency: FLOPs and bytes of every segment, a roofline, the speed-up of each preset.

    The text encoder and the VAE are not counted: they are no part of a bundle.

    Example: blockcache estimate sd21 --gpu a100 --gpu h100
    """
    from blockcache.export import gpu as data_sheet
    from blockcache.export import read_timings
    from blockcache.runtime import Bundle
    from blockcache.tools.bench.estimate import estimate as predict
    from blockcache.tools.bench.host import measure_host
    from blockcache.tools.commands.names import warn_of_float32

    names = gpu or ["a100"]
    sheets = {name: data_sheet(name) for name in names if name != HOST}
    opened = Bundle.open(bundle, verify=False)
    measured = read_timings(timings) if timings is not None else None
    for name in sheets:
        warn_of_float32(opened.model.precision, name)
    made = [
        predict(
            opened,
            measure_host() if name == HOST else sheets[name],
            images=images,
            height=height,
            width=width,
            measured=measured,
        )
        for name in names
    ]
    if as_json:
        print(json.dumps([estimate_facts(each) for each in made], indent=1))
    else:
        print("\n\n".join(estimate_text(each) for each in made))


def estimate_facts(made: Estimate) -> dict[str, Any]:
    """The figures as plain data."""
    return {
        "processor": made.processor.name,
        "assumed_bits": 8 * made.processor.item_bytes,
        "sizes": made.sizes.to_json(),
        "step_ms": made.step_ms,
        "block_share": made.block_share,
        "whole_ms": made.whole_ms,
        "step_error": made.step_error,
        "segments": [
            {
                "name": row.segment.name,
                "flops": row.work.flops.sum(),
                "bytes": row.work.bytes.sum(),
                "launches": len(row.work.flops),
                "ms": row.ms,
                "measured_ms": row.measured_ms,
            }
            for row in made.rows
        ],
        "presets": [row.__dict__ for row in made.presets()],
    }


def estimate_text(made: Estimate) -> str:
    """The figures as Markdown."""
    from blockcache.tools.bench.estimate import mean_error
    from blockcache.tools.report.tables import markdown_table

    processor, share, measured = made.processor, made.processor.efficiency, made.measured
    batch, height, width, tokens = astuple(made.sizes)
    blocks, whole = f"{made.block_share:.0%}", made.whole_ms
    columns = ["segment", "GFLOP", "MB", "launches", "ms"]
    columns += ["measured ms", "error"] if measured else []
    lines = [
        f"**{made.bundle.model.name} on {processor.name}**: {made.images} image(s), batch "
        f"{batch}, latents {height} x {width}, {tokens} tokens",
        "",
        f"Peak {processor.tflops:.4g} TFLOP/s of which {share.compute:.0%}, "
        f"{processor.gb_per_s:.4g} GB/s of which {share.memory:.0%}, "
        f"{share.launch_us:g} µs a launch. Assumed precision: {_assumed(made)}.",
        "",
        markdown_table(columns, [_segment_cells(row, measured is not None) for row in made.rows]),
        "",
        f"Step with every block: {made.step_ms:.3f} ms, of which the blocks {blocks}"
        + (f"; the uncut graph, nothing hoisted: {whole:.3f} ms." if whole else "."),
    ]
    if measured is not None and made.step_error is not None:
        lines.append(
            f"Measured on {measured.device}, {measured.backend}: a step {made.step_error:+.0%} "
            f"off, segments {mean_error(made.rows):.0%} on average."
        )
    columns = ["preset", "steps", "block time", "ms an image", "images/s", "speed-up"]
    columns += ["measured ms", "error"] if measured else []
    return "\n".join(
        [*lines, "", markdown_table(columns, [_preset_cells(r) for r in made.presets()])]
    )


def _assumed(made: Estimate) -> str:
    """The precision that a prediction is for, and the bundle's own where that is another."""
    bits, own = 8 * made.processor.item_bytes, made.bundle.model.precision
    differs = bits == 16 and own == "float32"
    return f"{bits} bits" + (f", though the bundle computes in {own}" if differs else "")


def _segment_cells(row: SegmentRow, measured: bool) -> list[str]:
    cells = [
        row.segment.name,
        f"{row.work.flops.sum() / 1e9:.3f}",
        f"{row.work.bytes.sum() / 1e6:.2f}",
        str(len(row.work.flops)),
        f"{row.ms:.4f}",
    ]
    if row.error is not None:
        return [*cells, f"{row.measured_ms:.4f}", f"{row.error:+.0%}"]
    return [*cells, "", ""] if measured else cells


def _preset_cells(row: PresetRow) -> list[str]:
    cells = [
        row.name,
        str(row.steps),
        f"{row.computed_fraction:.0%}",
        f"{row.image_ms:.2f}",
        f"{1e3 / row.image_ms:.3f}",
        f"{row.speedup:.2f}x",
    ]
    if row.measured_ms is None:
        return cells
    return [*cells, f"{row.measured_ms:.2f}", f"{row.image_ms / row.measured_ms - 1:+.0%}"]
