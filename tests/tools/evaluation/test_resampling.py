"""Halves are halves, intervals have the spread of the whole, pairing takes common noise away."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockcache.tools.evaluation.resampling import (
    Interval,
    Resampled,
    difference,
    random_halves,
    resampled_mean,
    resampled_share,
)

COUNTS = st.integers(2, 60)


@given(COUNTS, st.integers(1, 8), st.integers(0, 99))
def test_a_half_has_different_images_and_half_of_them(count, resamples, seed):
    halves = random_halves(count, resamples, seed)
    assert halves.shape == (resamples, count // 2)
    for half in halves:
        assert len(set(half)) == count // 2
        assert half.min() >= 0
        assert half.max() < count
    np.testing.assert_array_equal(halves, random_halves(count, resamples, seed))


def test_every_image_is_in_about_half_of_the_halves():
    halves = random_halves(40, 1000, 0)
    share = np.bincount(halves.ravel(), minlength=40) / 1000
    assert np.abs(share - 0.5).max() < 0.08  # five standard deviations


def test_the_spread_of_the_halves_is_that_of_the_mean():
    values = np.random.default_rng(0).standard_normal(400)
    measured = resampled_mean(values, random_halves(400, 4000, 1))
    standard_error = values.std(ddof=1) / np.sqrt(400)
    assert measured.halves.std() == pytest.approx(standard_error, rel=0.06)
    found = Interval.of(measured)
    assert found.high - found.low == pytest.approx(2 * 1.645 * standard_error, rel=0.08)


def test_nine_of_ten_intervals_hold_the_truth():
    rng, held = np.random.default_rng(2), 0
    halves = random_halves(100, 200, 3)
    for _ in range(400):
        found = Interval.of(resampled_mean(rng.standard_normal(100) + 5, halves))
        held += found.low <= 5 <= found.high
    assert 0.85 < held / 400 < 0.94  # three standard deviations around 0.9


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30), st.floats(-5, 5))
@settings(max_examples=50)
def test_a_constant_difference_has_no_spread(values, step):
    base = np.array(values)
    halves = random_halves(len(base), 20, 0)
    found = difference(resampled_mean(base + step, halves), resampled_mean(base, halves))
    assert found.value == pytest.approx(step, abs=1e-9)
    assert found.low == pytest.approx(step, abs=1e-9)
    assert found.high == pytest.approx(step, abs=1e-9)


def test_images_without_a_value_are_left_out():
    values = np.array([1.0, np.nan, 3.0, np.nan])
    halves = np.array([[0, 1], [2, 3], [1, 3]])
    measured = resampled_mean(values, halves)
    assert measured.value == 2
    np.testing.assert_array_equal(measured.halves, [1, 3, np.nan])


def test_an_interval_is_set_around_the_value_and_not_around_the_halves():
    """Halves have a bias that the whole does not have (the Fréchet distance of fewer pictures)."""
    found = Interval.of(Resampled(10.0, np.array([49.0, 51.0])))
    assert (found.value, found.low, found.high) == pytest.approx((10.0, 8.355, 11.645))


@pytest.mark.parametrize(("changed", "finding"), [(0, False), (1, False), (3, False), (5, True)])
def test_a_few_images_on_one_side_are_no_finding(changed, finding):
    """A sign test calls 5 of 5 a finding at 90 % (p = 0.06), 3 of 3 not (p = 0.25)."""
    halves, base = random_halves(64, 400, 0), np.ones(64)
    other = base.copy()
    other[:changed] = 0
    found = difference(resampled_share(base, halves), resampled_share(other, halves))
    assert found.value == pytest.approx(changed / 64)
    assert (found.low > 0) == finding
    assert found.high > found.low


def test_a_share_counts_in_steps_of_one_image():
    hits = np.array([1.0, 0.0, np.nan, 1.0])
    found = resampled_share(hits, random_halves(4, 20, 0))
    assert found.value == pytest.approx(2 / 3)
    assert found.grain == pytest.approx(1 / 3)
