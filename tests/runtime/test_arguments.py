"""Checks of single arguments."""

from __future__ import annotations

import doctest
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockcache.runtime import ConfigError, InputError, arguments
from blockcache.runtime.arguments import finite_number, whole_number

ANYTHING = st.one_of(
    st.none(), st.booleans(), st.text(), st.floats(), st.integers(), st.complex_numbers(),
    st.lists(st.integers()), st.binary(), st.fractions(), st.decimals(),
)  # fmt: skip


@given(ANYTHING)
def test_a_whole_number_is_an_int_in_its_range_or_refused(value):
    whole = type(value) is int and 3 <= value <= 9
    if whole:
        assert whole_number("n", value, 3, 9) == value
    else:
        with pytest.raises(InputError, match=r"^n: expected a whole number of 3 to 9, got "):
            whole_number("n", value, 3, 9)


@given(st.integers(-5, 5))
def test_numpys_integers_count(value):
    assert type(whole_number("n", np.int16(value), -5)) is int


def test_the_callers_error_is_raised():
    with pytest.raises(ConfigError, match=r"^n: expected a whole number of 1 or more, got 0\.$"):
        whole_number("n", 0, 1, error=ConfigError)


@given(ANYTHING)
def test_a_finite_number_is_a_float_or_refused(value):
    number = isinstance(value, int | float | Fraction) and not isinstance(value, bool)
    if number and math.isfinite(value):
        made = finite_number("g", value)
        assert type(made) is float
        assert made == float(value)
    else:
        with pytest.raises(InputError) as caught:
            finite_number("g", value)
        assert str(caught.value).startswith("g: expected one finite number, got ")
        assert str(caught.value).endswith(". Pass a float.")


def test_a_number_too_large_for_a_float_is_refused():
    with pytest.raises(InputError) as caught:
        finite_number("g", 10**400)
    assert str(caught.value) == "g: expected one finite number, got int. Pass a float."


def test_docstring_examples_run():
    assert doctest.testmod(arguments).failed == 0
