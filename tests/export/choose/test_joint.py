"""Steps, grid and branches chosen together: what is looked at, what it may cost, which one wins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from blockcache.export.align.fit import AlignmentOptions
from blockcache.export.choose.grid_search import step_costs
from blockcache.export.choose.grids import named_grid
from blockcache.export.choose.joint import (
    BLENDS,
    COUNTS,
    FITTED,
    BranchErrors,
    Planner,
    grids_to_try,
    step_counts,
    step_sizes,
)
from blockcache.export.choose.preset import PresetOptions
from blockcache.export.choose.trials import TrialOptions
from blockcache.export.measure.calibration import Calibration
from blockcache.export.measure.converged import ConvergedOptions
from blockcache.export.measure.residuals import Moments, ratios
from blockcache.export.measure.sensitivity import SensitivityOptions
from blockcache.export.measurements import MeasurementOptions
from blockcache.export.pipeline import CompileOptions, compile_model
from blockcache.runtime import SolverConfig
from blockcache.runtime.solvers.noise import NoiseSchedule
from blockcache.runtime.solvers.solver import solver_tables

TRAINING = NoiseSchedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
SIGMAS = TRAINING.sigmas()
LEVELS = 40
BY_CUT = np.array([0.001, 0.2, 1.0])


def tables_on(grid, solver="dpm"):
    return solver_tables(SolverConfig(solver=solver, steps=grid.steps, noise=TRAINING, grid=grid))


@pytest.fixture(scope="module")
def evidence():
    """A made-up converged run, of two branches: the costs of steps, the errors, the outputs."""
    random = np.random.default_rng(0)
    sigmas = np.asarray(named_grid("karras", SIGMAS, LEVELS).sigmas)
    t = np.linspace(0, 1, LEVELS + 1)
    shape = (LEVELS + 1, 2, 3, 4, 4)
    data = np.sin(3 * t)[:, None] * random.standard_normal((1, 96)) + random.standard_normal(96)
    data = data.reshape(shape).astype(np.float32)
    alpha = 1 / np.sqrt(1 + sigmas**2)
    noise = random.standard_normal(shape[1:])
    samples = alpha[:, None, None, None, None] * (
        data[:-1] + sigmas[:, None, None, None, None] * noise
    )
    costs = step_costs(sigmas, samples, data, np.full(LEVELS, 0.5))
    outputs = np.cumsum(random.standard_normal((2, LEVELS, 5, 50)), axis=1)
    moments = [Moments.of(own) for own in outputs]
    grid = named_grid("karras", SIGMAS, 8)
    sensed = np.full((8, 2), 0.01)
    errors = BranchErrors.measured(
        moments, sensed, costs.nearest(np.asarray(grid.sigmas)), step_sizes(tables_on(grid))
    )
    return costs, errors, outputs


# -- what is looked at -----------------------------------------------------------------------------


def test_step_counts_begin_where_no_reuse_is_needed():
    assert step_counts(10.0, 50) == [10, 12, 14, 16, 18, 20, 22, 25, 28]
    assert step_counts(9.9999999999, 50)[0] == 10, "rounding of a sum of costs"
    assert step_counts(1.2, 50) == [1, 2, 3]
    assert step_counts(0.4, 50)[0] == 1


@given(st.floats(1, 200), st.integers(1, 50))
def test_step_counts_are_few_and_within_bounds(affordable, most):
    counts = step_counts(affordable, most)
    assert counts == sorted(set(counts))
    assert 1 <= len(counts) <= len(COUNTS)
    assert 1 <= counts[0] <= max(affordable, 1) + 1e-6
    assert counts[-1] <= most


def test_grids_lie_between_the_best_uncached_one_and_karras(evidence):
    costs, *_ = evidence
    found = grids_to_try(None, [6, 9], costs, SIGMAS)
    assert [grid.steps for grid in found] == [6] * len(BLENDS) + [9] * len(BLENDS)
    assert [grid.name for grid in found[:4]] == [
        "auto",
        "auto-karras0.3",
        "auto-karras0.6",
        "karras",
    ]
    assert np.allclose(found[3].sigmas, named_grid("karras", SIGMAS, 6).sigmas, rtol=1e-5)


def test_a_grid_that_is_asked_for_is_the_only_one(evidence):
    costs, *_ = evidence
    (found,) = grids_to_try("karras", [6], costs, SIGMAS)
    assert found == named_grid("karras", SIGMAS, 6)
    (found,) = grids_to_try("auto", [6], costs, SIGMAS)
    assert found.name == "auto"


# -- predictions -----------------------------------------------------------------------------------


def test_on_the_grid_that_was_sensed_the_losses_are_the_sensitivity(evidence):
    """Times the residual, as a plan on one grid counts them."""
    costs, errors, outputs = evidence
    grid = named_grid("karras", SIGMAS, 8)
    at = costs.nearest(np.asarray(grid.sigmas))
    problem = errors.problem(at, step_sizes(tables_on(grid)), BY_CUT)
    random = np.random.default_rng(0)
    (
        random.standard_normal((1, 96)),
        random.standard_normal(96),
        random.standard_normal((2, 3, 4, 4)),
    )
    outputs = np.cumsum(random.standard_normal((2, LEVELS, 5, 50)), axis=1)
    for losses, own in zip(problem.losses, outputs, strict=True):
        expected = 0.01 * ratios(own[at], "history")
        for step in range(1, 8):  # in use is what was computed before
            earlier = np.tril_indices(step)
            np.testing.assert_allclose(losses[step][earlier], expected[step][earlier], rtol=1e-4)


def test_a_first_order_solver_moves_by_its_own_step_alone():
    grid = named_grid("karras", SIGMAS, 6)
    ddim = tables_on(grid, "ddim")
    np.testing.assert_allclose(step_sizes(ddim), np.abs(ddim.coefficients[:, 1]), rtol=1e-6)


@pytest.mark.parametrize("spend", [2.5, 4.0, 6.0])
def test_a_plan_costs_what_was_asked_for(evidence, spend):
    costs, errors, _ = evidence
    for grid in grids_to_try(None, step_counts(spend, 20), costs, SIGMAS):
        found = Planner(errors, costs, BY_CUT, spend).best(grid, tables_on(grid))
        if found is None:
            continue
        reused = ~found.schedule.recompute
        depths = np.where(reused.any(1), reused.argmax(1), 2)
        assert BY_CUT[depths].sum() <= spend * (1 + 1e-9)
        assert found.schedule.recompute[0].all()
        assert found.predicted >= FITTED * costs.predicted(costs.nearest(np.asarray(grid.sigmas)))


def test_what_pays_for_every_step_reuses_nothing(evidence):
    costs, errors, _ = evidence
    grid = named_grid("karras", SIGMAS, 6)
    found = Planner(errors, costs, BY_CUT, 6.0).best(grid, tables_on(grid))
    assert found.schedule.recompute.all()
    assert found.name == "karras-6"


def test_levels_closer_than_the_converged_runs_are_left_out(evidence):
    costs, errors, _ = evidence
    grid = named_grid("karras", SIGMAS, 3 * LEVELS)
    assert Planner(errors, costs, BY_CUT, 50.0).best(grid, tables_on(grid)) is None


def test_neighbours_differ_at_two_steps_at_most_and_cost_no_more(evidence):
    costs, errors, _ = evidence
    grid = named_grid("karras", SIGMAS, 6)
    planner = Planner(errors, costs, BY_CUT, 3.0)
    found = planner.best(grid, tables_on(grid))
    near = planner.neighbours(found, tables_on(grid))
    assert near
    assert found not in near
    assert len(set(near)) == len(near)
    for other in near:
        assert other.grid == grid
        assert 1 <= (other.depths != found.depths).sum() <= 2
        assert BY_CUT[other.depths].sum() <= 3.0 * (1 + 1e-9)
    assert [other.predicted for other in near] == sorted(other.predicted for other in near)
    assert near[0].predicted >= found.predicted, "six steps are planned exactly"


# -- a compile -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_nearest_candidate_is_kept_and_the_others_are_reported(
    tiny_models, conditions_of, tmp_path, precision
):
    from blockcache.export.graph.to_onnx import ExportOptions

    model = tiny_models("small")
    calibration = Calibration(conditions_of(model, 2), conditions_of(model, 1, seed=5))
    options = CompileOptions(
        presets=(PresetOptions.parse("dpm:4:x1.5"), PresetOptions.parse("dpm:4")),
        export=ExportOptions(precision=precision),
        measurement=MeasurementOptions(
            guidance_scale=3.0,
            converged=ConvergedOptions(levels=20, images=1, gains=2),
            sensitivity=SensitivityOptions(images=1),
            alignment=AlignmentOptions(images=2),
            trials=TrialOptions(candidates=3, images=2, steps=5, moves=1),
        ),
    )
    compiled = compile_model(model, tmp_path / "b", options, calibration)
    bundle = compiled.bundle
    assert compiled.evaluations > 20, "the converged run alone takes 20 of one image"
    assert bundle.model.outputs == 2, "as the policy asks for, not the options of the export"
    preset = bundle.preset("dpm-4-x1.5")
    made = preset.provenance
    assert (made.kind, made.value, made.replaced_steps) == ("joint", 1.5, 4)
    assert made.costs == "FLOPs"
    grid = preset.solver["grid"]
    assert len(made.tried) == 3
    assert made.predicted_loss <= made.tried[f"{grid['name']}-{preset.schedule.steps}"]
    assert made.predicted_speedup >= 1.5 * (1 - 1e-6)
    assert preset.replaced_steps == 4
    again = compile_model(model, tmp_path / "b", options, calibration)
    assert again.bundle.preset("dpm-4-x1.5") == preset
    assert again.evaluations == 0, "everything was there already"
