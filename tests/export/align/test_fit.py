"""Least squares: the algebra against numpy's, the fit against the run that it is made for."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from blockcache.export.align.fit import (  # noqa: E402
    AlignmentOptions,
    fit_alignment,
    judge_alignment,
    moments,
    solve,
)
from blockcache.export.measure.calibration import Calibration  # noqa: E402
from blockcache.export.measure.sampling import Sampling  # noqa: E402
from blockcache.export.unet.cached_unet import Denoiser  # noqa: E402
from blockcache.runtime import Alignment, ConfigError, Schedule  # noqa: E402
from blockcache.runtime.solvers.diffusers_config import solver_from_diffusers  # noqa: E402

TINY_RIDGE = 1e-9


def features(seed=0, images=3, channels=5, size=6):
    """C, and (C_last, C_before), float32 [B, C, H, W]: correlated, each channel in its own way."""
    random = np.random.default_rng(seed)
    shape = (images, channels, size, size)
    before = random.standard_normal(shape) + 3 * random.standard_normal((channels, 1, 1))
    last = 0.8 * before + 0.5 * random.standard_normal(shape)
    trend = random.uniform(0.5, 1.5, (channels, 1, 1))
    fresh = last + trend * (last - before) + 0.2 * random.standard_normal(shape) + 0.7
    tensors = [torch.from_numpy(values.astype(np.float32)) for values in (fresh, last, before)]
    return tensors[0], tensors[1:]


def channel(tensor, c):
    """All values of a channel, float64 [B * H * W]."""
    return tensor[:, c].double().numpy().ravel()


def used(coefficients, computed):
    """What stands in for C, float64 [B, C, H, W]."""
    rows = torch.from_numpy(coefficients).double()[:, None, :, None, None]
    outputs = computed if len(coefficients) == 3 else computed[:1]
    return sum(row * output.double() for row, output in zip(rows, outputs, strict=False)) + rows[-1]


def relative_error(fresh, estimate):
    return float((fresh.double() - estimate).norm() / fresh.double().norm())


# -- the algebra -----------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_without_ridge_it_is_least_squares_per_channel(seed, outputs):
    fresh, computed = features(seed)
    made = solve(moments(fresh, computed[:outputs], outputs), TINY_RIDGE).coefficients
    assert made.dtype == np.float32
    assert made.shape == (outputs + 1, 5)
    for c in range(5):
        predictors = [channel(output, c) for output in computed[:outputs]]
        matrix = np.stack([*predictors, np.ones_like(predictors[0])], axis=1)
        expected = np.linalg.lstsq(matrix, channel(fresh, c), rcond=None)[0]
        np.testing.assert_allclose(made[:, c], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outputs", [1, 2])
def test_moments_add_up_over_batches(outputs):
    fresh, computed = features(images=4)
    whole = moments(fresh, computed[:outputs], outputs)
    parts = sum(
        moments(fresh[i : i + 2], [output[i : i + 2] for output in computed[:outputs]], outputs)
        for i in (0, 2)
    )
    assert whole.shape == (5, outputs + 2, outputs + 2)
    assert whole[0, 0, 0] == 4 * 6 * 6
    np.testing.assert_allclose(parts, whole, rtol=1e-12)


@pytest.mark.parametrize("outputs", [1, 2])
def test_an_endless_ridge_leaves_the_shift_of_the_mean_alone(outputs):
    fresh, computed = features()
    made = solve(moments(fresh, computed[:outputs], outputs), 1e12).coefficients
    shift = [(channel(fresh, c) - channel(computed[0], c)).mean() for c in range(5)]
    np.testing.assert_allclose(made[0], 1.0, atol=1e-6)
    np.testing.assert_allclose(made[-1], shift, rtol=1e-5)
    if outputs == 2:
        np.testing.assert_allclose(made[1], 0.0, atol=1e-6)


def test_a_larger_ridge_pulls_every_coefficient_nearer_to_plain_reuse():
    sums = moments(*features(), 1)
    distance = [abs(solve(sums, ridge).coefficients[0] - 1) for ridge in (1e-3, 0.1, 10.0)]
    assert (distance[0] > distance[1]).all()
    assert (distance[1] > distance[2]).all()


def test_a_block_without_an_earlier_output_gets_no_coefficient_for_it():
    fresh, (last, _) = features()
    made = solve(moments(fresh, [last], 2), 1e-3)
    alone = solve(moments(fresh, [last], 1), 1e-3)
    assert not made.coefficients[1].any()
    np.testing.assert_allclose(made.coefficients[[0, 2]], alone.coefficients, rtol=1e-6)
    assert made.after == pytest.approx(alone.after, rel=1e-6)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("constant", [0.0, 0.1, 100.1, -3e4])
def test_a_constant_output_keeps_scale_1_and_is_shifted_to_the_mean(constant, outputs):
    fresh, computed = features()
    for output in computed:
        output[:, 2] = constant
    made = solve(moments(fresh, computed[:outputs], outputs), 1e-3).coefficients
    np.testing.assert_allclose(made[0, 2], 1.0, atol=1e-4)
    np.testing.assert_allclose(made[1:-1, 2], 0.0, atol=1e-4)
    mean = channel(fresh, 2).mean()
    assert channel(used(made, computed), 2).mean() == pytest.approx(
        mean, abs=1e-6 * (1 + abs(constant))
    )


@pytest.mark.parametrize("outputs", [1, 2])
def test_outputs_that_are_all_0_are_reused_as_they_are(outputs):
    zeros = torch.zeros(2, 3, 4, 4)
    made = solve(moments(zeros, [zeros] * outputs, outputs), 1e-3)
    np.testing.assert_array_equal(
        made.coefficients, Alignment.identity(1, (3,), outputs).tables[0][0]
    )
    assert made.before == made.after == 0


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e3, 1e6])
def test_the_unit_of_the_features_does_not_matter(size):
    fresh, computed = features()
    one = solve(moments(fresh, computed, 2), 1e-3)
    other = solve(moments(fresh * size, [output * size for output in computed], 2), 1e-3)
    np.testing.assert_allclose(other.coefficients[:2], one.coefficients[:2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        other.coefficients[2] / size, one.coefficients[2], rtol=1e-4, atol=1e-4
    )
    assert other.after == pytest.approx(one.after, rel=1e-4)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("ridge", [1e-6, 1e-1])
def test_the_errors_are_those_of_the_features(outputs, ridge):
    fresh, computed = features(3)
    made = solve(moments(fresh, computed[:outputs], outputs), ridge)
    assert made.before == pytest.approx(relative_error(fresh, computed[0].double()), rel=1e-6)
    after = relative_error(fresh, used(made.coefficients, computed))
    assert made.after == pytest.approx(after, rel=1e-5)
    assert made.after < made.before


feature_arrays = hnp.arrays(
    np.float32, (3, 2, 2, 3, 3), elements=st.floats(-8, 8, width=16)
)  # C, C_last, C_before


@given(feature_arrays, st.sampled_from([1, 2]), st.sampled_from([1e-6, 1e-3, 1.0, 1e3]))
def test_a_fit_is_no_worse_than_plain_reuse_on_what_it_was_fitted_on(arrays, outputs, ridge):
    """At any ridge: its objective at (scale 1, before 0, the mean's shift) has no penalty.

    The error is the root of a difference of sums, so rounding of 1e-16 is 1e-8 in it.
    """
    fresh, *computed = torch.from_numpy(arrays)
    made = solve(moments(fresh, computed[:outputs], outputs), ridge)
    assert np.isfinite(made.coefficients).all()
    assert made.after <= made.before + 1e-6


@pytest.mark.parametrize("wrong", [{"images": 0}, {"ridge": 0.0}, {"ridge": float("nan")}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match="Expected at least one image and a ridge above 0; got"):
        AlignmentOptions(**wrong)


# -- the fit on a U-Net ----------------------------------------------------------------------------

STEPS, SCALE = 6, 3.0
OPTIONS = AlignmentOptions(images=3)


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models("sd")


@pytest.fixture(scope="module")
def sampling(model, conditions_of):
    calibration = Calibration(conditions_of(model, 2), conditions_of(model, 1, seed=5))
    solver = solver_from_diffusers(model.scheduler, solver="dpm", steps=STEPS)
    return Sampling(model, solver, calibration, SCALE)


@pytest.fixture(scope="module")
def schedule(model):
    """Every block reused at some step, none at all; block 0 is never computed a second time."""
    recompute = np.random.default_rng(2).random((STEPS, len(model.blocks))) < 0.5
    recompute[0], recompute[1:, 0], recompute[3, 1] = True, False, True
    return Schedule(recompute)


@pytest.fixture(scope="module")
def jobs():
    """The images that the fit uses, by its documentation."""
    return [(i % 2, OPTIONS.seed + i) for i in range(OPTIONS.images)]


@pytest.fixture(scope="module", params=[1, 2], ids=["scale-shift", "history"])
def fitted(request, sampling, schedule):
    """(outputs, the fit, the final latents of its student, the progress it reported)."""
    states, heard, advance = [], [], Denoiser.advance

    def watched(*args):
        states.append(advance(*args))
        return states[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Denoiser, "advance", watched)
        fit = fit_alignment(
            sampling, schedule, request.param, OPTIONS, observer=lambda *told: heard.append(told)
        )
    assert len(states) == STEPS
    return request.param, fit, states[-1].latents, heard


def test_recomputed_entries_are_the_identity_and_have_no_error(fitted, schedule):
    outputs, fit, _, heard = fitted
    assert fit.alignment.outputs == outputs
    fit.alignment.check(schedule)
    for errors in (fit.before, fit.after):
        assert errors.shape == schedule.recompute.shape
        assert not errors[schedule.recompute].any()
        assert (errors[~schedule.recompute] > 0).all()
    assert heard == [("align", step + 1, STEPS) for step in range(STEPS)]


def test_the_fit_repairs_every_reused_output(fitted, schedule):
    _, fit, _, _ = fitted
    reused = ~schedule.recompute
    assert (fit.after <= fit.before + 1e-6).all()
    assert fit.after[reused].mean() < 0.9 * fit.before[reused].mean()


def test_a_block_computed_once_has_no_coefficient_for_the_output_before(fitted):
    outputs, fit, _, _ = fitted
    if outputs == 2:
        assert not fit.alignment.tables[0][:, 1].any()
        assert fit.alignment.tables[1][4:, 1].any()


def test_the_table_makes_the_run_that_it_was_fitted_on(fitted, sampling, schedule, jobs):
    outputs, fit, latents, _ = fitted
    with sampling.cached_unet(outputs) as cached:
        denoiser, noise = sampling.begin(cached, jobs)
        again = denoiser.denoise(noise, schedule, fit.alignment)
        plain = denoiser.denoise(noise, schedule)
    assert torch.equal(again, latents)
    assert not torch.allclose(plain, latents)


def test_the_reported_errors_are_those_of_the_aligned_run(fitted, sampling, schedule, jobs):
    outputs, fit, _, _ = fitted
    before, after = np.zeros((2, *schedule.recompute.shape))

    def measure(step, k, computed, kept):
        rows = fit.alignment.tables[k][step]
        before[step, k] = relative_error(computed, kept[0].double())
        after[step, k] = relative_error(computed, used(rows, [*kept, kept[-1]][:2]))
        return torch.from_numpy(rows)

    with sampling.cached_unet(outputs) as cached:
        denoiser, noise = sampling.begin(cached, jobs)
        state = denoiser.start(noise)
        for step, recompute in enumerate(schedule.recompute):
            state = denoiser.step(state, step, recompute, partial(measure, step))
    np.testing.assert_allclose(fit.before, before, rtol=1e-4)
    np.testing.assert_allclose(fit.after, after, rtol=1e-4)


def test_coefficients_made_elsewhere_are_judged_alike(fitted, sampling, schedule):
    _, fit, _, _ = fitted
    heard = []
    judged = judge_alignment(
        sampling, schedule, fit.alignment, OPTIONS, observer=lambda *told: heard.append(told)
    )
    assert heard == [("judge", step + 1, STEPS) for step in range(STEPS)]
    for ours, theirs in zip(judged.alignment.tables, fit.alignment.tables, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(judged.before, fit.before)
    np.testing.assert_array_equal(judged.after, fit.after)


def test_a_fit_leaves_the_model_as_it_was(fitted, model):
    assert not any("inner" in name for name, _ in model.unet.named_modules())
