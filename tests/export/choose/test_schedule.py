"""Eq. 7 and the budget, by hand, by property and by brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from blockcache.export.choose import schedule as schedule_module
from blockcache.export.choose.schedule import (
    accumulated_change,
    budget,
    least_loss,
    threshold,
    threshold_within,
    total_loss,
)
from blockcache.runtime import ConfigError, Schedule

# Multiples of 1/64: sums of them are exact in float64, so that properties need no tolerance.
changes = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 12), st.integers(1, 5)),
    elements=st.integers(0, 128).map(lambda count: count / 64),
)
deltas = st.integers(0, 256).map(lambda count: count / 64)


def column(*values):
    return np.array(values, np.float64)[:, None]


def test_a_hand_worked_example():
    """delta 0.5. Block 0: 0.25, 0.5 (not above), 0.75 -> recompute; 0.25, 1.0 -> recompute.

    Block 1 changes by more than 0.5 at every step; block 2 never changes.
    """
    change = np.array(
        [[0.00, 0.00, 0.0],
         [0.25, 0.75, 0.0],
         [0.25, 0.75, 0.0],
         [0.25, 0.75, 0.0],
         [0.25, 0.75, 0.0],
         [0.75, 0.75, 0.0]]
    )  # fmt: skip
    marks = [[1, 1, 1], [0, 1, 0], [0, 1, 0], [1, 1, 0], [0, 1, 0], [1, 1, 0]]
    schedule = threshold(change, 0.5)
    assert schedule.recompute.astype(int).tolist() == marks
    carried = accumulated_change(change, schedule)
    assert carried[:, 0].tolist() == [0, 0.25, 0.5, 0, 0.25, 0]
    assert not carried[:, 1:].any()


def test_a_change_of_exactly_delta_is_still_reused():
    assert threshold(column(0, 0.5), 0.5).recompute[:, 0].tolist() == [True, False]
    assert threshold(column(0, 0.5 + 1 / 64), 0.5).recompute[:, 0].tolist() == [True, True]


@given(changes, deltas)
def test_step_0_recomputes_every_block(change, delta):
    assert threshold(change, delta).recompute[0].all()


@given(changes)
def test_delta_0_recomputes_every_step_that_has_any_change(change):
    np.testing.assert_array_equal(threshold(change, 0).recompute[1:], change[1:] > 0)


@given(changes, deltas)
def test_no_block_is_reused_with_more_change_than_delta(change, delta):
    assert (accumulated_change(change, threshold(change, delta)) <= delta).all()


@given(changes, deltas)
def test_a_block_is_recomputed_only_where_reuse_would_exceed_delta(change, delta):
    schedule = threshold(change, delta)
    carried = accumulated_change(change, schedule)
    for step, block in np.argwhere(schedule.recompute[1:]) + np.array([1, 0]):
        assert carried[step - 1, block] + change[step, block] > delta


@given(changes, deltas)
def test_blocks_are_scheduled_independently(change, delta):
    whole = threshold(change, delta).recompute
    for k in range(change.shape[1]):
        alone = threshold(change[:, k : k + 1], delta).recompute[:, 0]
        np.testing.assert_array_equal(alone, whole[:, k])


@given(changes)
def test_a_delta_above_all_change_recomputes_step_0_only(change):
    assert not threshold(change, change.sum() + 1).recompute[1:].any()


@given(changes, deltas)
def test_the_first_row_of_the_table_is_not_read(change, delta):
    other = change.copy()
    other[0] = 7.0
    np.testing.assert_array_equal(
        threshold(change, delta).recompute, threshold(other, delta).recompute
    )


@given(changes, deltas, deltas)
def test_a_larger_delta_never_recomputes_more_often(change, a, b):
    """The number of recomputes of a block falls with delta, by greedy's stay-ahead argument.

    The j-th recompute at the larger delta comes no earlier than the j-th at the smaller one: it
    starts no earlier and needs no less change. So counts are monotone (at every prefix, too)
    although the steps themselves are not a subset; see the next test.
    """
    small, large = sorted((a, b))
    often = threshold(change, small).recompute.cumsum(axis=0)
    seldom = threshold(change, large).recompute.cumsum(axis=0)
    assert (seldom <= often).all()


def test_a_larger_delta_may_recompute_a_step_that_a_smaller_one_reuses():
    """The counterexample to the subset property, documented."""
    change = column(0, 0.5, 0.25, 0.5)
    assert threshold(change, 0.25).recompute[:, 0].tolist() == [True, True, False, True]
    assert threshold(change, 0.5).recompute[:, 0].tolist() == [True, False, True, False]


@given(changes, deltas, st.randoms(use_true_random=False))
def test_the_change_carried_is_the_sum_since_the_last_recompute(change, delta, random):
    table = np.array([[random.random() < 0.5 for _ in row] for row in change])
    table[0] = True
    carried = accumulated_change(change, Schedule(table))
    for step, k in np.ndindex(change.shape):
        last = np.flatnonzero(table[: step + 1, k])[-1]
        assert carried[step, k] == change[last + 1 : step + 1, k].sum()


@pytest.mark.parametrize("delta", [-0.1, float("nan")])
def test_a_negative_delta_is_refused(delta):
    with pytest.raises(ConfigError) as caught:
        threshold(column(0, 1), delta)
    assert str(caught.value) == f"Expected a threshold delta of 0 or more, got {delta}."


@pytest.mark.parametrize(
    "change", [np.zeros(3), np.zeros((0, 2)), column(0, np.nan), column(0, np.inf), column(0, -1)]
)
def test_a_table_that_is_no_change_is_refused(change):
    for call in (lambda: threshold(change, 0.5),
                 lambda: accumulated_change(change, Schedule.uncached(2, 1))):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            call()
        assert str(caught.value) == (
            f"Expected change[steps, blocks] of finite numbers, 0 or more; got shape "
            f"{change.shape}. Profile the model again."
        )


# -- the budget ------------------------------------------------------------------------------------


def sixty_fourths(least, most):
    return st.integers(least, most).map(lambda count: count / 64)


def table(shape, elements):
    return hnp.arrays(np.float64, shape, elements=elements)


@st.composite
def problems(draw, steps=8, blocks=4):
    """Change, weight, cost and a budget that pays for step 0 at least; every sum is exact."""
    shape = (draw(st.integers(1, steps)), draw(st.integers(1, blocks)))
    change = draw(table(shape, sixty_fourths(0, 128)))
    weight = draw(table(shape, sixty_fourths(0, 256)))
    cost = draw(table(shape[1], sixty_fourths(1, 640)))
    share = draw(sixty_fourths(0, 64))
    return change, weight, cost, cost.sum() * (1 + share * (shape[0] - 1))


def spent(cost, schedule):
    return float((cost * schedule.recompute).sum())


def loss(change, schedule, weight=1.0):
    return float((weight * accumulated_change(change, schedule)).sum())


def losses(change, weight):
    """loss[k, s, a]: the weighted change between step a and step s, the definition spelled out."""
    steps, blocks = change.shape
    made = np.zeros((blocks, steps, steps))
    for k, s, a in np.ndindex(made.shape):
        made[k, s, a] = weight[s, k] * change[a + 1 : s + 1, k].sum()
    return made


def weighed(change, cost, spend, weight):
    return least_loss(losses(change, weight), cost, spend)


def test_a_hand_worked_budget():
    """Five runs at most, costs 1 and 2, so beside step 0 block 0 runs twice or block 1 once.

    Block 0: without more runs 1 + 2 + 3 = 6 is carried, with one (at step 2) 1 + 1 = 2, with two 1.
    Block 1: without more runs 0 + 8 + 8 = 16, with one (at step 2) 0.
    """
    change = np.array([[0, 0], [1, 0], [1, 8], [1, 0]], np.float64)
    cost = np.array([1.0, 2.0])
    made = budget(change, cost, 5.0)
    assert made.recompute.astype(int).T.tolist() == [[1, 0, 0, 0], [1, 0, 1, 0]]
    assert loss(change, made) == 6
    # Where block 1 hardly matters, block 0 gets both runs.
    light = weighed(change, cost, 5.0, np.array([[1, 1 / 64]] * 4))
    assert light.recompute.astype(int).T.tolist()[1] == [1, 0, 0, 0]
    assert loss(change, light) == 1 + 16
    assert spent(cost, light) == 5


def test_a_weight_moves_the_refresh_to_the_step_that_matters():
    change = column(0, 1, 1, 1)
    weight = column(1, 1, 1, 8)
    made = weighed(change, np.ones(1), 2.0, weight)
    assert np.flatnonzero(made.recompute[:, 0]).tolist() == [0, 3]


@pytest.mark.parametrize(("spend", "runs"), [(2.0, 2), (2 * (1 - 1e-9), 1)])
def test_a_run_that_is_a_billionth_too_dear_is_not_made(spend, runs):
    assert budget(column(0, 1, 1), np.ones(1), spend).recompute.sum() == runs


@given(problems())
def test_a_budget_recomputes_all_at_step_0_and_is_not_overdrawn(problem):
    change, weight, cost, spend = problem
    made = weighed(change, cost, spend, weight)
    assert made.recompute.shape == change.shape
    assert made.recompute[0].all()
    assert spent(cost, made) <= spend


@given(problems(steps=12), deltas)
def test_a_budget_accumulates_no_more_than_the_threshold_at_its_cost(problem, delta):
    change, weight, cost, _ = problem
    greedy = threshold(change, delta)
    spend = spent(cost, greedy)
    assert loss(change, budget(change, cost, spend)) <= loss(change, greedy)
    made = weighed(change, cost, spend, weight)
    assert loss(change, made, weight) <= loss(change, greedy, weight)
    assert spent(cost, made) <= spend


@given(problems(), st.randoms(use_true_random=False))
def test_no_table_of_the_same_cost_accumulates_less(problem, random):
    change, weight, cost, _ = problem
    marks = np.array([[random.random() < 0.5 for _ in row] for row in change])
    marks[0] = True
    other = Schedule(marks)
    made = weighed(change, cost, spent(cost, other), weight)
    assert loss(change, made, weight) <= loss(change, other, weight)


@given(problems(steps=5, blocks=2))
def test_a_budget_is_the_best_of_all_tables(problem):
    change, weight, cost, spend = problem
    steps, blocks = change.shape
    best = np.inf
    for marks in itertools.product((False, True), repeat=(steps - 1) * blocks):
        rows = np.array(marks, np.bool_).reshape(steps - 1, blocks)
        other = Schedule(np.concatenate([np.ones((1, blocks), np.bool_), rows]))
        if spent(cost, other) <= spend:
            best = min(best, loss(change, other, weight))
    assert loss(change, weighed(change, cost, spend, weight), weight) == best


@given(problems(), sixty_fourths(0, 6400))
def test_more_to_spend_never_accumulates_more(problem, more):
    change, weight, cost, spend = problem
    poor, rich = (weighed(change, cost, spend + extra, weight) for extra in (0.0, more))
    assert loss(change, rich, weight) <= loss(change, poor, weight)


@given(problems())
def test_a_budget_for_everything_accumulates_nothing(problem):
    change, weight, cost, _ = problem
    made = weighed(change, cost, cost.sum() * len(change), weight)
    assert loss(change, made, weight) == 0


@given(problems())
def test_a_budget_for_step_0_alone_is_spent_there(problem):
    change, _, cost, _ = problem
    assert not budget(change, cost, cost.sum()).recompute[1:].any()


@given(problems(steps=6), st.permutations(range(4)))
def test_the_order_of_the_blocks_changes_nothing(problem, order):
    change, weight, cost, spend = problem
    order = [k for k in order if k < change.shape[1]]
    made = weighed(change, cost, spend, weight)
    moved = weighed(change[:, order], cost[order], spend, weight[:, order])
    assert loss(change[:, order], moved, weight[:, order]) == loss(change, made, weight)


@given(st.data(), st.integers(1, 12), st.integers(1, 5))
def test_costs_in_any_unit_are_not_overdrawn_nor_refused(data, steps, blocks):
    """Milliseconds are no multiples of 1/64: a sum in another order may differ in its last place.

    The budget is what a random table costs, so that the last run it pays for must fit exactly.
    """
    cost = data.draw(table(blocks, st.floats(1e-3, 1e3)))
    change = data.draw(table((steps, blocks), sixty_fourths(0, 128)))
    marks = data.draw(hnp.arrays(np.bool_, (steps, blocks)))
    marks[0] = True
    spend = spent(cost, Schedule(marks))
    made = budget(change, cost, spend)
    assert spent(cost, made) <= spend * (1 + 2e-12)
    assert loss(change, made) <= loss(change, Schedule(marks))


@given(problems(), st.integers(1, 8))
def test_merged_points_never_overdraw(problem, points):
    change, weight, cost, spend = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule_module, "MOST_POINTS", points)
        merged = weighed(change, cost, spend, weight)
    assert merged.recompute[0].all()
    assert spent(cost, merged) <= spend
    assert loss(change, weighed(change, cost, spend, weight), weight) <= loss(
        change, merged, weight
    )


def test_merged_points_keep_close_to_the_best():
    """64 points for four blocks of random cost: at the resolution of the budget, 1/64 a block."""
    random = np.random.default_rng(0)
    change, cost = random.random((12, 4)), random.random(4) + 0.1
    spend = 0.5 * 12 * cost.sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule_module, "MOST_POINTS", 64)
        merged = budget(change, cost, spend)
    assert loss(change, merged) <= loss(change, budget(change, cost, spend * (1 - 4 / 64)))


@given(problems())
def test_a_budget_below_step_0_says_what_step_0_costs(problem):
    change, _, cost, _ = problem
    with pytest.raises(ConfigError) as caught:
        budget(change, cost, cost.sum() - 1 / 64)
    assert str(caught.value) == (
        f"Expected a budget of at least {cost.sum():g}, one run of every block; "
        f"got {cost.sum() - 1 / 64:g}."
    )


def test_a_budget_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="Expected a budget of at least 1, one run of every"):
        budget(column(0, 1), np.ones(1), float("nan"))


@pytest.mark.parametrize("cost", [[1.0, 1.0], [0.0], [-1.0], [float("nan")]])
def test_costs_that_are_none_are_refused(cost):
    with pytest.raises(ConfigError) as caught:
        budget(column(0, 1), np.array(cost), 4.0)
    assert str(caught.value) == f"Expected a cost above 0 for each of 1 blocks, got {cost}."


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_losses_that_are_none_are_refused(bad):
    with pytest.raises(ConfigError) as caught:
        least_loss(np.array([[[0.0, 0.0], [bad, 0.0]]]), np.ones(1), 4.0)
    assert str(caught.value) == (
        "Expected finite losses of 0 or more. Measure sensitivity and residuals again."
    )


@pytest.mark.parametrize("shape", [(2, 2), (1, 2, 3), (0, 2, 2), (1, 0, 0), (1, 2, 2, 3)])
def test_losses_of_another_shape_are_refused(shape):
    with pytest.raises(ConfigError) as caught:
        least_loss(np.zeros(shape), np.ones(1), 4.0)
    assert str(caught.value) == f"Expected loss[K, S, S] or loss[K, S, S, S], got {shape}."


# -- losses that depend on the last two computed outputs -------------------------------------------


@st.composite
def paired_problems(draw, steps=6, blocks=3):
    """loss[k, s, a, b], cost, and a budget that pays for step 0 at least."""
    count, width = draw(st.integers(1, steps)), draw(st.integers(1, blocks))
    made = draw(table((width, count, count, count), sixty_fourths(0, 64)))
    cost = draw(table(width, sixty_fourths(1, 64)))
    return made, cost, cost.sum() * (1 + draw(sixty_fourths(0, 64)) * (count - 1))


def paired_loss(made, schedule):
    """What a schedule loses, by walking through it."""
    total = 0.0
    for k, marks in enumerate(schedule.recompute.T):
        last = before = 0
        for step in range(1, len(marks)):
            if marks[step]:
                last, before = step, last
            else:
                total += made[k, step, last, before]
    return total


def test_a_budget_that_looks_two_recomputes_back():
    """One run beside step 0, of four steps. Step 3 from step 2 is good only with step 0 before it,

    which it is: run 2. Had the loss not known the step before, run 1 would be as good.
    """
    loss_table = np.full((1, 4, 4, 4), 4.0)
    loss_table[0, 1, 0, 0] = 1.0
    loss_table[0, 3, 2, 0] = 0.5
    made = least_loss(loss_table, np.ones(1), 2.0)
    assert made.recompute[:, 0].tolist() == [True, False, True, False]
    assert paired_loss(loss_table, made) == 1.5


@given(paired_problems(steps=5, blocks=2))
def test_a_paired_budget_is_the_best_of_all_tables(problem):
    made, cost, spend = problem
    blocks, steps = made.shape[:2]
    best = np.inf
    for marks in itertools.product((False, True), repeat=(steps - 1) * blocks):
        rows = np.array(marks, np.bool_).reshape(steps - 1, blocks)
        other = Schedule(np.concatenate([np.ones((1, blocks), np.bool_), rows]))
        if spent(cost, other) <= spend:
            best = min(best, paired_loss(made, other))
    chosen = least_loss(made, cost, spend)
    assert chosen.recompute[0].all()
    assert spent(cost, chosen) <= spend
    assert paired_loss(made, chosen) == best


@given(problems())
def test_a_loss_that_ignores_the_step_before_gives_the_plain_budget(problem):
    change, weight, cost, spend = problem
    plain = losses(change, weight)
    paired = np.repeat(plain[..., None], len(change), axis=3)
    ours, theirs = (least_loss(made, cost, spend) for made in (paired, plain))
    assert loss(change, ours, weight) == loss(change, theirs, weight)


@given(changes, deltas, st.data())
def test_a_threshold_within_a_spend_is_the_dearest_that_fits(change, delta, data):
    cost = np.array([data.draw(st.integers(1, 64)) for _ in range(change.shape[1])], np.float64)
    spend = cost.sum() + data.draw(st.integers(0, 64)) * cost.sum() / 8

    def price(schedule):
        return (schedule.recompute * cost).sum()

    within = price(threshold_within(change, cost, spend))
    other = price(threshold(change, delta))
    assert within <= spend
    assert other > spend or other <= within


# -- the total loss --------------------------------------------------------------------------------


@given(problems(), st.randoms(use_true_random=False))
def test_the_total_loss_is_the_weighed_change_that_is_carried(problem, random):
    change, weight, _, _ = problem
    marks = np.array([random.random() < 0.5 for _ in range(change.size)]).reshape(change.shape)
    marks[0] = True
    schedule = Schedule(marks)
    assert total_loss(losses(change, weight), schedule) == loss(change, schedule, weight)


@given(paired_problems(), st.randoms(use_true_random=False))
def test_no_table_of_the_same_cost_loses_less(problem, random):
    made, cost, spend = problem
    best = least_loss(made, cost, spend)
    assert total_loss(made, best) == pytest.approx(paired_loss(made, best), abs=1e-12)
    marks = np.array([random.random() < 0.5 for _ in range(best.recompute.size)])
    marks = marks.reshape(best.recompute.shape)
    marks[0] = True
    if spent(cost, Schedule(marks)) <= spend:
        assert total_loss(made, best) <= total_loss(made, Schedule(marks))


def test_an_uncached_schedule_loses_nothing():
    assert total_loss(np.ones((2, 3, 3)), Schedule.uncached(3, 2)) == 0.0
