"""The shortest path against brute force, and its costs against the steps they stand for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockcache.export.choose.grid_search import StepCosts, shortest_path, step_costs
from blockcache.runtime import ConfigError


def made_up_run(seed, levels, images=2, size=5):
    """Levels, samples and data predictions of nothing in particular."""
    rng = np.random.default_rng(seed)
    sigmas = np.sort(rng.uniform(0.05, 14, levels))[::-1]
    samples = rng.standard_normal((levels, images, size))
    data = rng.standard_normal((levels + 1, images, size))
    return sigmas, samples, data, rng.uniform(0.1, 2, levels)


def direct_error(sigmas, x, d, p, i, j):
    """The solver step itself, for one image."""
    alpha = 1 / np.sqrt(1 + sigmas**2)
    noise = sigmas * alpha
    kept = noise[j] / noise[i]
    k = 0.0
    if p != i:
        k = np.log(sigmas[i] / sigmas[j]) / np.log(sigmas[p] / sigmas[i]) / 2
    data = (1 + k) * d[i] - k * d[p]
    return np.linalg.norm(kept * x[i] + (alpha[j] - alpha[i] * kept) * data - x[j])


@given(st.integers(0, 10**6))
def test_a_cost_is_the_error_of_that_step(seed):
    sigmas, x, d, gains = made_up_run(seed, 5)
    costs = step_costs(sigmas, x, d, gains)
    sizes = np.linalg.norm(d[-1], axis=1)
    for i, j in itertools.combinations(range(5), 2):
        for p in range(i + 1):
            errors = [direct_error(sigmas, x[:, n], d[:, n], p, i, j) for n in range(2)]
            expected = gains[j] * np.mean(np.array(errors) / sizes)
            assert costs.steps[p, i, j] == pytest.approx(expected, rel=1e-6, abs=1e-9)
    expected = [np.mean(np.linalg.norm(d[i] - d[-1], axis=1) / sizes) for i in range(5)]
    assert costs.last == pytest.approx(expected)


@given(st.integers(0, 10**6), st.integers(1, 7))
def test_no_other_path_is_shorter(seed, steps):
    costs = step_costs(*made_up_run(seed, 7))
    sigmas, value = shortest_path(costs, steps)
    chains = ([0, *rest] for rest in itertools.combinations(range(1, 7), steps - 1))
    assert value == pytest.approx(min(costs.predicted(chain) for chain in chains))
    assert costs.predicted(costs.nearest(sigmas)) == pytest.approx(value)
    assert len(sigmas) == steps
    assert sigmas[0] == costs.sigmas[0]
    assert (np.diff(sigmas) < 0).all()


def test_an_exact_run_costs_nothing_but_its_last_step():
    """Where the data prediction never changes, every step is exact."""
    sigmas = np.geomspace(14, 0.05, 6)
    alpha = 1 / np.sqrt(1 + sigmas**2)
    data, noise = np.ones((1, 4)), np.full((1, 4), 2.0)
    samples = np.stack([a * data + a * s * noise for a, s in zip(alpha, sigmas, strict=True)])
    costs = step_costs(sigmas, samples, np.repeat(data[None], 7, 0), np.ones(6))
    assert shortest_path(costs, 3)[1] < 1e-6


def test_more_steps_than_levels_are_refused():
    costs = step_costs(*made_up_run(0, 4))
    with pytest.raises(ConfigError, match=r"Expected 1 to 4 steps .* got 5"):
        shortest_path(costs, 5)


def test_levels_are_found_by_their_logarithm():
    costs = StepCosts(np.array([8.0, 1.0, 0.1]), np.zeros((3, 3, 3)), np.zeros(3))
    assert costs.nearest(np.array([7.0, 2.0, 0.2])) == [0, 1, 2]
