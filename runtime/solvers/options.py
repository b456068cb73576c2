"""Checks of frozen option dataclasses: types, choices, unknown names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np

from blockcache.runtime.errors import ConfigError

Options = TypeVar("Options")


def require(allowed: bool | np.bool_, name: str, wanted: object, got: object, advice: str) -> None:
    """Raise ConfigError, with what was wanted and got, unless ``allowed``."""
    if not allowed:
        raise ConfigError(f"{name}: expected {wanted}, got {got!r}. {advice}")


def check_types(options: Any, choices: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ConfigError for a field whose value does not fit its annotation.

    Texts are one of the field's ``choices``, whole numbers 1 or more (``steps_offset`` 0 or more),
    floats between 0 and 1. Fields of other types are not looked at.
    """
    for item in fields(options):
        value, least = getattr(options, item.name), int(item.name != "steps_offset")
        checks = {
            "str": (value in choices.get(item.name, ()), f"one of {choices.get(item.name)}"),
            "bool": (isinstance(value, bool), "true or false"),
            "int": (type(value) is int and value >= least, f"a whole number >= {least}"),
            "float": (type(value) in (int, float) and 0 < value < 1, "a number between 0 and 1"),
        }
        allowed, wanted = checks.get(str(item.type), (True, ""))
        require(allowed, item.name, wanted, value, "Correct it.")


def from_mapping(cls: type[Options], mapping: Mapping[str, Any]) -> Options:
    """``cls(**mapping)``, where unknown and missing keys are a ConfigError."""
    try:
        return cls(**mapping)
    except TypeError as error:
        wanted = [item.name for item in fields(cls)]  # type: ignore[arg-type]
        raise ConfigError(f"Expected {wanted}, got {mapping!r}. Correct it: {error}.") from error
