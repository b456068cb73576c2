"""A solver fitted to its steps: least squares, and what the runtime's tables make of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from blockcache.export.align.fit import AlignmentOptions, fit_alignment  # noqa: E402
from blockcache.export.align.solver_fit import Targets, first_order, fitted_step  # noqa: E402
from blockcache.export.measure.calibration import Calibration  # noqa: E402
from blockcache.export.measure.converged import converged_solver, fine_run  # noqa: E402
from blockcache.export.measure.sampling import Sampling  # noqa: E402
from blockcache.export.measurements import with_fit  # noqa: E402
from blockcache.runtime import ConfigError, Schedule, SolverConfig  # noqa: E402
from blockcache.runtime.solvers.solver import solver_tables  # noqa: E402

STEPS, IMAGES = 5, 3


def arrays(count, seed=0):
    random = np.random.default_rng(seed)
    shape = (IMAGES, 4, 6, 6)
    return [torch.from_numpy(random.normal(size=shape).astype(np.float32)) for _ in range(count)]


@pytest.mark.parametrize("solver", ["dpm", "unipc", "ddim", "euler"])
@pytest.mark.parametrize("remembered", [0, 1, 2])
def test_a_step_is_the_least_squares_one(solver, remembered):
    steps = first_order(SolverConfig(solver=solver, steps=STEPS, spacing="linspace"))
    latents, output, target, *past = arrays(3 + remembered)
    landed, kept, found = fitted_step(steps, latents, tuple(past), output, 2, target[:2])
    plain, (x0, *_) = steps.advance(latents, tuple(past), output, 2)
    terms = [latents, x0]
    terms += [x0 - past[0]] if past else []
    terms += [past[0] - past[1]] if len(past) > 1 else []
    columns = torch.stack([term[:2].flatten() for term in terms], 1).double().numpy()
    missed = (target[:2] - plain[:2]).flatten().double().numpy()
    expected = np.linalg.lstsq(columns, missed, rcond=None)[0]
    left = np.linalg.norm(missed - columns @ np.array(found[: len(terms)]))
    assert left == pytest.approx(np.linalg.norm(missed - columns @ expected), rel=1e-3)
    assert not any(found[len(terms) :])
    assert torch.allclose(kept[0], x0)
    assert (landed[:2] - target[:2]).norm() < (plain[:2] - target[:2]).norm()


@pytest.mark.parametrize("solver", ["dpm", "ddim", "euler"])
def test_the_tables_make_the_same_step(solver):
    config = SolverConfig(solver=solver, steps=STEPS, spacing="linspace")
    latents, output, target, h, e = arrays(5)
    for step, past in ((0, ()), (1, (h,)), (3, (h, e))):
        free = first_order(config)
        landed, kept, found = fitted_step(free, latents, past, output, step, target)
        fitted = [(0.0,) * 4] * STEPS
        fitted[step] = found
        tables = solver_tables(with_fit(config, fitted))
        row = (tables.first, tables.second, tables.coefficients)[len(past)][step].astype(float)
        made = row[0] * latents + row[1] * output
        for coefficient, x0 in zip(row[2:4], past, strict=False):
            made = made + coefficient * x0
        np.testing.assert_allclose(made, landed, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(
            row[4] * latents + row[5] * output, kept[0], rtol=1e-4, atol=1e-4
        )


@pytest.fixture(scope="module")
def sampling(tiny_models, conditions_of):
    model = tiny_models("sd")
    calibration = Calibration(conditions_of(model, 4), conditions_of(model, 1, seed=5))
    base = SolverConfig(solver="dpm", steps=20, spacing="linspace")
    return Sampling(model, converged_solver(base, STEPS), calibration, 2.0)


@pytest.mark.parametrize("solver", ["dpm", "ddim", "euler"])
def test_a_fitted_run_ends_nearer_to_the_converged_one(sampling, solver):
    sampling = dataclasses.replace(
        sampling, solver=dataclasses.replace(sampling.solver, solver=solver)
    )
    fine = dataclasses.replace(sampling, solver=converged_solver(sampling.solver, 40))
    jobs = [(prompt, 100 + prompt) for prompt in range(IMAGES)]
    run = fine_run(fine, jobs)
    scale = np.append(solver_tables(sampling.solver).input_scale, 1)[:, None, None, None, None]
    samples = run.samples_at([*sampling.solver.grid.sigmas, 0.0]) / scale
    targets = Targets(torch.from_numpy(samples.astype(np.float32)))
    schedule = Schedule.uncached(STEPS, len(sampling.model.blocks))
    options = AlignmentOptions(images=IMAGES)
    fit = fit_alignment(sampling, schedule, 1, options, jobs=jobs, targets=targets)
    plain = fit_alignment(sampling, schedule, 1, options, jobs=jobs)
    assert plain.fitted is None

    def off(latents):
        return np.linalg.norm(latents - run.latents)

    assert off(fit.latents) < 0.9 * off(plain.latents)
    runtime = dataclasses.replace(sampling, solver=with_fit(sampling.solver, fit.fitted))
    again = fit_alignment(runtime, schedule, 1, options, jobs=jobs).latents
    np.testing.assert_allclose(again, fit.latents, rtol=1e-3, atol=1e-3)


def test_targets_of_other_steps_or_of_too_many_images_are_refused():
    samples = torch.zeros(STEPS + 1, 2, 4, 6, 6)
    Targets(samples).check(STEPS, 2)
    with pytest.raises(
        ConfigError, match=r"targets of 4 steps and the end, for 1 to 2 images; got \(6, 2\)"
    ):
        Targets(samples).check(4, 2)
    with pytest.raises(ConfigError, match=r"for 1 to 1 images"):
        Targets(samples).check(STEPS, 1)
