"""Successive halving: who is tried on what, and who wins."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockcache.export.choose.trials import TrialOptions, improved, nearest, rounds, trials
from blockcache.runtime import ConfigError

tables = st.integers(1, 9).flatmap(
    lambda images: st.lists(
        st.lists(st.floats(0.001, 1), min_size=images, max_size=images), min_size=1, max_size=12
    )
)


@given(tables)
def test_the_winner_is_the_nearest_on_all_images_of_those_that_are_good_on_a_few(table):
    images = len(table[0])
    tried = [[] for _ in table]

    def distances(plan, some):
        tried[plan] += some
        return np.array(table[plan])[some.start : some.stop]

    best, means = nearest(range(len(table)), images, distances)
    first, finalists = rounds(len(table), images)
    whole = [plan for plan, seen in enumerate(tried) if seen == [*range(images)]]
    assert len(whole) == (finalists if first < images else len(table))
    assert all(seen == [*range(first)] for plan, seen in enumerate(tried) if plan not in whole)
    assert best in whole
    worst = max(np.mean(table[plan][:first]) for plan in whole)
    others = [np.mean(table[plan][:first]) for plan in range(len(table)) if plan not in whole]
    assert all(other >= worst for other in others)
    for plan, mean in enumerate(means):
        assert mean == pytest.approx(np.mean(np.array(table[plan])[tried[plan]]))
    assert means[best] == min(means[plan] for plan in whole)


def test_a_plan_that_fails_on_one_image_cannot_win():
    table = np.array([[0.1, 0.1, math.nan], [0.5, 0.5, 0.5], [0.9, 0.9, 0.9], [1.0, 1.0, 1.0]])
    best, means = nearest(range(4), 3, lambda plan, some: table[plan, some.start : some.stop])
    assert (best, means[0]) == (1, math.inf)
    with pytest.raises(ConfigError, match=r"No plan ended in finite latents\."):
        nearest([0], 3, lambda plan, some: table[0, some.start : some.stop])


@given(tables, st.integers(0, 12))
def test_moves_lead_downhill_and_are_not_tried_twice(table, moves):
    """Plans stand on a line; a plan's neighbours are those beside it."""
    images, tried = len(table[0]), []

    def distances(plan, some):
        tried.append((plan, some))
        return np.array(table[plan])[some.start : some.stop]

    def neighbours(plan):
        return [other for other in (plan + 1, plan - 1) if 0 <= other < len(table)]

    best, least = improved(0, images, moves, neighbours, distances)
    assert least == pytest.approx(np.mean(table[best]))
    assert least <= np.mean(table[0]) + 1e-12
    assert len(set(tried)) == len(tried)
    assert len({plan for plan, _ in tried}) <= moves + 1
    assert len(tried) <= trials(0, TrialOptions(images=images, moves=moves)) or not moves
    if moves > len(table):  # as far as there was something to try
        first, _ = rounds(1, images)
        for other in neighbours(best):
            few = np.mean(table[other][:first]) <= np.mean(table[best][:first])
            assert not few or np.mean(table[other]) >= least - 1e-12


@pytest.mark.parametrize(
    ("field", "least"), [("candidates", 1), ("images", 1), ("moves", 0), ("steps", 2), ("seed", 0)]
)
def test_options_have_a_least_value(field, least):
    TrialOptions(**{field: least})
    text = f"Expected {field} of {least} or more to try plans with, got {least - 1}."
    with pytest.raises(ConfigError, match=text):
        TrialOptions(**{field: least - 1})
