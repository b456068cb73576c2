"""Measured times of segments in a bundle: round trip, what is out of date, what a budget reads."""

from __future__ import annotations

import dataclasses
import os

import pytest

from blockcache.export.costs.bundle_timings import bundle_timings, keep_timings
from blockcache.export.costs.timings import Timings
from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.bundles.manifest import FileEntry
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import LOOP_ROLES, Sizes

SIZES = Sizes(batch=2, height=16, width=16, tokens=7)


@pytest.fixture
def bundle(bundle_copy):
    return Bundle.open(bundle_copy)


def made_up(bundle, device="NVIDIA A100-SXM4-80GB", factor=1.0):
    """Segment i of the loop takes i + 1 ms."""
    loop = [segment.name for segment in bundle.segments if segment.role in LOOP_ROLES]
    times = {name: factor * (index + 1.0) for index, name in enumerate(loop)}
    return Timings("tensorrt_rtx 1.7.1", device, SIZES, times)


def test_times_come_back_and_the_newest_first(bundle):
    assert bundle_timings(bundle) == ()
    first, second = made_up(bundle), made_up(bundle, "NVIDIA H100")
    keep_timings(bundle, first)
    (path,) = (bundle.folder / "times").iterdir()
    assert path.name.endswith("-nvidia-a100-sxm4-80gb-tensorrt-rtx-1.7.1-2x16x7x16.json")
    os.utime(path, (1, 1))
    keep_timings(bundle, second)
    assert bundle_timings(bundle) == (second, first)
    again = made_up(bundle, factor=2.0)
    keep_timings(bundle, again)  # in the place of the first
    assert bundle_timings(bundle) == (again, second)
    Bundle.open(bundle.folder)  # the manifest does not list them: they come and go


def test_a_budget_reads_block_costs_and_the_rest(bundle):
    keep_timings(bundle, made_up(bundle))
    (times,) = bundle_timings(bundle)
    costs = times.costs(bundle.segments)
    loop = [segment for segment in bundle.segments if segment.role in LOOP_ROLES]
    assert costs.blocks.shape == (len(bundle.model.blocks),)
    assert costs.blocks.sum() + costs.trunk == sum(range(1, len(loop) + 1))


def test_times_of_another_compile_are_left_out(bundle):
    keep_timings(bundle, made_up(bundle))
    block = next(segment for segment in bundle.segments if segment.role == "block")
    files = {**bundle.manifest.files, block.file: FileEntry(1, "other")}
    manifest = dataclasses.replace(bundle.manifest, files=files)
    changed = dataclasses.replace(bundle, manifest=manifest)
    assert len(bundle_timings(bundle)) == 1
    assert bundle_timings(changed) == ()


def test_a_malformed_file_is_named(bundle):
    keep_timings(bundle, made_up(bundle))
    (path,) = (bundle.folder / "times").iterdir()
    path.write_text("[]")
    with pytest.raises(ConfigError, match="a100"):
        bundle_timings(bundle)
