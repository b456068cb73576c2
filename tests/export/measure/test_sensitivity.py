"""Sensitivity: against its definition where that is affordable, and its edges."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from blockcache.export.measure.calibration import Calibration  # noqa: E402
from blockcache.export.measure.sampling import Sampling  # noqa: E402
from blockcache.export.measure.sensitivity import SensitivityOptions, measure_sensitivity  # noqa: E402
from blockcache.runtime import ConfigError, Schedule  # noqa: E402
from blockcache.runtime.solvers.diffusers_config import solver_from_diffusers  # noqa: E402
from blockcache.runtime.solvers.solver import solver_tables  # noqa: E402

STEPS, SCALE = 3, 3.0
OPTIONS = SensitivityOptions(images=2)


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models("one-level")


@pytest.fixture(scope="module")
def sampling(model, conditions_of):
    calibration = Calibration(conditions_of(model, 4), conditions_of(model, 1, seed=5))
    solver = solver_from_diffusers(model.scheduler, solver="dpm", steps=STEPS)
    return Sampling(model, solver, calibration, SCALE)


def silenced(model, blocks):
    """A copy of the model in which some blocks put out 0 at every step."""
    made = dataclasses.replace(model, unet=copy.deepcopy(model.unet))
    for k in blocks:
        projection = made.unet.get_submodule(made.blocks[k].path).proj_out
        torch.nn.init.zeros_(projection.weight)
        torch.nn.init.zeros_(projection.bias)
    return made


def by_definition(sampling, step, block):
    """Relative distance of the final latents when one block is reused at one step.

    Of the images that the measurement takes: prompts 0 and 2 of four, spread evenly.
    """
    recompute = sampling.uncached.recompute.copy()
    recompute[step, block] = False
    with sampling.cached_unet() as cached:
        denoiser, noise = sampling.begin(cached, [(0, OPTIONS.seed), (2, OPTIONS.seed)])
        ours, reference = (
            denoiser.denoise(noise, schedule).double()
            for schedule in (Schedule(recompute), sampling.uncached)
        )
    return float((ours - reference).norm() / reference.norm())


@pytest.fixture(scope="module")
def measured(sampling):
    """(The sensitivity of the whole model, the progress reported.)"""
    heard = []
    made = measure_sensitivity(sampling, OPTIONS, observer=lambda *told: heard.append(told))
    return made.table, heard


def test_every_block_has_a_sensitivity_at_every_step_but_the_first(measured, model):
    made, heard = measured
    assert made.dtype == np.float32
    assert made.shape == (STEPS, len(model.blocks))
    assert not made[0].any()
    assert np.isfinite(made).all()
    assert (made[1:] > 0).all()
    assert heard == [("sensitivity", step, STEPS) for step in range(2, STEPS + 1)]


def test_at_the_last_step_it_is_the_definition(measured, model, sampling):
    """No step follows over which the blocks would share a gain."""
    for k in range(len(model.blocks)):
        expected = by_definition(sampling, STEPS - 1, k)
        assert measured[0][-1, k] == pytest.approx(expected, rel=1e-3)


def test_of_one_block_alone_it_is_the_definition_at_every_step(model, sampling):
    """The blocks of a step share a gain: where one of them errs, it is that one's own."""
    chosen = 1
    others = [k for k in range(len(model.blocks)) if k != chosen]
    alone = dataclasses.replace(sampling, model=silenced(model, others))
    made = measure_sensitivity(alone, OPTIONS).table
    for step in range(1, STEPS):
        expected = by_definition(alone, step, chosen)
        assert made[step, chosen] == pytest.approx(expected, rel=1e-3)
        assert not made[step, others].any()


def test_it_is_the_same_every_time(measured, sampling):
    again = measure_sensitivity(sampling, OPTIONS).table
    np.testing.assert_array_equal(again, measured[0])


def test_the_shared_gain_is_a_fair_estimate(measured, model, sampling):
    """A single reuse, carried to the end by itself, comes out within a factor of two."""
    for k in range(len(model.blocks)):
        expected = by_definition(sampling, 1, k)
        assert 0.5 < measured[0][1, k] / expected < 2


def test_a_gain_says_how_an_error_of_the_model_output_moves_the_latents(sampling):
    """At the last step nothing follows: it is the solver's own coefficient, over their size."""
    gains = measure_sensitivity(sampling, OPTIONS).gains
    assert gains.shape == (STEPS,)
    assert (gains > 0).all()
    with sampling.cached_unet() as cached:
        denoiser, noise = sampling.begin(cached, [(0, OPTIONS.seed), (2, OPTIONS.seed)])
        size = denoiser.denoise(noise, sampling.uncached).double().norm()
    expected = abs(float(solver_tables(sampling.solver).coefficients[-1, 1])) / float(size)
    assert gains[-1] == pytest.approx(expected, rel=1e-3)


def test_at_least_one_image():
    with pytest.raises(ConfigError) as caught:
        SensitivityOptions(images=0)
    assert str(caught.value) == "Expected at least one image, got 0."
