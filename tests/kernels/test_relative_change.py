"""relative_change and guidance_rescale_factors on the host, against float64."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockcache import kernels

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
UNIT = 2.0**-24


@st.composite
def pairs(draw, least=1, halves=1):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (halves * draw(st.integers(1, 4)), draw(st.integers(least, 1500)))
    dtype, offset = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 7))
    size = shape[0] * shape[1]
    pair = (rng.standard_normal((2, size + offset)) * draw(st.sampled_from([1e-3, 1, 100]))).astype(
        dtype
    )
    return pair[0, offset:].reshape(shape), pair[1, offset:].reshape(shape), rng


def exact(now, before, images=None):
    now, before = now.astype(np.float64), before.astype(np.float64)
    with np.errstate(all="ignore"):
        difference, magnitude = np.abs(now - before).sum(1), np.abs(now).sum(1)
        difference, magnitude = (
            sums.reshape(-1, images or len(now)).sum(0) for sums in (difference, magnitude)
        )
        return difference / magnitude, difference.sum() / magnitude.sum()


@given(pairs())
def test_is_within_nine_units_of_the_exact_quotient(pair):
    """4 units in each sum (1 difference, 3 tree) and 1 for the quotient: see the kernel's file."""
    now, before, _ = pair
    per_sample, whole = kernels.relative_change(now, before)
    exact_per_sample, exact_whole = exact(now, before)
    np.testing.assert_allclose(per_sample, exact_per_sample, rtol=9.01 * UNIT, atol=0)
    np.testing.assert_allclose(whole, exact_whole, rtol=9.01 * UNIT, atol=0)


@given(pairs(halves=2))
def test_the_halves_of_an_image_count_together(pair):
    now, before, _ = pair
    images = len(now) // 2
    per_image, whole = kernels.relative_change(now, before, images=images)
    exact_per_image, exact_whole = exact(now, before, images)
    np.testing.assert_allclose(per_image, exact_per_image, rtol=9.01 * UNIT, atol=0)
    np.testing.assert_allclose(whole, exact_whole, rtol=9.01 * UNIT, atol=0)


@pytest.mark.parametrize("images", [0, 3, 8])
def test_images_must_divide_the_samples(images):
    ones = np.ones((4, 5), np.float32)
    with pytest.raises(kernels.KernelError, match=f"divides 4 samples, got {images}"):
        kernels.relative_change(ones, ones, images=images)


@given(pairs())
def test_is_deterministic(pair):
    now, before, _ = pair
    first, again = kernels.relative_change(now, before), kernels.relative_change(now, before)
    np.testing.assert_array_equal(first[0], again[0])
    assert first[1] == again[1]


@given(pairs(), st.sampled_from([np.nan, np.inf, -np.inf]), st.integers(0, 1))
def test_special_numbers_reach_their_sample_and_the_whole_only(pair, special, which):
    *arrays, rng = pair
    n, i = rng.integers(arrays[0].shape[0]), rng.integers(arrays[0].shape[1])
    arrays[which][n, i] = special
    per_sample, whole = kernels.relative_change(*arrays)
    exact_per_sample, exact_whole = exact(*arrays)
    np.testing.assert_allclose(per_sample, exact_per_sample, rtol=9.01 * UNIT)
    np.testing.assert_allclose(whole, exact_whole, rtol=9.01 * UNIT)
    assert not np.isfinite(whole)


def test_no_change_is_zero_even_of_nothing():
    ones, zeros = np.ones((2, 300), np.float32), np.zeros((2, 300), np.float32)
    assert kernels.relative_change(ones, ones)[1] == 0
    assert kernels.relative_change(zeros, zeros)[1] == 0
    assert kernels.relative_change(zeros, ones)[1] == np.inf


@given(pairs(least=2), st.floats(0, 1), st.floats(1, 10))
def test_rescale_factors_are_those_of_the_float64_formula(pair, phi, scale):
    """float32 enters twice: in g, whose 3 roundings are the solver step's own, and in the result.

    g is therefore rounded in float32 here too; the sums and the root are float64 on both sides.
    """
    unconditional, conditional, _ = pair
    model_out = np.concatenate([unconditional, conditional])
    u, c = unconditional.astype(np.float32), conditional.astype(np.float32)
    g = (u + np.float32(scale) * (c - u)).astype(np.float64)
    phi32 = float(np.float32(phi))
    expected = phi32 * np.std(c.astype(np.float64), 1) / np.std(g, 1) + 1 - phi32
    factors = kernels.guidance_rescale_factors(model_out, guidance=scale, phi=phi)
    np.testing.assert_allclose(factors, expected, rtol=2 * UNIT)


@given(pairs(least=2), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_special_numbers_reach_the_factor_of_their_sample_only(pair, special):
    *halves, rng = pair
    model_out = np.concatenate(halves)
    clean = kernels.guidance_rescale_factors(model_out, guidance=3.0, phi=0.5)
    row = rng.integers(len(model_out))
    model_out[row, rng.integers(model_out.shape[1])] = special
    factors = kernels.guidance_rescale_factors(model_out, guidance=3.0, phi=0.5)
    sample = row % len(clean)
    assert np.isnan(factors[sample])  # as in the formula: the mean is not finite
    np.testing.assert_array_equal(np.delete(factors, sample), np.delete(clean, sample))


def test_rescaled_guidance_has_the_conditional_spread():
    rng = np.random.default_rng(3)
    m = rng.standard_normal((4, 4, 8, 8)).astype(np.float32)
    x, g = np.zeros((2, 4, 8, 8), np.float32), np.empty((2, 4, 8, 8), np.float32)
    table = np.array([[0, 1, 0, 0, 0, 0, 0, 0]], np.float32)
    factors = kernels.guidance_rescale_factors(m, guidance=7.5, phi=1.0)
    kernels.guided_solver_step(
        g, sample=x, model_out=m, table=table, step=0, guidance=7.5, rescale=factors
    )
    # The factor, the product and the deviation's own rounding: a few units, none large.
    np.testing.assert_allclose(g.std((1, 2, 3)), m[2:].std((1, 2, 3)), rtol=16 * UNIT)


def test_bound_factors_follow_their_arrays_and_have_a_phi_of_their_own():
    rng = np.random.default_rng(4)
    m, factors, phi = np.empty((4, 50), np.float32), np.empty(2, np.float32), np.float32([0, 1])
    run = kernels.bind_guidance_rescale_factors(factors, model_out=m, guidance=7.5, phi=phi)
    for _ in range(2):
        m[...] = rng.standard_normal(m.shape)
        run()
        assert factors[0] == 1
        np.testing.assert_array_equal(
            factors[1:], kernels.guidance_rescale_factors(m, guidance=7.5, phi=1.0)[1:]
        )


def test_an_odd_batch_has_no_halves():
    with pytest.raises(kernels.KernelError, match=r"model_out: expected 2N samples.*got 3"):
        kernels.guidance_rescale_factors(np.ones((3, 4), np.float32), guidance=2.0, phi=0.5)
