"""The scale run on a tiny config: stages, figures, and the check against PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("diffusers")

from blockcache.runtime import Bundle
from blockcache.tools.bench import random_unet, scale
from blockcache.tools.bench.made_up import made_up


def test_a_scale_run_meters_every_stage_and_agrees_with_torch(
    tiny_models, tmp_path, monkeypatch, capsys
):
    config = {
        k: v for k, v in tiny_models("one-level").unet.config.items() if not k.startswith("_")
    }
    monkeypatch.setitem(random_unet.CONFIGS, "tiny", config)
    figures = tmp_path / "figures.json"
    quick = ["ddim:4:quick:none"]
    scale.main(tmp_path / "bundle", "tiny", "float32", [3], quick, check=True, figures=figures)
    found = json.loads(figures.read_text())
    stages = [stage["name"] for stage in found["stages"]]
    assert stages == ["weights at random", "trace", "weights", "cut", "hash", "presets"]
    assert all(stage["seconds"] > 0 and stage["peak_bytes"] > 0 for stage in found["stages"])
    assert found["check"]["relative_error"] <= 1e-4
    assert 0 < found["check"]["computed_fraction"] < 1
    assert "| trace |" in capsys.readouterr().out
    opened = Bundle.open(tmp_path / "bundle")  # hashes and all
    assert opened.preset_names == ("ddim-3", "ddim-4-quick-none", "ddim-3-made-up")


def test_a_made_up_schedule_reuses_about_half(compiled):
    _, bundle = compiled("sd")
    preset = made_up(bundle.preset("dpm-20"))
    recompute = preset.schedule.recompute
    assert recompute[0].all()
    assert 0.4 <= recompute[1:].mean() <= 0.6
    for k, table in enumerate(preset.alignment.tables):  # the check compares something
        assert np.abs(table[~recompute[:, k]][:, 1]).max() > 0.05


METERED = """
import json
import subprocess
import sys
import numpy as np
from blockcache.tools.bench.stage_meter import StageMeter

meter = StageMeter()
meter.enter("large")
np.ones(64 << 20, np.uint8)
meter.enter("small")
meter.enter("")
print(json.dumps([[stage.name, stage.peak_bytes] for stage in meter.stages]))
"""


def test_a_peak_belongs_to_its_stage():
    """In a process of its own: in this one, memory that other tests freed could be taken again."""
    ran = subprocess.run(
        [sys.executable, "-c", METERED], capture_output=True, text=True, check=True
    )
    (large, large_peak), (small, small_peak) = json.loads(ran.stdout)
    assert (large, small) == ("large", "small")
    assert large_peak - small_peak > 32 << 20
