"""The converged run: nothing changes when it is finer, and errors on it are carried as told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from blockcache.export.choose.grid_search import shortest_path, step_costs  # noqa: E402
from blockcache.export.choose.grids import grid_of, named_grid  # noqa: E402
from blockcache.export.measure.calibration import Calibration  # noqa: E402
from blockcache.export.measure.converged import (  # noqa: E402
    ConvergedOptions,
    converged_run,
    converged_solver,
    measure_gains,
)
from blockcache.export.measure.sampling import Sampling  # noqa: E402
from blockcache.runtime import ConfigError  # noqa: E402
from blockcache.runtime.solvers.diffusers_config import solver_from_diffusers  # noqa: E402

OPTIONS = ConvergedOptions(levels=24, images=2, gains=3)


@pytest.fixture(scope="module")
def sampling(tiny_models, conditions_of):
    model = tiny_models("sd")
    calibration = Calibration(conditions_of(model, 4), conditions_of(model, 1, seed=5))
    solver = solver_from_diffusers(model.scheduler, solver="dpm", steps=6)
    return Sampling(model, solver, calibration, 2.0)


@pytest.fixture(scope="module")
def run(sampling):
    return converged_run(sampling, OPTIONS)


def test_a_run_keeps_every_level_and_the_end(run, sampling):
    size = sampling.model.sample_size
    assert run.samples.shape == (24, 2, 4, *size)
    assert run.data.shape == (25, 2, 4, *size)
    assert (np.diff(run.sigmas) < 0).all()
    noise = sampling.solver.noise.sigmas()
    assert run.sigmas[[0, -1]] == pytest.approx(noise[[-1, 0]], rel=1e-5)


def test_its_end_is_where_the_solver_ends_on_the_same_levels(run, sampling):
    fine = replace(sampling, solver=converged_solver(sampling.solver, 24))
    jobs = [(prompt, OPTIONS.seed + n) for n, prompt in enumerate(fine.spread_prompts(2))]
    with fine.cached_unet() as cached:
        denoiser, noise = fine.begin(cached, jobs)
        end = denoiser.denoise(noise, fine.uncached).numpy()
    np.testing.assert_allclose(run.data[-1], end, rtol=1e-5, atol=1e-6)


def test_samples_between_its_levels_lie_on_the_run(run, sampling):
    at = run.samples_at([*run.sigmas, 0.0])
    np.testing.assert_array_equal(at[:-1], run.samples)
    np.testing.assert_array_equal(at[-1], run.latents)
    finer = converged_run(sampling, replace(OPTIONS, levels=47))  # a level between any two
    between = run.samples_at(finer.sigmas[1::2])
    step = np.abs(np.diff(run.samples, axis=0)).mean()
    assert np.abs(between - finer.samples[1::2]).mean() < 0.2 * step


def test_twice_as_fine_ends_nearby(run, sampling):
    finer = converged_run(sampling, replace(OPTIONS, levels=48))
    apart = np.linalg.norm(finer.data[-1] - run.data[-1]) / np.linalg.norm(run.data[-1])
    coarse = converged_run(sampling, replace(OPTIONS, levels=20))
    assert apart < np.linalg.norm(finer.data[-1] - coarse.data[-1]) / np.linalg.norm(run.data[-1])


def test_costs_of_a_run_are_the_errors_of_the_solver(run, sampling):
    """One step of DDIM from a level lands where the costs say."""
    costs = step_costs(run.sigmas, run.samples, run.data, np.ones(24))
    solver = converged_solver(sampling.solver, 24)
    grid = grid_of("two", run.sigmas[[5, 9]], solver.noise.sigmas())
    timesteps = (solver.grid.timesteps[5], solver.grid.timesteps[9])
    grid = replace(grid, timesteps=timesteps)
    ddim = replace(solver, solver="ddim", steps=2, grid=grid)
    onward = replace(sampling, solver=ddim)
    jobs = [(prompt, OPTIONS.seed + n) for n, prompt in enumerate(onward.spread_prompts(2))]
    with onward.cached_unet() as cached:
        denoiser, _ = onward.begin(cached, jobs)
        start = replace(denoiser.start(torch.from_numpy(run.samples[5])), past=())
        landed = denoiser.step(start, 0).latents.numpy()
    sizes = np.linalg.norm(run.data[-1].reshape(2, -1), axis=1)
    errors = np.linalg.norm((landed - run.samples[9]).reshape(2, -1), axis=1)
    assert costs.steps[5, 5, 9] == pytest.approx((errors / sizes).mean(), rel=1e-2)


def test_gains_are_positive_and_cover_every_level(run, sampling):
    gains = measure_gains(sampling, run, OPTIONS)
    assert gains.shape == (24,)
    assert (gains > 0).all()


def test_the_found_grid_is_nearer_than_a_named_one(run, sampling):
    costs = step_costs(run.sigmas, run.samples, run.data, np.ones(24))
    _, found = shortest_path(costs, 6)
    karras = named_grid("karras", sampling.solver.noise.sigmas(), 6)
    chain = sorted(set(costs.nearest(np.array(karras.sigmas))))
    assert found <= costs.predicted(chain) + 1e-9


@pytest.mark.parametrize("field", ["levels", "images", "gains"])
def test_too_little_is_refused(field):
    with pytest.raises(ConfigError, match=rf"Expected {field} of .* or more, got 0"):
        ConvergedOptions(**{field: 0})
