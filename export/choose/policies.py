"""Policies: what a preset's schedule is derived from, one class a kind, and how people write it.

| text | policy |
|---|---|
| (none) | ``Uncached``: every block at every step |
| ``0.5`` or ``d0.5`` | ``Threshold``: delta of eq. 7 |
| ``t1.5`` | ``ThresholdSpeedup``: the smallest delta that is 1.5 times as fast as uncached |
| ``x2`` | ``Joint``: twice as fast; steps, grid and reused branches chosen together (joint.py) |
| ``ms250`` | ``JointLatency``: the same for one image in 250 milliseconds |
| ``quick`` | ``Quick``: by hand, nothing is measured: whole branches at two steps of three |
| ``branch2`` | ``Branches``: twice as fast by reusing whole branches of all steps, least loss |
| ``blocks1.5`` | ``Budget``: 1.5 times as fast by reusing blocks alone, least predicted loss |
| ``blocksms250`` | ``Latency``: the same for one image in 250 milliseconds |
| ``c1.5`` | ``ChangeBudget``: as fast, with the least accumulated change |
| ``every3`` | ``Interval``: every block at every third step |
| ``deepcache3`` | ``DeepCache``: deep blocks at every third step |
| ``smooth0.1`` | ``SmoothCache``: one decision for all blocks, error threshold 0.1 |
| ``FILE.json`` | ``Table``: a table of one's own |

In place of a speed-up, ``tmax``, ``blocksmax`` and ``cmax`` (or ``blocks:max``) ask for the most
that block caching can give: every block runs once.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from blockcache.export.choose import peers
from blockcache.export.choose.branches import BranchProblem, check_reach, plan_branches
from blockcache.export.choose.schedule import (
    budget,
    least_loss,
    threshold,
    threshold_within,
    total_loss,
)
from blockcache.export.costs.costs import Costs
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import WHOLE, Schedule

MOST = math.inf
"""In place of a speed-up: the most that block caching can give."""

BRANCH_CUTS = (WHOLE, 0, 1, 2)
"""The branches that are worth reusing: the whole U-Net, and what lies below the first skips."""

ROUNDING = 1e-9
"""Sums of the same costs in another order may differ by this share."""


class Needs(enum.Flag):
    """What a schedule is made from, besides steps and blocks. Nothing else is measured."""

    NOTHING = 0
    CHANGE = enum.auto()  # the profile, eq. 6; budgets keep it for the drift monitor
    LOSSES = enum.auto()  # sensitivity and residuals
    COSTS = enum.auto()  # in proportion
    MILLISECONDS = enum.auto()  # costs of one image in this unit


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a policy may draw on; its ``needs`` say what must be there."""

    steps: int
    paths: Sequence[str]  # of the blocks, "down_blocks.0.attentions.1"
    costs: Costs | None = None
    change: np.ndarray | None = None  # float [S, K], eq. 6
    sensitivity: np.ndarray | None = None  # float [S, K], see sensitivity.py
    gains: np.ndarray | None = None  # float [S], of an error of the model output
    residuals: np.ndarray | None = None  # float [K, S, S] or [K, S, S, S], see residuals.py

    @property
    def losses(self) -> np.ndarray:
        """Predicted loss of every reuse: float64, of the residuals' shape."""
        assert self.sensitivity is not None
        assert self.residuals is not None
        return predicted_loss(self.sensitivity, self.residuals)


class Policy(abc.ABC):
    """How a schedule is made."""

    kind: ClassVar[str]  # as a preset's provenance calls it
    needs: ClassVar[Needs] = Needs.NOTHING
    cuts: ClassVar[tuple[int, ...]] = ()  # of branches that it reuses in place of blocks
    alignment: ClassVar[str] = "none"  # of what it reuses, where nothing else is asked for

    @property
    @abc.abstractmethod
    def text(self) -> str:
        """A short name, part of the preset's, that ``parse`` reads; "" for uncached."""

    @property
    def value(self) -> float | None:
        """The number in its text, where there is one."""
        return None

    def check_blocks(self, steps: int, blocks: int) -> None:  # noqa: B027
        """Raise ConfigError where it cannot serve so many steps and blocks."""

    def check_costs(self, steps: int, costs: Costs) -> None:  # noqa: B027
        """Raise ConfigError where it asks for more than block caching can give."""

    @abc.abstractmethod
    def schedule(self, evidence: Evidence) -> Schedule:
        """The table of this policy."""

    def loss(self, evidence: Evidence, schedule: Schedule) -> float:
        """What its schedule is predicted to lose: the sum over all reuses."""
        return total_loss(evidence.losses, schedule)

    @staticmethod
    def parse(text: str) -> Policy:
        """Read one of the texts in this module's table; ConfigError where it is none."""
        if text.endswith(".json"):
            return Table(Path(text))
        if text == Quick.text:
            return Quick()
        match = _TEXT.fullmatch(text)
        kind = _BY_PREFIX.get(match["prefix"]) if match else None
        if match and kind and match["number"] is None and kind.takes_most:
            return kind(MOST)
        if match and kind and match["number"] and math.isfinite(number := float(match["number"])):
            return kind(int(number) if kind.whole and number.is_integer() else number)
        raise ConfigError(
            f"Expected a policy such as x2 (speed-up), ms250 (latency), 0.5 (delta), blocks1.5, "
            f"blocksmax (the most there is), every3, deepcache3, smooth0.1 or FILE.json, got "
            f"{text!r}."
        )


@dataclass(frozen=True)
class Uncached(Policy):
    """Every block at every step."""

    kind = "uncached"
    text = ""

    def schedule(self, evidence: Evidence) -> Schedule:
        """No reuse at all."""
        return Schedule.uncached(evidence.steps, len(evidence.paths))


UNCACHED = Uncached()


@dataclass(frozen=True)
class Table(Policy):
    """A table of one's own, see ``peers.read_table``."""

    file: Path

    kind = "table"

    @property
    def text(self) -> str:
        """The file's name, 60 characters at most, in the letters that names may have."""
        return re.sub(r"[^A-Za-z0-9._-]", "-", self.file.stem[:60])

    def check_blocks(self, steps: int, blocks: int) -> None:
        """The file is there and fits."""
        peers.read_table(self.file, steps, blocks)

    def schedule(self, evidence: Evidence) -> Schedule:
        """As the file says."""
        return peers.read_table(self.file, evidence.steps, len(evidence.paths))


@dataclass(frozen=True)
class Quick(Policy):
    """A rule by hand, for a first try: all, then below cut 1 nothing, then below cut 0 nothing.

    Nothing is measured; the alignment alone is fitted, on a few images.
    """

    kind = "quick"
    text = "quick"
    cuts = BRANCH_CUTS
    alignment = "history"

    def schedule(self, evidence: Evidence) -> Schedule:
        """Three steps, over and over; the second of them reuses the branch at depth 1."""
        recompute = np.ones((evidence.steps, len(self.cuts)), np.bool_)
        recompute[1::3, self.cuts.index(1)] = False
        recompute[2::3, self.cuts.index(0)] = False
        return Schedule(recompute)


class Numbered(Policy):
    """A policy with one number: a dataclass with one field."""

    prefix: ClassVar[str]  # of its text
    least: ClassVar[float] = 0
    whole: ClassVar[bool] = False
    takes_most: ClassVar[bool] = False

    @abc.abstractmethod
    def __init__(self, number: float) -> None: ...

    def __post_init__(self) -> None:
        number = self._number
        if self.takes_most and number == MOST:
            return
        if not self.least <= number < math.inf or (self.whole and number % 1):
            raise ConfigError(
                f"Expected a {'whole ' * self.whole}number of {self.least} or more for the "
                f"policy {self.kind!r}, got {number:g}."
            )

    @property
    def _number(self) -> float:
        (field,) = dataclasses.fields(self)  # type: ignore[arg-type]  # all below are dataclasses
        number: float = getattr(self, field.name)
        return number

    @property
    def value(self) -> float | None:
        """Its number; None for the most there is."""
        return None if self._number == MOST else self._number

    @property
    def text(self) -> str:
        """Prefix and number, with six digits."""
        number = "max" if self._number == MOST else f"{self._number:g}".replace("+", "")
        return f"{self.prefix}{number}"


@dataclass(frozen=True)
class Threshold(Numbered):
    """Eq. 7: a block is reused while its accumulated change stays within ``delta``."""

    delta: float

    kind = "threshold"
    prefix = "d"
    needs = Needs.CHANGE

    def schedule(self, evidence: Evidence) -> Schedule:
        """See ``schedule.threshold``."""
        assert evidence.change is not None
        return threshold(evidence.change, self.delta)


@dataclass(frozen=True)
class SmoothCache(Numbered):
    """SmoothCache (Liu et al., 2024): one decision for all blocks, error threshold ``alpha``."""

    alpha: float

    kind = "smoothcache"
    prefix = "smooth"
    needs = Needs.CHANGE

    def schedule(self, evidence: Evidence) -> Schedule:
        """See ``peers.smoothcache``."""
        assert evidence.change is not None
        return peers.smoothcache(evidence.change, self.alpha)


@dataclass(frozen=True)
class Interval(Numbered):
    """Every block at every ``interval``-th step."""

    interval: int

    kind = "interval"
    prefix = "every"
    least = 1
    whole = True

    def schedule(self, evidence: Evidence) -> Schedule:
        """See ``peers.fixed_interval``."""
        return peers.fixed_interval(evidence.steps, len(evidence.paths), self.interval)


@dataclass(frozen=True)
class DeepCache(Numbered):
    """DeepCache (Ma et al., CVPR 2024): deep blocks at every ``interval``-th step."""

    interval: int

    kind = "deepcache"
    prefix = "deepcache"
    least = 1
    whole = True

    def schedule(self, evidence: Evidence) -> Schedule:
        """See ``peers.deepcache``."""
        return peers.deepcache(evidence.steps, evidence.paths, self.interval)


@dataclass(frozen=True)
class _AsFast(Numbered):
    """A policy that is told to be ``speedup`` times as fast as uncached, or ``MOST``."""

    speedup: float

    least = 1
    takes_most = True

    def check_costs(self, steps: int, costs: Costs) -> None:
        """The speed-up is within reach."""
        affordable(costs, steps, self.speedup)

    def _spend(self, evidence: Evidence) -> tuple[np.ndarray, float]:
        """Costs of the blocks, and what all their runs may cost together."""
        assert evidence.costs is not None
        return evidence.costs.blocks, affordable(evidence.costs, evidence.steps, self.speedup)


@dataclass(frozen=True)
class ThresholdSpeedup(_AsFast):
    """Eq. 7 with the smallest delta that is fast enough."""

    kind = "threshold-speedup"
    prefix = "t"
    needs = Needs.CHANGE | Needs.COSTS

    def schedule(self, evidence: Evidence) -> Schedule:
        """See ``schedule.threshold_within``."""
        assert evidence.change is not None
        return threshold_within(evidence.change, *self._spend(evidence))


@dataclass(frozen=True)
class ChangeBudget(_AsFast):
    """The least accumulated change that is fast enough."""

    kind = "change-budget"
    prefix = "c"
    needs = Needs.CHANGE | Needs.COSTS

    def schedule(self, evidence: Evidence) -> Schedule:
        """See ``schedule.budget``."""
        assert evidence.change is not None
        return budget(evidence.change, *self._spend(evidence))


@dataclass(frozen=True)
class Budget(_AsFast):
    """The least predicted loss that is fast enough, by reusing blocks alone."""

    kind = "budget"
    prefix = "blocks"
    needs = Needs.CHANGE | Needs.LOSSES | Needs.COSTS

    def schedule(self, evidence: Evidence) -> Schedule:
        """See ``schedule.least_loss``."""
        return least_loss(evidence.losses, *self._spend(evidence))


@dataclass(frozen=True)
class Branches(_AsFast):
    """Whole branches of the U-Net are reused, with the least predicted loss that is fast enough."""

    kind = "branches"
    prefix = "branch"
    takes_most = False
    needs = Needs.LOSSES | Needs.COSTS
    cuts = BRANCH_CUTS

    def check_costs(self, steps: int, costs: Costs) -> None:
        """The speed-up is within reach."""
        check_reach(steps, costs.by_cut, self._affordable(steps, costs))

    def schedule(self, evidence: Evidence) -> Schedule:
        """See ``branches.plan_branches``."""
        assert evidence.costs is not None
        problem = self._problem(evidence)
        depths = plan_branches(problem, self._affordable(evidence.steps, evidence.costs))
        return Schedule(depths[:, None] != np.arange(problem.cuts)[None])

    def loss(self, evidence: Evidence, schedule: Schedule) -> float:
        """The sum over all reuses, and over what was computed on top of them."""
        reused = ~schedule.recompute
        depths = np.where(reused.any(1), reused.argmax(1), schedule.blocks)
        return float(self._problem(evidence).loss(depths[None])[0])

    def _problem(self, evidence: Evidence) -> BranchProblem:
        assert evidence.costs is not None
        assert evidence.gains is not None
        losses = evidence.losses
        if losses.ndim == 3:  # one output: none before it counts
            losses = np.repeat(losses[..., None], evidence.steps, axis=3)
        return BranchProblem(evidence.costs.by_cut, losses, evidence.gains)

    def _affordable(self, steps: int, costs: Costs) -> float:
        return costs.uncached(steps) / self.speedup - costs.prompt


@dataclass(frozen=True)
class Latency(Numbered):
    """The least predicted loss of one image in ``milliseconds``, by reusing blocks alone."""

    milliseconds: float

    kind = "latency"
    prefix = "blocksms"
    needs = Needs.CHANGE | Needs.LOSSES | Needs.COSTS | Needs.MILLISECONDS

    def __post_init__(self) -> None:
        check_milliseconds(self.milliseconds)

    def check_costs(self, steps: int, costs: Costs) -> None:
        """The time is within reach."""
        affordable_within(costs, steps, self.milliseconds)

    def schedule(self, evidence: Evidence) -> Schedule:
        """See ``schedule.least_loss``."""
        assert evidence.costs is not None
        spend = affordable_within(evidence.costs, evidence.steps, self.milliseconds)
        return least_loss(evidence.losses, evidence.costs.blocks, spend)


class Chosen(Numbered):
    """Steps, grid and reused branches are chosen together: one of the candidates of ``joint.py``.

    A preset's steps are those of the uncached run that it replaces.
    """

    cuts = BRANCH_CUTS
    alignment = "history"

    @abc.abstractmethod
    def spend(self, steps: int, costs: Costs) -> float:
        """What all steps may cost together."""

    def check_costs(self, steps: int, costs: Costs) -> None:
        """The speed-up is within reach: there is a step that can be paid for."""
        least = float(costs.by_cut[-1])
        if not self.spend(steps, costs) >= least * (1 - ROUNDING):
            most = costs.uncached(steps) / (costs.prompt + least)
            raise ConfigError(
                f"{self.text} is out of reach: one step alone costs {costs.prompt + least:.4g} "
                f"{costs.unit}, {most:.3g} times less than {steps} steps. Ask for less."
            )

    def schedule(self, evidence: Evidence) -> Schedule:
        """Refused: only a trial tells which candidate's schedule it is."""
        raise TypeError("A joint policy has candidates, each with a schedule of its own.")


@dataclass(frozen=True)
class Joint(Chosen):
    """``speedup`` times as fast as uncached."""

    speedup: float

    kind = "joint"
    prefix = "x"
    least = 1
    needs = Needs.LOSSES | Needs.COSTS

    def spend(self, steps: int, costs: Costs) -> float:
        """A share of the uncached run's."""
        return costs.uncached(steps) / self.speedup - costs.prompt


@dataclass(frozen=True)
class JointLatency(Chosen):
    """One image in ``milliseconds``."""

    milliseconds: float

    kind = "joint-latency"
    prefix = "ms"
    needs = Needs.LOSSES | Needs.COSTS | Needs.MILLISECONDS

    def __post_init__(self) -> None:
        check_milliseconds(self.milliseconds)

    def spend(self, steps: int, costs: Costs) -> float:
        """What the prompt leaves."""
        return self.milliseconds - costs.prompt


_NUMBERED: tuple[type[Numbered], ...] = (
    Threshold, ThresholdSpeedup, Joint, JointLatency, Branches, Budget, Latency, ChangeBudget,
    Interval, DeepCache, SmoothCache,
)  # fmt: skip
KINDS: tuple[type[Policy], ...] = (Uncached, Quick, *_NUMBERED, Table)
_TEXT = re.compile(
    r"(?P<prefix>[a-z]*?)(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)|[:-]?max)", re.ASCII
)
_BY_PREFIX: dict[str, type[Numbered]] = {"": Threshold, **{kind.prefix: kind for kind in _NUMBERED}}


def check_milliseconds(milliseconds: float) -> None:
    """Raise ConfigError where a latency is none."""
    if not 0 < milliseconds < math.inf:
        raise ConfigError(f"Expected a number of milliseconds above 0, got {milliseconds:g}.")


def affordable(costs: Costs, steps: int, speedup: float) -> float:
    """What all runs of all blocks may cost, for an image ``speedup`` times as fast as uncached."""
    if speedup == MOST:
        return costs.every_block
    spend = steps * costs.every_block - costs.uncached(steps) * (1 - 1 / speedup)
    if not spend >= costs.every_block * (1 - ROUNDING):
        most = math.floor(1000 * costs.largest_speedup(steps)) / 1000
        raise ConfigError(
            f"A speed-up of {speedup:g} is out of reach with {steps} steps: the trunk always runs, "
            f"and every block at step 0. Expected at most {most:g}, or max for the most there is."
        )
    return max(spend, costs.every_block)


def affordable_within(costs: Costs, steps: int, latency_ms: float) -> float:
    """What all runs of all blocks may cost, for an image in ``latency_ms``."""
    assert costs.unit == "ms"
    spend = latency_ms - costs.prompt - steps * costs.trunk
    if not spend >= costs.every_block:
        least = math.ceil(1000 * costs.least(steps)) / 1000
        raise ConfigError(
            f"{latency_ms:g} ms an image are out of reach with {steps} steps: the trunk always "
            f"runs, and every block at step 0. Expected {least} ms or more, or fewer steps."
        )
    return min(spend, steps * costs.every_block)


def predicted_loss(sensitivity: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """What a reuse does to the image, relative L2 of the final latents: of the residuals' shape.

    The sensitivity is measured with the output of the step before as it is; the residual says how
    much larger or smaller the error is of the output in use, as it will be aligned.
    """
    axes = [1] * (residuals.ndim - 2)
    weight = sensitivity.T.astype(np.float64).reshape(*residuals.shape[:2], *axes)
    loss: np.ndarray = weight * residuals
    return loss
