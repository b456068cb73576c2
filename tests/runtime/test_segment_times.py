"""Measured times of segments: round trip, what is out of date, what a budget reads."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest

from blockcache.runtime.bundle import Bundle, FileEntry
from blockcache.runtime.errors import BundleFormatError, ConfigError
from blockcache.runtime.plan import LOOP_ROLES
from blockcache.runtime.segment_times import SegmentTimes, read_times, write_times

SIZES = {"batch": 2, "height": 16, "width": 16, "tokens": 7}


@pytest.fixture
def bundle(bundle_copy):
    return Bundle.open(bundle_copy)


def measured(bundle, device="NVIDIA A100-SXM4-80GB", factor=1.0):
    """Made-up times: segment i of the loop takes i + 1 ms."""
    loop = [segment.name for segment in bundle.segments if segment.role in LOOP_ROLES]
    ms = {name: factor * (index + 1.0) for index, name in enumerate(loop)}
    return SegmentTimes.of(bundle, device, "tensorrt_rtx 1.7.1", SIZES, ms)


def test_times_come_back_and_the_newest_first(bundle):
    assert read_times(bundle) == ()
    first, second = measured(bundle), measured(bundle, "NVIDIA H100")
    write_times(bundle, first)
    write_times(bundle, second)
    assert first.file == "times/nvidia-a100-sxm4-80gb-tensorrt-rtx-1.7.1-2x16x7x16.json"
    os.utime(bundle.folder / first.file, (1, 1))
    assert read_times(bundle) == (second, first)
    again = measured(bundle, factor=2.0)
    write_times(bundle, again)  # in the place of the first
    assert read_times(bundle) == (again, second)
    Bundle.open(bundle.folder)  # the manifest does not list them: they come and go


def test_a_budget_reads_block_costs_and_the_rest(bundle):
    times = measured(bundle)
    blocks, rest = times.costs(bundle)
    loop = [segment for segment in bundle.segments if segment.role in LOOP_ROLES]
    assert blocks.shape == (len(bundle.model.blocks),)
    assert blocks[0] == times.ms["block_00"]
    assert blocks.sum() + rest == pytest.approx(sum(range(1, len(loop) + 1)))
    np.testing.assert_array_less(0, blocks)


def test_times_of_another_compile_are_left_out(bundle):
    write_times(bundle, measured(bundle))
    files = {**bundle.manifest.files, "segments/block_00.onnx": FileEntry(1, "other")}
    changed = Bundle(bundle.folder, dataclasses.replace(bundle.manifest, files=files))
    assert read_times(bundle) != ()
    assert read_times(changed) == ()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "blockcache-times"}'])
def test_a_malformed_file_says_what_to_do(bundle, text):
    write_times(bundle, measured(bundle))
    path = bundle.folder / measured(bundle).file
    path.write_text(text)
    with pytest.raises(BundleFormatError, match=r"a100.*Delete it and measure"):
        read_times(bundle)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_time_that_cannot_be_is_refused(bundle, value):
    with pytest.raises(ConfigError, match=r"above 0 ms.*'block_00'"):
        SegmentTimes.of(bundle, "GPU", "trt", SIZES, {"block_00": value})
