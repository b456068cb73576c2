"""Solver tables on a grid of one's own: equal to diffusers'; what does not fit is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from blockcache.runtime import ConfigError, SolverConfig
from blockcache.runtime.solvers.diffusers_config import solver_from_diffusers
from blockcache.runtime.solvers.grid import Grid
from blockcache.runtime.solvers.noise import NoiseSchedule
from blockcache.runtime.solvers.solver import solver_tables

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SOURCE = {"_class_name": "DPMSolverMultistepScheduler", **BETAS, "prediction_type": "v_prediction"}
GRID = Grid("mine", (14.0, 6.0, 2.5, 0.9, 0.3, 0.08), (996, 840, 630, 380, 150, 30))


def config(solver="dpm", grid=GRID, **options):
    noise = NoiseSchedule(**BETAS)
    fields = {"prediction": "v_prediction", "noise": noise, "steps": grid.steps, **options}
    return SolverConfig(solver=solver, grid=grid, **fields)


@pytest.mark.parametrize("steps", [4, 10, 20])
@pytest.mark.parametrize("switch", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_dpm_steps_over_a_grid_as_diffusers_does(switch, steps):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(SOURCE, **{switch: True})
    scheduler.set_timesteps(steps)
    levels = scheduler.sigmas[:-1].tolist()
    grid = Grid("theirs", tuple(levels), tuple(scheduler.timesteps.tolist()))
    tables = solver_tables(config(grid=grid))
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((1, 8)).astype(np.float32)
    theirs, x0 = torch.from_numpy(sample), np.zeros_like(sample)
    for step, timestep in enumerate(scheduler.timesteps):
        output = rng.standard_normal((1, 8)).astype(np.float32)
        theirs = scheduler.step(torch.from_numpy(output), timestep, theirs).prev_sample
        row = (tables.first if step == 0 else tables.coefficients)[step]
        data = row[4] * sample + row[5] * output
        sample = row[0] * sample + row[1] * output + row[2] * x0
        x0 = data
        np.testing.assert_allclose(sample, theirs.numpy(), rtol=1e-4, atol=1e-4)
    assert tables.timesteps.tolist() == scheduler.timesteps.tolist()


def test_ddim_and_euler_are_one_solver_in_two_units():
    ddim, euler = solver_tables(config("ddim")), solver_tables(config("euler"))
    sample = np.float32(0.7)
    scaled = sample * np.float32(1 / euler.input_scale[0])
    for step in range(GRID.steps):
        output = np.float32(np.sin(step))
        sample = ddim.coefficients[step, 0] * sample + ddim.coefficients[step, 1] * output
        scaled = euler.coefficients[step, 0] * scaled + euler.coefficients[step, 1] * output
    assert scaled == pytest.approx(sample, rel=1e-5)  # the last level is noise-free: alpha is 1


@pytest.mark.parametrize("solver", ["dpm", "ddim", "euler"])
def test_a_grid_comes_back_from_json(solver):
    made = config(solver)
    assert SolverConfig.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 5}, "grid: expected 5 levels, one a step, got 6"),
        ({"karras": True}, "karras: expected False beside a grid, got True"),
        ({"spacing": "trailing"}, "spacing: expected 'leading' beside a grid, got 'trailing'"),
        ({"grid": Grid("far", (2.0,), (1000,)), "steps": 1}, "grid: expected timesteps below 1000"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        config(**options)


def test_a_grid_takes_the_place_of_what_the_scheduler_says():
    source = {**SOURCE, "use_karras_sigmas": True, "timestep_spacing": "trailing"}
    made = solver_from_diffusers(source, solver="dpm", steps=GRID.steps, grid=GRID)
    assert (made.grid, made.karras) == (GRID, False)


def test_json_with_half_a_grid_is_refused():
    content = config().to_json()
    del content["grid"]["sigmas"]
    with pytest.raises(ConfigError, match="Expected a grid with"):
        SolverConfig.from_json(content)
