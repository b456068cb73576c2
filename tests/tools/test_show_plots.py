"""``show``'s plots of what alignment repairs and of blocks' outputs over the steps."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("diffusers")

from blockcache.export.bundle_writer import write_preset
from blockcache.runtime import Bundle
from blockcache.runtime.bundles.bundle_files import hash_files
from blockcache.runtime.bundles.tensor_files import write_tensors
from blockcache.runtime.files import write_text
from blockcache.runtime.provenance import Provenance
from blockcache.tools import cli


def show(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["blockcache", "show", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


def align(bundle_copy):
    """Make ddim-4 a cached preset with a report of its alignment."""
    bundle = Bundle.open(bundle_copy)
    preset, entry = bundle.preset("ddim-4"), bundle.manifest.presets["ddim-4"]
    recompute = preset.schedule.recompute.copy()
    recompute[[1, 3]] = False
    preset = dataclasses.replace(
        preset, schedule=dataclasses.replace(preset.schedule, recompute=recompute)
    )
    file = write_preset(bundle_copy, preset)
    before = np.where(recompute, 0, 0.5).astype(np.float32)
    report = "profiles/a.safetensors"
    write_tensors(bundle_copy / report, {"before": before, "after": before / 5})
    made = Provenance(kind="threshold", alignment="history", alignment_report=report)
    flops = [segment.flops for segment in bundle.segments if segment.role == "block"]
    computed = preset.schedule.computed_fraction(np.array(flops, np.float64))
    entry = dataclasses.replace(
        entry, file=file, provenance=made, computed_fraction=round(computed, 6)
    )
    manifest = dataclasses.replace(
        bundle.manifest,
        presets={**bundle.manifest.presets, "ddim-4": entry},
        files={
            **bundle.manifest.files,
            **hash_files(bundle_copy, [entry.file, report]),
        },
    )
    write_text(bundle_copy / "manifest.json", manifest.to_json())


def test_what_alignment_repairs_is_drawn(bundle_copy, monkeypatch, tmp_path):
    align(bundle_copy)
    file = tmp_path / "alignment.svg"
    assert show(monkeypatch, bundle_copy, "--preset", "ddim-4", "--plot-alignment", file) == 0
    text = file.read_text()
    assert "<!-- before: mean 0.500 -->" in text  # recomputed entries do not count
    assert "<!-- after: mean 0.100 -->" in text
    assert "<!-- ddim-4: error of reused outputs, history -->" in text


def test_a_preset_without_alignment_says_so(bundle_copy, monkeypatch, capsys, tmp_path):
    arguments = ["--preset", "ddim-4", "--plot-alignment", tmp_path / "a.svg"]
    assert show(monkeypatch, bundle_copy, *arguments) == 1
    assert "error: Preset 'ddim-4' holds no report of an alignment." in capsys.readouterr().err


def test_outputs_over_the_steps_need_the_source_model(bundle_copy, monkeypatch, capsys, tmp_path):
    assert show(monkeypatch, bundle_copy, "--plot-features", tmp_path / "f.png") == 1
    assert "error: Expected --model FOLDER: blocks' outputs" in capsys.readouterr().err
