"""Plans over nested branches: against all plans of small problems, and what holds for any."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockcache.export.choose.branches import MOST_IN_A_ROW, BranchProblem, plan_branches
from blockcache.runtime import ConfigError


def made_up(seed, cuts=2, steps=6):
    """Losses that grow with the distance to what stands in, as real ones do, and noise."""
    rng = np.random.default_rng(seed)
    costs = np.sort(rng.uniform(0.05, 0.9, cuts + 1))
    costs[-1] = 1.0
    step = np.arange(steps)
    distance = (step[:, None, None] - step[None, :, None]).clip(0)
    distance = distance + 0.3 * (step[None, :, None] - step[None, None, :]).clip(0)
    noise = rng.uniform(0.5, 1.5, (cuts, steps, steps, steps))
    sizes = rng.uniform(0.1, 1, (cuts, steps, 1, 1))
    return BranchProblem(costs, sizes * noise * distance, rng.uniform(0.2, 2, steps))


def all_plans(problem):
    rest = itertools.product(range(problem.cuts + 1), repeat=problem.steps - 1)
    return np.array([[problem.cuts, *plan] for plan in rest])


def loss_of(problem, *plan):
    return problem.loss(np.array([plan]))[0]


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.3, 1.0))
def test_the_plan_of_a_small_problem_is_the_best(seed, share):
    problem = made_up(seed)
    spend = share * problem.steps
    plans = all_plans(problem)
    losses = problem.loss(plans[problem.cost(plans) <= spend * (1 + 1e-9)])
    best = losses.min(initial=np.inf)
    if np.isinf(best):
        with pytest.raises(ConfigError, match="out of reach with 6 steps"):
            plan_branches(problem, spend)
        return
    plan = plan_branches(problem, spend)
    assert problem.cost(plan) <= spend * (1 + 1e-9)
    assert loss_of(problem, *plan) == pytest.approx(best)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 20), st.floats(0.5, 1.0))
def test_a_plan_begins_with_everything_and_keeps_within_reach(seed, cuts, steps, share):
    problem = made_up(seed, cuts, steps)
    try:
        plan = plan_branches(problem, share * steps)
    except ConfigError:  # out of reach: the cut costs nearly as much as everything
        return
    assert plan[0] == cuts
    assert np.isfinite(loss_of(problem, *plan))
    full = np.flatnonzero(plan == cuts)
    assert np.diff(np.append(full, steps)).max() <= MOST_IN_A_ROW + 1 or cuts > 1


def test_all_the_time_in_the_world_reuses_nothing():
    problem = made_up(0)
    assert (plan_branches(problem, problem.steps) == problem.cuts).all()


def test_more_to_spend_never_loses_more():
    problem = made_up(3, cuts=3, steps=16)
    losses = [loss_of(problem, *plan_branches(problem, spend)) for spend in (8, 10, 12, 14, 16)]
    assert losses == sorted(losses, reverse=True)


def test_an_output_computed_over_a_reused_one_carries_its_error():
    losses = np.zeros((2, 3, 3, 3))
    losses[1, 1] = 0.5  # cut 1 is reused at step 1, badly: what cut 0 sees then is off
    problem = BranchProblem(np.array([0.1, 0.5, 1.0]), losses, np.array([1.0, 2.0, 4.0]))
    assert loss_of(problem, 2, 1, 0) == pytest.approx(0.5 + 0.5 / 2 * 4)
    assert loss_of(problem, 2, 0, 0) == 0


def test_a_budget_out_of_reach_says_what_is_within_it():
    problem = BranchProblem(np.array([0.1, 1.0]), np.zeros((1, 10, 10, 10)), np.ones(10))
    message = r"A speed-up of 10 is out of reach with 10 steps: .* Expected at most 3.571\."
    with pytest.raises(ConfigError, match=message):
        plan_branches(problem, 1.0)


@pytest.mark.parametrize(
    ("costs", "losses", "message"),
    [([0.1, 1.0], (2, 3, 3, 3), "costs"), ([1.0, 0.5], (1, 3, 3, 3), "rise with the depth")],
)
def test_a_problem_that_is_none_is_refused(costs, losses, message):
    with pytest.raises(ConfigError, match=message):
        BranchProblem(np.array(costs), np.zeros(losses), np.ones(3))
