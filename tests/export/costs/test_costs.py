"""What one image costs: sums by role, bounds of every schedule, and units that are kept apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from blockcache.export.costs.costs import COUNTED, Costs, counted
from blockcache.runtime import ConfigError, Schedule, Segment

SEGMENTS = (
    Segment("prompt", "prompt", "prompt.onnx", (), (), flops=7_000_000_000),
    Segment("condition", "condition", "condition.onnx", (), (), flops=1_000_000_000),
    Segment("block_01", "block", "block_01.onnx", (), (), block=1, flops=4_000_000_000),
    Segment("trunk_00", "trunk", "trunk_00.onnx", (), (), flops=2_000_000_000),
    Segment("block_00", "block", "block_00.onnx", (), (), block=0, flops=3_000_000_000),
    Segment("time", "time", "time.onnx", (), (), flops=11_000_000_000),
    Segment("whole", "whole", "whole.onnx", (), (), flops=17_000_000_000),
)

costs = st.builds(
    lambda blocks, trunk, prompt: Costs(np.array(blocks), trunk, prompt),
    st.lists(st.integers(1, 64).map(float), min_size=3, max_size=3),
    st.integers(0, 64).map(float),
    st.integers(0, 64).map(float),
)
schedules = hnp.arrays(np.bool_, st.tuples(st.integers(1, 8), st.just(3))).map(
    lambda table: Schedule(np.vstack([np.ones((1, 3), np.bool_), table]))
)


def test_counted_costs_are_gigaflops_by_role():
    made = counted(SEGMENTS)
    assert (made.unit, made.source) == ("GFLOP", COUNTED)
    assert made.blocks.tolist() == [3.0, 4.0], "by block, whatever the order of the segments"
    assert (made.trunk, made.prompt) == (3.0, 7.0)
    assert made.uncached(10) == 7 + 10 * (3 + 7)
    assert made.least(10) == 7 + 10 * 3 + 7
    assert made.largest_speedup(10) == 107 / 44


@given(costs, schedules)
def test_every_schedule_costs_between_the_least_and_uncached(made, schedule):
    steps, image = schedule.steps, made.image(schedule)
    assert made.least(steps) <= image <= made.uncached(steps)
    assert 1 <= made.speedup(schedule) <= made.largest_speedup(steps)
    assert made.image(Schedule.uncached(steps, 3)) == made.uncached(steps)


@given(costs, schedules, st.integers(1, 20))
def test_a_speed_up_is_over_the_run_that_is_replaced(made, schedule, replaced):
    ratio = made.uncached(replaced) / made.image(schedule)
    assert made.speedup(schedule, replaced) == ratio


def test_costs_in_another_unit_are_refused():
    with pytest.raises(ConfigError) as caught:
        Costs(np.ones(1), 1.0, 1.0, unit="s")
    assert str(caught.value) == "Expected costs in one of ('ms', 'GFLOP'), got 's'."
