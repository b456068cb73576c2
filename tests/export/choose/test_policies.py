"""Policies: their texts, and the schedules they stand for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from blockcache.export.choose import policies
from blockcache.export.choose.policies import (
    KINDS,
    MOST,
    UNCACHED,
    Branches,
    Budget,
    ChangeBudget,
    DeepCache,
    Evidence,
    Interval,
    Joint,
    JointLatency,
    Latency,
    Needs,
    Policy,
    Quick,
    SmoothCache,
    Table,
    Threshold,
    ThresholdSpeedup,
    affordable,
    predicted_loss,
)
from blockcache.export.choose.schedule import budget, least_loss, threshold
from blockcache.export.costs.costs import BranchCost, Costs
from blockcache.runtime import ConfigError, Provenance, Schedule

TABLE = {
    "0.5": Threshold(0.5),
    "d0.5": Threshold(0.5),
    "t1.5": ThresholdSpeedup(1.5),
    "blocks1.5": Budget(1.5),
    "branch2": Branches(2),
    "blocksms250": Latency(250),
    "ms250": JointLatency(250),
    "x2": Joint(2),
    "quick": Quick(),
    "c1.5": ChangeBudget(1.5),
    "every3": Interval(3),
    "deepcache3": DeepCache(3),
    "smooth0.1": SmoothCache(0.1),
    "FILE.json": Table(Path("FILE.json")),
    "tmax": ThresholdSpeedup(MOST),
    "blocksmax": Budget(MOST),
    "cmax": ChangeBudget(MOST),
    "blocks:max": Budget(MOST),
}


@pytest.mark.parametrize(("text", "policy"), TABLE.items())
def test_the_texts_are_read(text, policy):
    assert Policy.parse(text) == policy
    assert f"``{text}``" in (policies.__doc__ or ""), "and documented"


def test_every_kind_has_a_text_and_a_name_of_its_own():
    assert {type(policy) for policy in TABLE.values()} | {type(UNCACHED)} == set(KINDS)
    assert len({kind.kind for kind in KINDS}) == len(KINDS)


NUMBERS = ["1", "1.", "10.25", "1e2", "1e+2", "1.5e0", "100e-2"]


@pytest.mark.parametrize("number", [*NUMBERS, ".5"])
def test_a_number_is_read_as_python_reads_it(number):
    assert Policy.parse(number).value == float(number)


SPEEDUPS = (ThresholdSpeedup, Budget, ChangeBudget)


def six_digits(value):
    return float(f"{value:g}")


numbers = st.floats(1, 1e12).map(six_digits)
small = numbers.map(lambda value: six_digits(1 / value))
named = st.one_of(
    st.builds(
        lambda kind, value: kind(value),
        st.sampled_from([Threshold, SmoothCache, Joint, Latency, *SPEEDUPS]),
        numbers,
    ),
    st.builds(lambda kind, value: kind(value), st.sampled_from([Threshold, SmoothCache]), small),
    st.builds(lambda kind, value: kind(value), st.sampled_from(SPEEDUPS), st.just(MOST)),
    st.builds(
        lambda kind, value: kind(value),
        st.sampled_from([Interval, DeepCache]),
        st.integers(1, 999),
    ),
)


@given(named)
def test_the_short_name_reads_back_as_the_policy(policy):
    """Of values with six digits; a name has no more."""
    assert Policy.parse(policy.text) == policy


@given(named)
def test_a_policy_is_a_value_that_provenance_holds(policy):
    assert hash(policy) == hash(Policy.parse(policy.text))
    made = Provenance(kind=policy.kind, value=policy.value)
    assert Provenance.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert (policy.value is None) is policy.text.endswith("max")


def test_different_kinds_with_the_same_value_have_different_names():
    kinds = [kind for kind in KINDS if kind not in (type(UNCACHED), Quick, Table)]
    made = [kind(2) for kind in kinds]
    assert len({policy.text for policy in [*made, UNCACHED]}) == len(kinds) + 1


def test_a_table_is_named_after_its_file():
    assert Policy.parse("/some/where/my best (2).json").text == "my-best--2-"
    assert Policy.parse(f"{'long' * 50}.json").text == "long" * 15


UNREADABLE = [
    "",
    "x",
    "-1",
    "d-1",
    "half",
    "speed2",
    "1.2.3",
    ".",
    "x1,5",
    "0.5 ",
    "nan",
    "inf",
    "xinf",
    "max",
    "jmax",
    "dmax",
    "msmax",
    "everymax",
    "blocksmax2",
    "1e999",
    "x1e999",
    "٣",
]


@pytest.mark.parametrize("text", UNREADABLE)
def test_a_text_that_is_no_policy_shows_examples(text):
    with pytest.raises(ConfigError) as caught:
        Policy.parse(text)
    assert str(caught.value) == (
        f"Expected a policy such as x2 (speed-up), ms250 (latency), 0.5 (delta), blocks1.5, "
        f"blocksmax (the most there is), every3, deepcache3, smooth0.1 or FILE.json, got "
        f"{text!r}."
    )


OUT_OF_RANGE = {
    "x0.5": "number of 1 or more for the policy 'joint', got 0.5",
    "c0": "number of 1 or more for the policy 'change-budget', got 0",
    "every0": "whole number of 1 or more for the policy 'interval', got 0",
    "every2.5": "whole number of 1 or more for the policy 'interval', got 2.5",
    "deepcache1.2": "whole number of 1 or more for the policy 'deepcache', got 1.2",
}


@pytest.mark.parametrize(("text", "expected"), OUT_OF_RANGE.items())
def test_a_value_out_of_range_is_refused(text, expected):
    with pytest.raises(ConfigError) as caught:
        Policy.parse(text)
    assert str(caught.value) == f"Expected a {expected}."


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_a_threshold_that_is_negative_or_no_number_is_refused(value):
    with pytest.raises(ConfigError, match="Expected a number of 0 or more"):
        Threshold(value)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_latency_is_a_time(value):
    with pytest.raises(ConfigError, match="Expected a number of milliseconds above 0, got"):
        Latency(value)


# -- schedules -------------------------------------------------------------------------------------

CHANGE = np.array(
    [[0.0, 0.0, 0.0], [0.1, 0.5, 0.2], [0.2, 0.1, 0.3], [0.4, 0.3, 0.1], [0.1, 0.2, 0.1],
     [0.3, 0.6, 0.4]]
)  # fmt: skip
SENSITIVITY = np.array(
    [[0.0, 0.0, 0.0], [0.5, 0.1, 0.2], [0.4, 0.1, 0.1], [0.6, 0.1, 0.1], [0.2, 0.2, 0.3],
     [0.1, 0.1, 0.3]]
)  # fmt: skip
RESIDUALS = np.array(
    [[[1 + 0.5 * k * (s - a - 1) if a < s else 0.0 for a in range(6)] for s in range(6)]
     for k in range(3)]
)  # fmt: skip
COSTS = Costs(np.array([1.5, 4.0, 2.0]), trunk=3.0, prompt=1.0)
PATHS = ["down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0"]
FACTS = Evidence(
    steps=6,
    paths=PATHS,
    costs=COSTS,
    change=CHANGE,
    sensitivity=SENSITIVITY,
    residuals=RESIDUALS,
)


def recompute(text, facts=FACTS):
    return Policy.parse(text).schedule(facts).recompute


def test_the_policies_that_need_no_measurement_make_their_tables_without_one(tmp_path):
    bare = Evidence(steps=6, paths=PATHS)
    assert UNCACHED.schedule(bare).recompute.shape == (6, 3)
    assert UNCACHED.schedule(bare).recompute.all()
    assert recompute("every4", bare).astype(int).T.tolist() == [[1, 0, 0, 0, 1, 0]] * 3
    assert recompute("deepcache4", bare).astype(int).sum(axis=0).tolist() == [6, 2, 6]
    file = tmp_path / "t.json"
    file.write_text(json.dumps([[1, 1, 1]] + [[0, 1, 0]] * 5))
    assert recompute(str(file), bare).astype(int).sum(axis=0).tolist() == [1, 6, 1]
    shallow = [[1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 1, 1]]  # columns: the whole, depths 0, 1, 2
    assert recompute("quick", bare).astype(int).tolist() == 2 * shallow
    texts = ["every4", "deepcache4", "quick", str(file)]
    assert {Policy.parse(text).needs for text in texts} == {Needs.NOTHING}


def test_a_threshold_is_eq_7():
    np.testing.assert_array_equal(recompute("0.4"), threshold(CHANGE, 0.4).recompute)
    assert Policy.parse("0.4").needs == Needs.CHANGE


def test_smoothcache_reuses_where_the_mean_change_is_small():
    assert recompute("smooth0.4").all(axis=1).astype(int).tolist() == [1, 0, 1, 0, 1, 1]


def test_a_budget_is_the_least_predicted_loss_and_a_change_budget_the_least_change():
    spend = affordable(COSTS, 6, 1.4)
    loss = predicted_loss(SENSITIVITY, RESIDUALS)
    np.testing.assert_array_equal(recompute("c1.4"), budget(CHANGE, COSTS.blocks, spend).recompute)
    np.testing.assert_array_equal(
        recompute("blocks1.4"), least_loss(loss, COSTS.blocks, spend).recompute
    )
    assert (recompute("blocks1.4") != recompute("c1.4")).any()
    assert Needs.LOSSES in Policy.parse("x1.4").needs
    assert Needs.LOSSES not in Policy.parse("c1.4").needs


def test_the_predicted_loss_is_the_sensitivity_where_the_step_before_is_reused():
    loss = predicted_loss(SENSITIVITY, RESIDUALS)
    for step in range(1, 6):
        np.testing.assert_array_equal(loss[:, step, step - 1], SENSITIVITY[step])
    assert loss[2, 4, 1] == pytest.approx(SENSITIVITY[4, 2] * 3.0)


def test_the_predicted_loss_of_history_knows_the_step_before():
    paired = RESIDUALS[..., None] * np.arange(1, 7)
    loss = predicted_loss(SENSITIVITY, paired)
    assert loss.shape == (3, 6, 6, 6)
    assert loss[1, 3, 2, 1] == pytest.approx(2 * SENSITIVITY[3, 1])


tables = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 8), st.integers(1, 4)), elements=st.floats(0, 10)
)
times = st.floats(0.01, 100)


@st.composite
def measured(draw):
    """Random measurements, and a speed-up within reach."""
    change = draw(tables)
    change[0] = 0.0
    steps, blocks = change.shape
    costs = Costs(
        np.array(draw(st.lists(times, min_size=blocks, max_size=blocks))),
        draw(st.floats(0, 100)), draw(st.floats(0, 100)),
    )  # fmt: skip
    speedup = 1 + draw(st.floats(0, 0.999)) * (costs.largest_speedup(steps) - 1)
    facts = Evidence(steps=steps, paths=PATHS[:1] * blocks, costs=costs, change=change)
    return facts, costs.uncached(steps), speedup


@given(measured(), st.sampled_from(SPEEDUPS), st.data())
def test_a_budget_is_as_fast_as_was_asked_for(made, kind, data):
    facts, uncached, speedup = made
    sensitivity = data.draw(hnp.arrays(np.float64, facts.change.shape, elements=st.floats(0, 10)))
    steps, blocks = facts.change.shape
    shape = (blocks, *[steps] * data.draw(st.integers(2, 3)))
    residuals = data.draw(hnp.arrays(np.float64, shape, elements=st.floats(0, 10)))
    facts = dataclasses.replace(facts, sensitivity=sensitivity, residuals=residuals)
    schedule = kind(speedup).schedule(facts)
    # Sums in another order: some units in the last place.
    assert facts.costs.image(schedule) <= uncached / speedup * (1 + 1e-9)
    if kind is Budget:
        latency = Latency(uncached / speedup * (1 + 1e-12)).schedule(facts)
        assert facts.costs.image(latency) <= uncached / speedup * (1 + 1e-9)


@given(measured())
def test_a_speed_up_of_1_affords_everything(made):
    facts, _, _ = made
    everything = facts.steps * facts.costs.blocks.sum()
    assert affordable(facts.costs, facts.steps, 1) == pytest.approx(everything, rel=1e-9)
    changing = np.ones((facts.steps, len(facts.paths)))
    alike = dataclasses.replace(facts, change=changing)
    assert ChangeBudget(1).schedule(alike).recompute.all()


def test_a_speed_up_out_of_reach_says_what_is_within():
    """uncached 1 + 6 * (3 + 7.5) = 64; at least 1 + 6 * 3 + 7.5 = 26.5; 64 / 26.5 = 2.4151."""
    with pytest.raises(ConfigError) as caught:
        recompute("blocks2.416")
    assert str(caught.value) == (
        "A speed-up of 2.416 is out of reach with 6 steps: the trunk always runs, and every block "
        "at step 0. Expected at most 2.415, or max for the most there is."
    )
    assert recompute("blocks2.415").sum() == 3


@pytest.mark.parametrize("text", ["blocksmax", "tmax", "cmax"])
def test_the_most_there_is_runs_every_block_once(text):
    assert recompute(text).sum(axis=0).tolist() == [1, 1, 1]
    assert recompute(text)[0].all()


@given(measured())
def test_the_most_there_is_is_the_largest_speed_up(made):
    facts, _, speedup = made
    schedule = ChangeBudget(MOST).schedule(facts)
    largest = facts.costs.largest_speedup(facts.steps)
    assert facts.costs.speedup(schedule) == pytest.approx(largest, rel=1e-12)
    assert largest >= speedup * (1 - 1e-12)
    ChangeBudget(largest).check_costs(facts.steps, facts.costs)
    with pytest.raises(ConfigError, match="Expected at most"):
        ChangeBudget(largest * 1.001).check_costs(facts.steps, facts.costs)


def test_a_latency_is_a_budget_in_milliseconds():
    """uncached 1 + 6 * (3 + 7.5) = 64 ms."""
    np.testing.assert_array_equal(recompute("blocksms40"), recompute("blocks1.6"))
    assert Policy.parse("blocksms40").needs == Policy.parse("blocks1.6").needs | Needs.MILLISECONDS
    loss = predicted_loss(SENSITIVITY, RESIDUALS)
    everything = least_loss(loss, COSTS.blocks, 6 * COSTS.blocks.sum())
    np.testing.assert_array_equal(recompute("blocksms1000"), everything.recompute)


def test_a_latency_out_of_reach_says_what_is_within():
    """At least 1 + 6 * 3 + 7.5 = 26.5."""
    with pytest.raises(ConfigError) as caught:
        recompute("blocksms26.4")
    assert str(caught.value) == (
        "26.4 ms an image are out of reach with 6 steps: the trunk always runs, and every block at "
        "step 0. Expected 26.5 ms or more, or fewer steps."
    )
    assert recompute("blocksms26.5").sum() == 3


def test_a_joint_policy_has_no_schedule_of_its_own():
    with pytest.raises(TypeError, match="candidates, each with a schedule of its own"):
        Joint(1.5).schedule(FACTS)


@pytest.mark.parametrize(("text", "within"), [("x64", "x5.56"), ("ms11", "ms11.5")])
def test_a_joint_policy_that_not_even_one_step_reaches_is_refused(text, within):
    """One step costs 1 + 10.5 of 1 + 6 * 10.5 = 64."""
    with pytest.raises(ConfigError) as caught:
        Policy.parse(text).check_costs(6, COSTS)
    assert str(caught.value) == (
        f"{text} is out of reach: one step alone costs 11.5 ms, 5.57 times less than 6 steps. Ask "
        f"for less."
    )
    Policy.parse(within).check_costs(6, COSTS)


@pytest.mark.parametrize("outputs", [1, 2])
def test_branches_are_planned_within_the_speedup_and_their_loss_is_counted(outputs):
    """Three blocks lie in two branches: the deeper one holds one block and half of the trunk."""
    branches = (
        BranchCost(trunk=2.5, inside=np.array([True, True, False])),
        BranchCost(trunk=1.5, inside=np.array([False, True, False])),
    )
    costs = Costs(np.array([1.5, 4.0, 2.0]), trunk=3.0, prompt=1.0, branches=branches)
    assert costs.by_cut.tolist() == [2.5, 5.0, 10.5]
    shape = (2, 8, 8, 8)[: 2 + outputs]
    evidence = Evidence(
        steps=8,
        paths=["a", "b"],
        costs=costs,
        sensitivity=np.full((8, 2), 0.1),
        gains=np.ones(8),
        residuals=np.ones(shape),
    )
    schedule = Branches(1.5).schedule(evidence)
    blocks = np.ones((8, 3), np.bool_)
    whole = Schedule(np.concatenate([blocks, schedule.recompute], axis=1))
    assert costs.speedup(whole) >= 1.5
    assert costs.blocks_share(whole) < 1
    reuses = (~schedule.recompute).any(1).sum()
    assert Branches(1.5).loss(evidence, schedule) >= 0.1 * reuses - 1e-9
    with pytest.raises(ConfigError, match=r"A speed-up of 5.2.* is out of reach with 8 steps"):
        Branches(5).check_costs(8, costs)
