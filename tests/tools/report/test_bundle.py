"""A bundle in 80 columns: no name is cut, no schedule wraps; what presets gain and lose."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("rich")

from rich.console import Console

from blockcache.runtime import Schedule
from blockcache.runtime.provenance import Provenance
from blockcache.tools.report.bundle import bundle_facts, schedule_text
from blockcache.tools.report.presets import (
    PresetRow,
    flops_speedup,
    loss_text,
    preset_rows,
    presets_table,
)


@given(st.integers(1, 300), st.integers(1, 4), st.integers(0, 2**32))
@settings(deadline=None, max_examples=50)
def test_a_schedule_never_wraps_and_shows_every_entry(steps, blocks, seed):
    recompute = np.random.default_rng(seed).random((steps, blocks)) < 0.5
    recompute[0] = True
    paths = [f"down_blocks.{k}.attentions.1" for k in range(blocks)]
    text = str(schedule_text(Schedule(recompute), paths))
    assert max(map(len, text.splitlines())) <= 80
    marks = [line.split(" ")[1] for line in text.splitlines() if line.startswith("down_blocks")]
    bands = [marks[i : i + blocks] for i in range(0, len(marks), blocks)]
    shown = ["".join(band[k] for band in bands) for k in range(blocks)]
    assert shown == ["".join("█" if on else "·" for on in recompute[:, k]) for k in range(blocks)]


def printed(rows):
    console = Console(file=io.StringIO(), width=80)
    console.print(presets_table(rows))
    return console.file.getvalue()


def row(name, **changes):
    facts = {"steps": 1000, "computed_fraction": 1.0, "speedup": 12.345, "loss": 1.23456e-05}
    facts |= {"uncached_steps": 999.9, "recommended": False}
    return PresetRow(name=name, **(facts | changes))


@pytest.mark.parametrize("name", ["ddim-1000-deepcache3-history-distil", "x" * 90])
def test_no_name_is_cut(name):
    text = printed([row(name)])
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert text.count(name[0]) >= name.count(name[0])
    if len(name) < 40:
        assert name in text


def test_the_recommended_preset_is_marked():
    text = printed([row("dpm-20"), row("dpm-20-x1.5", recommended=True)])
    assert "* dpm-20-x1.5" in text
    assert "  dpm-20 " in text


@pytest.mark.parametrize(
    ("loss", "text"), [(None, "unknown"), (0.0, "none"), (0.00211, "0.00211"), (0.5, "0.5")]
)
def test_a_loss_is_three_digits(loss, text):
    assert loss_text(loss) == text


def with_preset(bundle, name, **changes):
    """The bundle with one preset's entry changed."""
    presets = dict(bundle.manifest.presets)
    presets[name] = dataclasses.replace(presets[name], **changes)
    return dataclasses.replace(
        bundle, manifest=dataclasses.replace(bundle.manifest, presets=presets)
    )


def test_gains_and_losses_are_those_of_the_manifest(compiled):
    _, bundle = compiled("sd")
    made = Provenance(kind="budget", predicted_speedup=2.0, predicted_loss=0.01)
    changed = with_preset(bundle, "ddim-4", provenance=made, computed_fraction=0.5)
    (found,) = [row for row in preset_rows(changed) if row.name == "ddim-4"]
    assert (found.speedup, found.loss, found.uncached_steps) == (2.0, 0.01, 2.0)
    facts = bundle_facts(changed)
    assert facts["presets"]["ddim-4"]["loss"] == 0.01
    assert facts["recommended"] == bundle.recommended


def test_a_speedup_that_nobody_predicted_is_counted_in_flops(compiled):
    _, bundle = compiled("sd")
    blocks = sum(s.flops for s in bundle.segments if s.role == "block")
    whole = blocks + sum(s.flops for s in bundle.segments if s.role in ("trunk", "condition"))
    recompute = np.ones((4, len(bundle.model.blocks)), np.bool_)
    recompute[1::2] = False
    made = dataclasses.replace(bundle.preset("ddim-4"), schedule=Schedule(recompute))
    half = dataclasses.replace(bundle, presets={**bundle.presets, "ddim-4": made})
    assert flops_speedup(half, "ddim-4") == pytest.approx(whole / (whole - blocks / 2))
    replaced = Provenance(kind="joint", replaced_steps=8)  # fewer steps count, too
    joint = with_preset(bundle, "ddim-4", provenance=replaced)
    assert flops_speedup(joint, "ddim-4") == 2
    (found,) = [row for row in preset_rows(joint) if row.name == "ddim-4"]
    assert (found.uncached_steps, found.loss) == (4, None)
