"""JSON that is read strictly: every value by its way, of its type, within its bounds.

A ``Field`` is a value and the way to it, such as ``segments[2].block``. Whoever reads one says what
it has to be; anything else is an error that names the way. Nothing is converted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from blockcache.runtime.errors import BundleFormatError

_Choice = TypeVar("_Choice", bound=str)

MOST_BYTES = 1 << 24
"""A manifest of SDXL takes less than a megabyte."""

LONGEST_NUMBER = 40
"""Characters of a number; the longest float64 takes 24."""

DEEPEST = 20
"""Lists and objects in each other; a manifest has seven."""

SHA256 = r"[0-9a-f]{64}"


def parse_json(content: bytes, where: str) -> Field:
    """Parse a JSON file.

    Args:
        content: Of the file.
        where: Its path, for errors.

    Raises:
        BundleFormatError: it is no JSON, larger than 16 MiB, nested more than 20 deep, or holds a
            key twice in one object, NaN, infinity, or a number of more than 40 characters.
    """
    if len(content) > MOST_BYTES:
        raise BundleFormatError(
            f"Expected at most {MOST_BYTES} bytes in {where}, got {len(content)}. The file is "
            f"damaged: compile again."
        )
    try:
        value = json.loads(
            content.decode(),
            object_pairs_hook=_object,
            parse_int=lambda text: int(_short(text)),
            parse_float=_finite,
            parse_constant=_no_constant,
        )
        if _depth(value) > DEEPEST:
            raise ValueError(f"lists and objects more than {DEEPEST} deep")
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError, JSONDecodeError are such
        raise BundleFormatError(
            f"Expected JSON in {where}, got {error}. The file is damaged: compile again."
        ) from error
    return Field(value, "", where)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return content


def _short(text: str) -> str:
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} characters")
    return text


def _finite(text: str) -> float:
    number = float(_short(text))
    return number if math.isfinite(number) else _no_constant(text)


def _depth(value: Any) -> int:
    """How deep lists and objects lie in each other; counts to one beyond ``DEEPEST``."""
    depth, layer = 0, [value]
    while depth <= DEEPEST:
        layer = [item for outer in layer for item in _inner(outer)]
        if not layer:
            break
        depth += 1
    return depth


def _inner(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text}, which is no JSON")


@dataclass(frozen=True)
class Field:
    """A value of a JSON file."""

    value: Any
    way: str  # "segments[2].block"; "" for the whole file
    where: str  # the file

    def error(self, wanted: str) -> BundleFormatError:
        """The error that this field is not what is ``wanted``, to be raised."""
        got = repr(self.value)
        got = got if len(got) <= 60 else f"{got[:57]}..."
        return BundleFormatError(
            f"{self.where}: expected {wanted} for {self.way or 'the file'!r}, got {got}. "
            f"Compile the model again."
        )

    def require(self, right: bool, wanted: str) -> None:
        """Raise the error unless the field is ``right``."""
        if not right:
            raise self.error(wanted)

    # -- containers ----------------------------------------------------------------------------

    def fields(self, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Field]:
        """The fields of an object that has these names, perhaps those, and no others."""
        found = self.table()
        for name in names:
            if name not in found:
                raise self.error(f"an object with {name!r}")
        for name, field in found.items():
            if name not in names and name not in optional:
                raise field.error("no such field")
        return found

    def table(self, most: int = 100_000) -> dict[str, Field]:
        """The fields of an object with any names."""
        if not isinstance(self.value, Mapping):
            raise self.error("an object")
        self.require(len(self.value) <= most, f"at most {most} entries")
        prefix = f"{self.way}." if self.way else ""
        return {k: Field(v, f"{prefix}{k[:80]}", self.where) for k, v in self.value.items()}

    def items(self, most: int = 100_000) -> list[Field]:
        """The entries of a list."""
        if not isinstance(self.value, list):
            raise self.error("a list")
        self.require(len(self.value) <= most, f"at most {most} entries")
        return [Field(v, f"{self.way}[{i}]", self.where) for i, v in enumerate(self.value)]

    # -- values --------------------------------------------------------------------------------

    def text(self, longest: int = 200) -> str:
        """A printable text of 1 to ``longest`` characters."""
        value = self.value
        right = isinstance(value, str) and 0 < len(value) <= longest and value.isprintable()
        self.require(right, f"a printable text of 1 to {longest} characters")
        return str(value)

    def matching(self, pattern: str, wanted: str) -> str:
        """A text that a regular expression matches as a whole."""
        right = isinstance(self.value, str) and re.fullmatch(pattern, self.value) is not None
        self.require(right, wanted)
        return str(self.value)

    def sha256(self) -> str:
        """A hash as lower-case hexadecimal digits."""
        return self.matching(SHA256, "64 lower-case hexadecimal digits")

    def choice(self, choices: Sequence[_Choice]) -> _Choice:
        """One of these texts."""
        for choice in choices:
            if isinstance(self.value, str) and self.value == choice:
                return choice
        raise self.error(f"one of {list(choices)}")

    def whole(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``."""
        right = type(self.value) is int and low <= self.value <= high
        self.require(right, f"a whole number from {low} to {high}")
        return int(self.value)

    def number(self, low: float, high: float) -> float:
        """A finite number from ``low`` to ``high``."""
        right = type(self.value) in (int, float) and low <= self.value <= high
        self.require(right, f"a number from {low:g} to {high:g}")
        return float(self.value)
