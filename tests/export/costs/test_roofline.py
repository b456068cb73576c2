"""The roofline: its arithmetic by hand, its properties, and what the scheduler gets from it."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

from blockcache.export.costs.roofline import DATA_SHEETS, Efficiency, Processor, gpu, predict
from blockcache.export.costs.timings import Timings, read_timings, write_timings
from blockcache.export.engines.targets import GPUS
from blockcache.export.graph.work import Fusion, Work
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import Schedule, Sizes

SIZES = Sizes(batch=2, height=16, width=16, tokens=7)
PLAIN = Efficiency(compute=0.5, memory=0.25, launch_us=2.0)
MADE = Processor(name="made", tflops=1.0, gb_per_s=100.0, efficiency=PLAIN)


def work(flops, moved):
    return Work(np.array(flops, np.float64), np.array(moved, np.float64))


def test_a_launch_takes_the_longer_of_arithmetic_and_traffic_and_its_fixed_time():
    # 1e9 flops at 0.5 TFLOP/s: 2 ms. 1e8 bytes at 25 GB/s: 4 ms.
    assert MADE.milliseconds(work([1e9], [0])) == pytest.approx(2.002)
    assert MADE.milliseconds(work([1e9], [1e8])) == pytest.approx(4.002)
    assert MADE.milliseconds(work([1e9, 0], [0, 1e8])) == pytest.approx(6.004)
    assert MADE.milliseconds(work([], [])) == 0


amounts = st.lists(st.tuples(st.floats(0, 1e12), st.floats(0, 1e9)), min_size=1, max_size=8)


@given(rows=amounts)
def test_joining_launches_never_takes_longer(rows):
    """Why a split costs: one kernel that does the work of several overlaps and starts once."""
    flops, moved = np.array(rows).T
    joined = MADE.milliseconds(work([flops.sum()], [moved.sum()]))
    assert joined <= MADE.milliseconds(work(flops, moved)) * (1 + 1e-12)


@pytest.mark.parametrize(
    "values", [{"compute": 0.0}, {"memory": 1.2}, {"launch_us": -1.0}, {"compute": float("nan")}]
)
def test_impossible_efficiencies_are_refused(values):
    given = {"compute": 0.5, "memory": 0.5, "launch_us": 1.0, **values}
    with pytest.raises(ConfigError, match="Expected shares of a peak"):
        Efficiency(**given)


def test_every_gpu_that_engines_are_built_for_has_a_data_sheet():
    assert DATA_SHEETS.keys() == GPUS.keys()


def test_an_unknown_gpu_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"Expected a GPU of \['a10', .*'t4'\], got 'voodoo'\."):
        gpu("voodoo")


def predicted(bundle, processor, **sizes):
    return predict(
        bundle.segments, bundle.folder, processor, dataclasses.replace(bundle.model.sizes, **sizes)
    )


def test_every_segment_but_the_offline_one_is_predicted(compiled):
    _, bundle = compiled("sdxl")
    made = predicted(bundle, gpu("a100"))
    assert made.segment_ms.keys() == {s.name for s in bundle.segments if s.role != "time"}
    assert all(ms > 0 for ms in made.segment_ms.values())


def test_more_work_takes_longer_and_a_larger_gpu_less(compiled):
    _, bundle = compiled("sd")
    base, batch, wide, large = (
        predicted(bundle, gpu("a100")),
        predicted(bundle, gpu("a100"), batch=8),
        predicted(bundle, gpu("a100"), height=32),
        predicted(bundle, gpu("h100")),
    )
    for segment in bundle.segments:
        if segment.role in ("trunk", "block"):
            name = segment.name
            assert batch.segment_ms[name] > base.segment_ms[name] > large.segment_ms[name]
            assert wide.segment_ms[name] > base.segment_ms[name]


def test_node_by_node_takes_longer_than_a_compiler(compiled):
    _, bundle = compiled("sd")
    plain = Processor(name="plain", tflops=1.0, gb_per_s=100.0, fusion=Fusion.NONE)
    fused = Processor(name="fused", tflops=1.0, gb_per_s=100.0)
    slow, fast = predicted(bundle, plain), predicted(bundle, fused)
    assert all(slow.segment_ms[name] >= ms for name, ms in fast.segment_ms.items())


def test_costs_add_up_to_the_segments_a_schedule_runs(compiled):
    """What the budget scheduler minimises is the time of exactly the launches of a request."""
    _, bundle = compiled("sdxl")
    made = predicted(bundle, gpu("h100"))
    costs = made.costs(bundle.segments)
    assert costs.blocks.shape == (len(bundle.model.blocks),)
    table = np.random.default_rng(0).random((9, len(costs.blocks))) < 0.4
    table[0] = True
    total = 0.0
    for segment in bundle.segments:
        runs = {"prompt": 1, "trunk": 9, "condition": 9, "time": 0, "whole": 0}.get(segment.role)
        if segment.block is not None:
            runs = int(table[:, segment.block].sum())
        total += runs * made.segment_ms.get(segment.name, 0.0)
    assert costs.image(Schedule(table)) == pytest.approx(total, rel=1e-12)


def test_timings_come_back_from_a_file(tmp_path):
    sizes = SIZES
    made = Timings("ort-cpu-2", "some CPU x 2", sizes, {"trunk_00": 1.25, "block_00": 0.0})
    path = tmp_path / "t.json"
    write_timings(path, made)
    assert read_timings(path) == made
    assert json.loads(path.read_text())["format"] == "blockcache-timings"


def test_timings_of_another_model_are_refused(compiled):
    _, bundle = compiled("sd")
    made = Timings("ort-cpu-2", "some CPU", SIZES, {"trunk_00": 1.0})
    count = sum(s.role in ("trunk", "block") for s in bundle.segments) - 1
    wanted = f"block_00, trunk_01, block_01, trunk_02, block_02 ({count} in all) have none: these"
    with pytest.raises(ConfigError, match=re.escape(wanted)):
        made.costs(bundle.segments)


@pytest.mark.parametrize("ms", [-1.0, float("nan"), float("inf")])
def test_impossible_times_are_refused(ms):
    with pytest.raises(ConfigError, match="Expected times in ms of 0 or more, got"):
        Timings("ort", "cpu", SIZES, {"trunk_00": ms})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other"}', "\udcff"])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    path = tmp_path / "t.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match="Expected timings that 'blockcache bench --timings'"):
        read_timings(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"Expected a file of timings at .*nowhere, found none"):
        read_timings(tmp_path / "nowhere")
