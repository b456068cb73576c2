"""Checks of single arguments: a number that is one, and whole where it must be."""

from __future__ import annotations

import math
from numbers import Integral, Real

from blockcache.runtime.errors import BlockCacheError, InputError


def whole_number(
    name: str,
    value: object,
    least: int,
    most: float = math.inf,
    error: type[BlockCacheError] = InputError,
) -> int:
    """``value`` as an int; ``error`` where it is no whole number of ``least`` to ``most``.

    numpy's integers count. True, 3.0 and "3" do not: whoever passes them means something else.

    Examples:
        >>> whole_number("height", 64, least=1)
        64
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not least <= int(value) <= most:  # type: ignore[call-overload]
        extent = f"{least} or more" if most == math.inf else f"{least} to {most}"
        advice = "" if whole else " Pass an int."
        raise error(f"{name}: expected a whole number of {extent}, got {value!r}.{advice}")
    return int(value)  # type: ignore[call-overload, no-any-return]


def finite_number(name: str, value: object) -> float:
    """``value`` as a float; InputError where it is no single number, NaN or infinite.

    Examples:
        >>> finite_number("guidance_scale", 7.5)
        7.5
    """
    try:
        number = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        number = math.inf
    if isinstance(value, bool) or not math.isfinite(number):
        got = repr(value) if isinstance(value, float | bool | str) else type(value).__name__
        raise InputError(f"{name}: expected one finite number, got {got}. Pass a float.")
    return number
