"""scale_shift_residual on the host: bit for bit the float32 formula, rounded once."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockcache import kernels

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
HALF_ULP = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST = {"float32": 0.0, "float16": 2.0**-25, "bfloat16": 0.0}  # half a subnormal unit


@st.composite
def cases(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    T, layout = draw(st.sampled_from(list(DTYPES))), draw(st.sampled_from(["nchw", "nhwc"]))
    N, C = draw(st.integers(1, 3)), draw(st.integers(1, 150))
    H, W = draw(st.integers(1, 9)), draw(st.integers(1, 20))
    shape = (N, C, H, W) if layout == "nchw" else (N, H, W, C)
    offset = draw(st.integers(0, 7))
    tensors = [
        rng.standard_normal(N * C * H * W + offset).astype(DTYPES[T])[offset:].reshape(shape)
        for _ in range(3)
    ]
    rows = rng.standard_normal((3, C)).astype(np.float32)
    case = {"x": tensors[0], "last": tensors[1], "scale": rows[0], "shift": rows[1]}
    if draw(st.booleans()):
        case |= {"before": tensors[2], "before_scale": rows[2]}
    return case, layout, T, rng


def formula(case, layout, number, magnitude=False):
    """The documented formula in the documented order, or the same of absolute values."""
    spread = (slice(None), None, None) if layout == "nchw" else slice(None)
    values = {name: np.asarray(value).astype(number) for name, value in case.items()}
    if magnitude:
        values = {name: np.abs(value) for name, value in values.items()}
    with np.errstate(all="ignore"):
        y = values["x"] + values["scale"][spread] * values["last"]
        if "before" in values:
            y = y + values["before_scale"][spread] * values["before"]
        return y + values["shift"][spread]


@given(cases())
def test_equals_the_float32_formula_rounded_once(drawn):
    case, layout, T, _ = drawn
    y = np.empty_like(case["x"])
    kernels.scale_shift_residual(y, layout=layout, **case)
    np.testing.assert_array_equal(y, formula(case, layout, np.float32).astype(DTYPES[T]))


@given(cases())
def test_is_close_to_the_float64_formula(drawn):
    """5 float32 roundings on the longest path, then one to T: half a unit of the result."""
    case, layout, T, _ = drawn
    y = np.empty_like(case["x"])
    kernels.scale_shift_residual(y, layout=layout, **case)
    exact = formula(case, layout, np.float64)
    arithmetic = 5.01 * 2.0**-24 * formula(case, layout, np.float64, magnitude=True)
    rounding = HALF_ULP[T] * (np.abs(exact) + arithmetic) + SMALLEST[T]
    assert np.all(np.abs(y.astype(np.float64) - exact) <= arithmetic + rounding)


@given(cases(), st.sampled_from([np.nan, np.inf, -np.inf, 6e4, 3e38]))
def test_special_numbers_go_through_the_formula(drawn, special):
    case, layout, T, rng = drawn
    with np.errstate(over="ignore", invalid="ignore"):
        for name in ("x", "last", "before"):
            if name in case:
                case[name].flat[rng.integers(case[name].size)] = special
        expected = formula(case, layout, np.float32).astype(DTYPES[T])
    y = np.empty_like(case["x"])
    kernels.scale_shift_residual(y, layout=layout, **case)
    with np.errstate(invalid="ignore"):  # numpy compares no NaN of bfloat16
        np.testing.assert_array_equal(y.astype(np.float32), expected.astype(np.float32))


@given(cases(), st.sampled_from(["x", "last", "before"]))
def test_the_output_may_replace_any_input(drawn, name):
    case, layout, T, _ = drawn
    expected = formula(case, layout, np.float32).astype(DTYPES[T])
    y = case.get(name, case["x"])
    kernels.scale_shift_residual(y, layout=layout, **case)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("T", list(DTYPES))
def test_scale_one_shift_zero_is_the_plain_residual_addition(T):
    rng = np.random.default_rng(2)
    x, last = rng.standard_normal((2, 2, 6, 5, 7)).astype(DTYPES[T])
    y = np.empty_like(x)
    one, zero = np.ones(6, np.float32), np.zeros(6, np.float32)
    kernels.scale_shift_residual(y, x=x, last=last, scale=one, shift=zero)
    np.testing.assert_array_equal(y, x + last)


def test_before_needs_its_scale():
    t, row = np.ones((1, 2, 3), np.float32), np.ones(2, np.float32)
    with pytest.raises(kernels.KernelError, match="a required pointer is NULL") as caught:
        kernels.scale_shift_residual(t.copy(), x=t, last=t, before=t, scale=row, shift=row)
    assert caught.value.code == -1


def test_layout_has_two_names():
    t, row = np.ones((1, 2, 3), np.float32), np.ones(2, np.float32)
    with pytest.raises(kernels.KernelError, match="layout: expected one of nchw, nhwc, got 'hwc'"):
        kernels.scale_shift_residual(t, x=t, last=t, scale=row, shift=row, layout="hwc")
