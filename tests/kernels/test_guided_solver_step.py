"""guided_solver_step on the host: bit for bit the float32 formula, and close to it in float64."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockcache import kernels
from blockcache.runtime.solvers.philox import standard_normal

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
UNIT = 2.0**-24  # largest relative error of one float32 rounding


def array(rng, shape, dtype=np.float32, offset=0):
    """Normal numbers whose memory starts `offset` elements after an allocation."""
    size = int(np.prod(shape))
    buffer = rng.standard_normal(size + offset).astype(dtype)
    return buffer[offset:].reshape(shape)


def assert_same(actual, expected):
    """Equal, NaN where NaN; in float32, as numpy compares no NaN of bfloat16."""
    with np.errstate(invalid="ignore"):
        actual, expected = actual.astype(np.float32), expected.astype(np.float32)
    np.testing.assert_array_equal(actual, expected)


def noise_of(case, step):
    """float32 [N, M], by the numpy twin; None without seeds."""
    seeds = case["seeds"]
    return None if seeds is None else standard_normal(seeds, step, case["sample"].shape[1])


def formula(case, row, number, noise):
    """The documented formula in the documented order, computed with `number` (a numpy type)."""
    as_number = {
        name: None if value is None else np.asarray(value).astype(number)
        for name, value in case.items()
        if name != "seeds"
    }
    x, m = as_number["sample"], as_number["model_out"]
    row = row.astype(number)
    g = m
    with np.errstate(all="ignore"):
        if case["guidance"] is not None:
            u, *i, c = np.split(m, len(m) // len(x))
            scale = as_number["guidance"][:, None]
            g = u + scale * (c - u)
            if i:
                g = u + as_number["image_guidance"][:, None] * (i[0] - u) + scale * (c - i[0])
        if case["rescale"] is not None:
            g = as_number["rescale"][:, None] * g
        next_sample = row[0] * x + row[1] * g
        for column, name in ((2, "previous_x0"), (3, "earlier_x0")):
            if row[column] != 0:
                next_sample = next_sample + row[column] * as_number[name]
        if row[7] != 0:
            next_sample = next_sample + row[7] * noise.astype(number)
        x0 = row[4] * x + row[5] * g
        next_input = row[6] * next_sample
    return next_sample, x0, next_input


@st.composite
def cases(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    N, M = draw(st.integers(1, 3)), draw(st.integers(1, 700))
    T = draw(st.sampled_from(list(DTYPES)))
    parts = draw(st.sampled_from([1, 2, 3]))  # without guidance, with it, and with the image's
    guided = parts > 1
    histories = draw(st.integers(0, 2))
    offset = draw(st.integers(0, 3))
    case = {
        "sample": array(rng, (N, M), offset=offset),
        "model_out": array(rng, (parts * N, M), DTYPES[T], offset),
        "previous_x0": array(rng, (N, M), offset=offset) if histories > 0 else None,
        "earlier_x0": array(rng, (N, M), offset=offset) if histories > 1 else None,
        "guidance": array(rng, N) * 8 if guided else None,
        "image_guidance": array(rng, N) * 2 if parts == 3 else None,
        "rescale": array(rng, N) if guided and draw(st.booleans()) else None,
        "seeds": rng.integers(0, 2**64, N, np.uint64) if draw(st.booleans()) else None,
    }
    table = array(rng, (3, 8))
    table[:, 2 + histories : 4] = 0
    table[:, 7] *= case["seeds"] is not None
    return case, table, T, draw(st.integers(0, 2)), rng


def run(case, table, T, step):
    next_sample = np.empty_like(case["sample"])
    x0 = np.empty_like(case["sample"])
    next_input = np.empty(case["model_out"].shape, DTYPES[T])
    kernels.guided_solver_step(
        next_sample, x0_out=x0, next_input=next_input, table=table, step=step, **case
    )
    return next_sample, x0, next_input


@given(cases())
def test_equals_the_float32_formula_bit_for_bit(drawn):
    case, table, T, step, _ = drawn
    next_sample, x0, next_input = run(case, table, T, step)
    expected_next, expected_x0, expected_input = formula(
        case, table[step], np.float32, noise_of(case, step)
    )
    assert_same(next_sample, expected_next)
    assert_same(x0, expected_x0)
    for part in np.split(next_input, len(next_input) // len(next_sample)):
        assert_same(part, expected_input.astype(DTYPES[T]))


@given(cases())
def test_is_close_to_the_float64_formula(drawn):
    """At most 10 roundings on a path: 4 guidance, 1 rescale, 1 product, 4 sums (7 for the x0).

    Each is within UNIT of the magnitudes that enter it, the formula's value for absolute values.
    """
    case, table, T, step, _ = drawn
    next_sample, x0, _ = run(case, table, T, step)
    noise = noise_of(case, step)
    exact_next, exact_x0, _ = formula(case, table[step], np.float64, noise)
    g = np.abs(case["model_out"].astype(np.float64))
    if case["guidance"] is not None:
        u, *i, c = np.split(g, len(g) // len(next_sample))
        scale = np.abs(case["guidance"])[:, None]
        g = u + scale * (c + u)
        if i:
            g = u + np.abs(case["image_guidance"])[:, None] * (i[0] + u) + scale * (c + i[0])
    if case["rescale"] is not None:
        g = g * np.abs(case["rescale"])[:, None]
    size = {name: None if value is None else np.abs(value) for name, value in case.items()}
    size |= {"model_out": g, "guidance": None, "image_guidance": None, "rescale": None}
    noise = None if noise is None else np.abs(noise)
    bound_next, bound_x0, _ = formula(size, np.abs(table[step]), np.float64, noise)
    assert np.all(np.abs(next_sample - exact_next) <= 1.01 * 10 * UNIT * bound_next)
    assert np.all(np.abs(x0 - exact_x0) <= 1.01 * 7 * UNIT * bound_x0)


@given(cases(), st.sampled_from([np.nan, np.inf, -np.inf, 3e38, -0.0, 1e-45]))
def test_special_numbers_go_through_the_formula(drawn, special):
    case, table, T, step, rng = drawn
    for name in ("sample", "model_out", "previous_x0", "earlier_x0"):
        if case[name] is not None:
            with np.errstate(over="ignore"):
                case[name].flat[rng.integers(case[name].size)] = special
    next_sample, x0, next_input = run(case, table, T, step)
    expected_next, expected_x0, expected_input = formula(
        case, table[step], np.float32, noise_of(case, step)
    )
    assert_same(next_sample, expected_next)
    assert_same(x0, expected_x0)
    with np.errstate(over="ignore", invalid="ignore"):
        expected_input = expected_input.astype(DTYPES[T])
    assert_same(next_input[: len(next_sample)], expected_input)


@given(cases())
def test_outputs_may_replace_their_inputs(drawn):
    case, table, T, step, _ = drawn
    expected = [output.copy() for output in run(case, table, T, step)]
    next_input = case["model_out"]
    x0 = next(
        (case[name] for name in ("earlier_x0", "previous_x0") if case[name] is not None), None
    )
    kernels.guided_solver_step(
        case["sample"], x0_out=x0, next_input=next_input, table=table, step=step, **case
    )
    assert_same(case["sample"], expected[0])
    assert_same(next_input, expected[2])
    if x0 is not None:
        assert_same(x0, expected[1])


def test_image_guidance_of_1_is_guidance_between_image_and_text():
    """InstructPix2Pix without its second scale: u + 1 (i - u) + s (c - i)."""
    rng = np.random.default_rng(0)
    x, m, table = array(rng, (2, 9)), array(rng, (6, 9)), np.eye(1, 8, 1, dtype=np.float32)
    both, pair = np.empty_like(x), np.empty_like(x)
    given = {"sample": x, "table": table, "step": 0, "guidance": 7.5}
    kernels.guided_solver_step(both, model_out=m, image_guidance=1.0, **given)
    kernels.guided_solver_step(pair, model_out=m[2:], **given)
    np.testing.assert_allclose(both, pair, rtol=1e-5, atol=1e-5)


def test_image_guidance_needs_guidance_beside_it():
    x = np.ones((1, 4), np.float32)
    with pytest.raises(kernels.KernelError, match="image_guidance: expected guidance beside it"):
        kernels.guided_solver_step(
            x, sample=x, model_out=x, table=np.ones((1, 8), np.float32), step=0, image_guidance=2.0
        )


def test_what_has_coefficient_zero_is_not_read():
    nan = np.full((2, 9), np.nan, np.float32)
    x = np.arange(18, dtype=np.float32).reshape(2, 9)
    table = np.array([[1, 0, 0, 0, 0, 0, 0.5, 0]], np.float32)
    next_sample, first_input = np.empty_like(x), np.empty((4, 9), np.float16)
    kernels.guided_solver_step(
        next_sample,
        sample=x,
        model_out=np.full((4, 9), np.nan, np.float16),
        table=table,
        step=0,
        next_input=first_input,
        previous_x0=nan,
        earlier_x0=nan,
        guidance=7.5,
    )
    assert_same(next_sample, x)
    assert_same(first_input, np.concatenate([x, x]) * np.float16(0.5))
    kernels.guided_solver_step(next_sample, sample=x, model_out=None, table=table, step=0)


def converted(values, dtype):
    """`values` (float32) rounded to `dtype` by the kernel."""
    table = np.array([[1, 0, 0, 0, 0, 0, 1, 0]], np.float32)
    out, x = np.empty((1, values.size), dtype), values.reshape(1, -1)
    kernels.guided_solver_step(
        np.empty_like(x), sample=x, model_out=None, table=table, step=0, next_input=out
    )
    return out[0]


@pytest.mark.parametrize("T", ["float16", "bfloat16"])
def test_all_65536_values_of_a_type_are_read_and_written_exactly(T):
    values = np.arange(65536, dtype=np.uint16).view(DTYPES[T])
    table = np.array([[0, 1, 0, 0, 0, 0, 1, 0]], np.float32)
    zero, wide = np.zeros((1, 65536), np.float32), np.empty((1, 65536), np.float32)
    back = np.empty((1, 65536), DTYPES[T])
    kernels.guided_solver_step(
        wide, sample=zero, model_out=values[None], table=table, step=0, next_input=back
    )
    with np.errstate(invalid="ignore"):
        assert_same(wide[0], values.astype(np.float32))
        assert_same(back[0], values)


@pytest.mark.parametrize("T", ["float16", "bfloat16"])
def test_rounding_is_to_nearest_even_around_every_midpoint(T):
    with np.errstate(invalid="ignore", over="ignore"):
        grid = np.arange(65536, dtype=np.uint16).view(DTYPES[T]).astype(np.float32)
        grid = np.sort(grid[np.isfinite(grid)])
        middle = grid[:-1] / 2 + grid[1:] / 2
        limits = np.array([65504, 65519.996, 65520, 65536, 3.4e38, np.inf, -np.inf], np.float32)
        tiny = np.array([2**-25, 2**-24, 2**-14 - 2**-26, 1e-45, 1e-38, -1e-38], np.float32)
        down, up = np.nextafter(middle, -np.inf), np.nextafter(middle, np.inf)
        values = np.concatenate([middle, down, up, limits, tiny]).astype(np.float32)
        expected = values.astype(DTYPES[T])
    assert_same(converted(values, DTYPES[T]).view(np.uint16), expected.view(np.uint16))


def test_bfloat16_bits_need_no_ml_dtypes():
    rng = np.random.default_rng(1)
    x, table = array(rng, (2, 33)), array(rng, (1, 8))
    table[:, [2, 3, 7]] = 0
    m = array(rng, (4, 33), ml_dtypes.bfloat16)
    outputs = []
    for model_out in (m, m.view(np.uint16)):
        out = np.empty_like(model_out)
        kernels.guided_solver_step(
            np.empty_like(x),
            sample=x,
            model_out=model_out,
            table=table,
            step=0,
            next_input=out,
            guidance=3.0,
            dtype="bfloat16",
        )
        outputs.append(out.view(np.uint16))
    assert_same(*outputs)


def test_a_bound_step_sees_new_contents_and_refuses_a_step_outside():
    x, m = np.ones((1, 5), np.float32), np.ones((2, 5), np.float32)
    guidance = np.ones(1, np.float32)
    table = np.array([[0, 1, 0, 0, 0, 0, 0, 0], [0, 2, 1, 0, 0, 0, 0, 0]], np.float32)
    out = np.empty_like(x)
    step = kernels.bind_guided_solver_step(
        out, sample=x, model_out=m, table=table, guidance=guidance
    )
    step(0)
    assert_same(out, np.full_like(x, 1))
    m[1], guidance[0] = 3, 2
    step(0)
    assert_same(out, np.full_like(x, 5))
    for outside in (-1, 2):
        with pytest.raises(kernels.KernelError, match=r"step must lie in 0\.\.S-1") as caught:
            step(outside)
        assert caught.value.code == -5
    with pytest.raises(kernels.KernelError, match="coefficient for a model output, x0 or noise"):
        step(1)
