"""What an evaluation may be told: frozen options, one class a stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from blockcache.runtime.errors import ConfigError

Yardstick: TypeAlias = Literal["converged", "uncached"]
"""What distances are taken to: the same noise in so many steps that more change nothing, or the
uncached run that a preset takes the place of."""


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How latents are drawn; the same for every preset."""

    images: int = 256
    seed: int = 0  # image i starts from the noise of SEED + i
    batch: int = 16  # images in one call
    guidance: float | None = None  # None: each preset's own
    backend: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.images < 2 or self.batch < 1:
            raise ConfigError(
                f"Expected 2 images or more, for a spread, and a batch of 1 or more; got {self}."
            )


@dataclass(frozen=True, kw_only=True)
class TimingOptions:
    """How presets are timed: they take turns, so that a busy machine disturbs all alike."""

    rounds: int = 5  # after one to warm up; 0 leaves the timing out
    images: int = 4  # in one timed call


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Everything ``evaluate`` may be told besides the bundle and the subject."""

    draw: DrawOptions = field(default_factory=DrawOptions)
    timing: TimingOptions = field(default_factory=TimingOptions)
    resamples: int = 200  # random halves of the images behind every interval
    yardstick: Yardstick = "converged"

    def __post_init__(self) -> None:
        if self.yardstick not in get_args(Yardstick):
            raise ConfigError(
                f"Expected a yardstick of {list(get_args(Yardstick))}, got {self.yardstick!r}."
            )
        if self.resamples < 20:
            raise ConfigError(
                f"Expected 20 resamples or more for a 90 % interval, got {self.resamples}."
            )
