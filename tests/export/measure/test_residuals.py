"""Residuals: against least squares by numpy, and on a U-Net against its own outputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from blockcache.export.measure.calibration import Calibration  # noqa: E402
from blockcache.export.measure.residuals import (  # noqa: E402
    ResidualOptions,
    measure_residuals,
    ratios,
)
from blockcache.export.measure.reuse import HISTORY, PLAIN, REUSES, SCALE_SHIFT  # noqa: E402
from blockcache.export.measure.sampling import Sampling  # noqa: E402
from blockcache.runtime import ConfigError  # noqa: E402
from blockcache.runtime.solvers.diffusers_config import solver_from_diffusers  # noqa: E402

STEPS, CHANNELS, SAMPLES = 5, 3, 40
seeds = st.integers(0, 2**32 - 1)


def outputs(seed, steps=STEPS):
    """Outputs that move on from step to step, with a mean, as those of a block do."""
    random = np.random.default_rng(seed)
    moves = random.standard_normal((steps, CHANNELS, SAMPLES))
    return (random.standard_normal((1, CHANNELS, 1)) + np.cumsum(moves, axis=0)).astype(np.float32)


def left(target, predictors):
    """|target - best estimate| by numpy's least squares, channel by channel."""
    total = 0.0
    for channel in range(CHANNELS):
        columns = [np.ones(SAMPLES), *(p[channel].astype(np.float64) for p in predictors)]
        design = np.stack(columns, axis=1)
        found = np.linalg.lstsq(design, target[channel].astype(np.float64), rcond=None)[0]
        total += ((target[channel] - design @ found) ** 2).sum()
    return np.sqrt(total)


def once(made, step):
    return np.sqrt(((made[step].astype(np.float64) - made[step - 1]) ** 2).sum())


@given(seeds)
def test_plain_reuse_is_the_distance_between_two_outputs(seed):
    made = outputs(seed)
    found = ratios(made, PLAIN)
    for step in range(1, STEPS):
        for a in range(step):
            distance = np.sqrt(((made[step].astype(np.float64) - made[a]) ** 2).sum())
            assert found[step, a] == pytest.approx(distance / once(made, step), rel=1e-5)
        assert found[step, step - 1] == pytest.approx(1.0)


@given(seeds)
def test_aligned_reuse_is_what_least_squares_leaves(seed):
    made = outputs(seed)
    scaled, history = ratios(made, SCALE_SHIFT), ratios(made, HISTORY)
    for step in range(1, STEPS):
        for a in range(step):
            expected = left(made[step], [made[a]]) / once(made, step)
            assert scaled[step, a] == pytest.approx(expected, rel=1e-5)
            assert history[step, a, a] == pytest.approx(expected, rel=1e-5), "none before"
            for b in range(a):
                expected = left(made[step], [made[a], made[b]]) / once(made, step)
                assert history[step, a, b] == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("reuse", REUSES)
@given(seed=seeds, unit=st.sampled_from([1e-3, 1.0, 1e3]))
def test_a_ratio_has_no_unit_and_is_0_where_nothing_is_earlier(reuse, seed, unit):
    made = outputs(seed)
    found = ratios(made, reuse)
    np.testing.assert_allclose(ratios(made * np.float32(unit), reuse), found, rtol=1e-3, atol=1e-3)
    index = np.indices(found.shape)
    assert not found[index[1] >= index[0]].any()
    if found.ndim == 3:
        assert not found[index[2] > index[1]].any()


def test_what_follows_a_line_is_repaired_by_history_alone():
    """C_s = start + s * slope: scale and shift cannot follow, the last two outputs can."""
    random = np.random.default_rng(0)
    start, slope = random.standard_normal((2, CHANNELS, SAMPLES))
    made = np.stack([start + step * slope for step in range(STEPS)]).astype(np.float32)
    assert ratios(made, SCALE_SHIFT)[3, 1] > 0.3
    assert ratios(made, HISTORY)[3, 1, 0] < 1e-2


@pytest.mark.parametrize("reuse", REUSES)
def test_outputs_that_never_move_leave_nothing(reuse):
    """Up to the rounding of sums in float64, against outputs of size 1."""
    made = np.repeat(outputs(0, steps=1), STEPS, axis=0)
    made[-1] += 1.0  # so that there is a unit to measure in
    assert ratios(made, reuse)[:-1].max() < 1e-5


def test_a_change_of_one_rounding_is_no_square_root_of_less_than_nothing():
    """|C_s - C_{s-1}|^2 is a difference of large sums, which may come out below 0."""
    for seed in range(100):
        made = np.repeat(outputs(seed, steps=1), STEPS, axis=0)
        made[2, 0, 0] = np.nextafter(made[2, 0, 0], np.float32(9))
        assert np.isfinite(ratios(made, PLAIN)).all()


def test_one_step_alone_reuses_nothing():
    assert ratios(outputs(0, steps=1), HISTORY).tolist() == [[[0.0]]]


def test_an_unknown_reuse_is_refused():
    with pytest.raises(ConfigError) as caught:
        ratios(outputs(0), "magic")
    assert str(caught.value) == (
        "Expected a reuse of ('plain', 'scale-shift', 'history'), got 'magic'."
    )


@pytest.mark.parametrize("changed", [{"images": 0}, {"channels": 0}, {"positions": 0}])
def test_options_that_measure_nothing_are_refused(changed):
    with pytest.raises(ConfigError, match="Expected an image, channel and position at least"):
        ResidualOptions(**changed)


def test_a_u_net_is_measured_on_its_own_outputs(tiny_models, conditions_of):
    """All channels and positions sampled: plain ratios are those of the whole outputs."""
    model = tiny_models("one-level")
    calibration = Calibration(conditions_of(model, 4), conditions_of(model, 1, seed=5))
    solver = solver_from_diffusers(model.scheduler, solver="dpm", steps=3)
    sampling = Sampling(model, solver, calibration, 3.0)
    options = ResidualOptions(images=2, channels=999, positions=9999)
    heard = []
    found = measure_residuals(sampling, PLAIN, options, observer=lambda *told: heard.append(told))
    assert heard == [("residuals", step, 3) for step in (1, 2, 3)]
    with sampling.cached_unet() as cached:
        denoiser, noise = sampling.begin(cached, [(0, options.seed), (2, options.seed + 1)])
        kept = [state.kept for state in denoiser.trajectory(noise, sampling.uncached)]
    for k in range(len(model.blocks)):
        far, near = ((kept[2][k][0] - kept[a][k][0]).double().norm() for a in (0, 1))
        assert found[k, 2, 0] == pytest.approx(float(far / near), rel=1e-4)
    history = measure_residuals(sampling, HISTORY, options)
    assert history.shape == (len(model.blocks), 3, 3, 3)
    again = measure_residuals(sampling, HISTORY, options)
    np.testing.assert_array_equal(history, again)
