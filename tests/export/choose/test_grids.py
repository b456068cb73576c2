"""Named grids equal diffusers', published tables come back whole, wrong names are refused."""

from __future__ import annotations

import numpy as np
import pytest

from blockcache.export.choose.grids import (
    ALIGN_YOUR_STEPS,
    NAMES,
    grid_of,
    interpolated,
    named_grid,
    timesteps_of,
)
from blockcache.runtime import ConfigError
from blockcache.runtime.solvers.grid import Grid
from blockcache.runtime.solvers.noise import NoiseSchedule

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TRAINING = NoiseSchedule(**NOISE).sigmas()


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 14, 20, 33, 50])
@pytest.mark.parametrize(
    ("name", "switch"),
    [
        ("karras", "use_karras_sigmas"),
        ("exponential", "use_exponential_sigmas"),
        ("lu", "use_lu_lambdas"),
        ("beta", "use_beta_sigmas"),
    ],
)
def test_a_grid_is_that_of_diffusers(name, switch, steps):
    """Levels and timesteps, its rounding and its truncation included."""
    diffusers = pytest.importorskip("diffusers")
    if name == "beta":
        pytest.importorskip("scipy")
    scheduler = diffusers.DPMSolverMultistepScheduler(**NOISE, **{switch: True})
    scheduler.set_timesteps(steps)
    grid = named_grid(name, TRAINING, steps)
    np.testing.assert_allclose(grid.sigmas, scheduler.sigmas[:-1].numpy(), rtol=2e-6)
    apart = np.abs(np.array(grid.timesteps) - scheduler.timesteps.numpy())
    # Both ends lie on whole timesteps: the last bit of a logarithm decides what is cut off.
    assert not apart[1:-1].any()
    assert apart.max() <= 1


@pytest.mark.parametrize("name", ALIGN_YOUR_STEPS)
def test_ten_steps_are_the_published_ones(name):
    grid = named_grid(name, TRAINING, 10)
    assert grid.sigmas == pytest.approx(ALIGN_YOUR_STEPS[name][:-1], rel=1e-6)
    first, last = {"ays-sd15": (999, 24), "ays-sdxl": (999, 13)}[name]
    assert (grid.timesteps[0], grid.timesteps[-1]) == (first, last)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 3, 20, 50])
def test_every_grid_falls_from_all_the_noise(name, steps):
    if name == "beta":
        pytest.importorskip("scipy")
    grid = named_grid(name, TRAINING, steps)
    assert grid.steps == steps
    assert grid.sigmas[0] == pytest.approx(TRAINING[-1], rel=1e-5)
    assert list(grid.timesteps) == sorted(grid.timesteps, reverse=True)


def test_a_table_is_log_linear_in_the_step():
    assert interpolated([8.0, 4.0, 2.0, 1.0], 6) == pytest.approx(8 * 2 ** -(np.arange(6) / 2))


def test_ones_own_levels_are_told_as_whole_timesteps():
    grid = grid_of("mine", TRAINING[[999, 500, 3]] * 1.0001, TRAINING)
    assert grid.timesteps == (999, 500, 3)
    assert timesteps_of(TRAINING[[400]], TRAINING) == pytest.approx(400, abs=1e-3)


def test_an_unknown_name_is_refused_with_those_that_exist():
    with pytest.raises(ConfigError, match=r"Expected a grid of auto, linspace, .*got 'karas'"):
        named_grid("karas", TRAINING, 20)


def test_a_grid_comes_back_from_its_json():
    grid = named_grid("karras", TRAINING, 7)
    assert Grid.from_json(grid.to_json()) == grid


@pytest.mark.parametrize(
    ("sigmas", "timesteps", "message"),
    [
        ((2.0, 1.0), (5.0,), "as many timesteps as sigmas"),
        ((), (), "at least one"),
        ((1.0, 2.0), (5.0, 6.0), "falling sigmas"),
        ((1.0, 1.0), (5.0, 5.0), "falling sigmas"),
        ((2.0, 0.0), (5.0, 0.0), "finite sigmas above 0"),
        ((float("inf"), 1.0), (5.0, 0.0), "finite sigmas above 0"),
        ((2.0, 1.0), (5.0, -1.0), "timesteps of 0 or more"),
        ((2.0, "1"), (5.0, 1.0), "sigmas as numbers"),
    ],
)
def test_a_grid_that_is_none_is_refused(sigmas, timesteps, message):
    with pytest.raises(ConfigError, match=message):
        Grid("mine", sigmas, timesteps)


@pytest.mark.parametrize("content", [{}, [], {"name": "a", "sigmas": 1, "timesteps": []}, None])
def test_json_that_is_no_grid_is_refused(content):
    with pytest.raises(ConfigError, match="Expected a grid"):
        Grid.from_json(content)
