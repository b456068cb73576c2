"""How a preset was made, and what its maker predicts of it: the manifest's record, typed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from blockcache.runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a preset's tables come from; None where a fact does not apply.

    Raises:
        ConfigError: a field of another type or out of range; names the field.

    Examples:
        >>> Provenance(kind="threshold", value=0.5).to_json()
        {'kind': 'threshold', 'value': 0.5}
    """

    kind: str = "table"  # of the policy: "threshold", "budget", ...
    value: float | None = None  # of the policy: delta, speed-up, milliseconds, interval or alpha
    costs: str | None = None  # who says what segments cost: "FLOPs", "a100, roofline", ...
    predicted_speedup: float | None = None  # by these costs, over the uncached run it replaces
    predicted_loss: float | None = None  # relative L2 of the final latents, summed over reuses
    images: int | None = None  # that the profile was measured on
    profile: str | None = None  # the file of the measured change, in the bundle
    alignment: str | None = None  # how reused outputs were aligned
    alignment_report: str | None = None  # the file of its errors before and after, in the bundle
    replaced_steps: int | None = None  # step count of the uncached run that this preset replaces
    tried: Mapping[str, float] | None = None  # distances of a joint policy's candidates, by name

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name != "kind":
                continue
            wanted, right = _RULES[field.name]
            if not right(value):
                raise ConfigError(f"Expected {wanted} as {field.name!r}, got {value!r}.")
        if self.tried is not None:
            object.__setattr__(self, "tried", dict(self.tried))

    def to_json(self) -> dict[str, object]:
        """The fields that apply, by name."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in content.items() if value is not None}

    @classmethod
    def from_json(cls, content: object) -> Provenance:
        """The inverse of ``to_json``.

        Raises:
            ConfigError: no object, or a field that is unknown, null, of another type or out of
                range; names the field.
        """
        if not isinstance(content, Mapping):
            raise ConfigError(f"Expected an object that says how a preset was made, got {content}.")
        known = [field.name for field in fields(cls)]
        for name, value in content.items():
            if name not in known:
                raise ConfigError(f"Expected only fields of {known}, got {name!r}.")
            if value is None:
                raise ConfigError(f"Expected {_RULES[name][0]} as {name!r}, got null.")
        if "kind" not in content:
            raise ConfigError("Expected a 'kind' of policy, got none.")
        return cls(**content)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


def _is_positive_int(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf  # type: ignore[operator]


def _is_tried(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(_is_text(name) and _is_number(d) for name, d in value.items())
    )


_TEXT = ("a printable text of 1 to 200 characters", _is_text)
_COUNT = ("a whole number of 1 or more", _is_positive_int)
_NUMBER = ("a finite number of 0 or more", _is_number)
_RULES = {
    "kind": _TEXT,
    "value": _NUMBER,
    "costs": _TEXT,
    "predicted_speedup": _NUMBER,
    "predicted_loss": _NUMBER,
    "images": _COUNT,
    "profile": _TEXT,
    "alignment": _TEXT,
    "alignment_report": _TEXT,
    "replaced_steps": _COUNT,
    "tried": ("finite distances of 0 or more by name", _is_tried),
}
"""By field: what is expected, and whether a value is that."""
