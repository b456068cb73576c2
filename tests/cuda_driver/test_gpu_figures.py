"""The figures of a GPU with PyTorch, measured on the stand-in: it is all there, and adds up."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("torch")
from blockcache.tools.bench import gpu_figures

pytestmark = pytest.mark.driver


def test_the_page_and_its_data(bundles, place_of, tmp_path):
    """With BLOCKCACHE_TEST_FIGURES they stay in that folder: the dry run of ``gpu.py``."""
    out = Path(os.environ.get("BLOCKCACHE_TEST_FIGURES") or tmp_path)
    page = gpu_figures.report([Path(bundles["2"])], place_of, 1, out / "figures.json")
    (out / "figures.md").write_text(page)
    data = json.loads((out / "figures.json").read_text())
    assert data["machine"]["device"] == "Stand-in GPU 0"
    (found,) = data["bundles"]
    assert found["absent"] == {}
    assert [(t["how"], t["what"]) for t in found["times"]] == [
        (how, what) for how in ("graphs", "launches") for what in ("whole", "split", "cached")
    ]
    named = {ratio["name"]: ratio["value"]["median"] for ratio in found["ratios"]}
    assert set(named) == {
        *(f"split / whole, {how}" for how in ("graphs", "launches")),
        *(f"cached / segments it ran, {how}" for how in ("graphs", "launches")),
        "two sessions at once / in turn",
    }
    assert all(value > 0 for value in named.values())
    assert set(found["host_us_per_step"]) == {"graphs", "launches"}
    for shown in ("### tiny-sd, float32, 4 steps, ", "| cached, by graphs |", "| <= 1.03 |"):
        assert shown in page
