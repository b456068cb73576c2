"""Eq. 7, by hand and by property."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from blockcache.export.schedule import accumulated_change, threshold
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
