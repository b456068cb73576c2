"""Trials: of plans that are predicted to be good, the one that ends nearest to the converged run.

Predictions rank plans roughly. So the best few are tried in earnest: the student denoises a few
images, aligned on the way, and its end is compared with where the same noise and prompts lead in
many more steps. A few images in a hundred end several times farther away than the rest, and which
ones differs from plan to plan. So it takes many images to tell two good plans apart, but few to
tell a good one from a bad one: all plans are tried on a third of the images, and the better ones on
the others (successive halving). The best plan may then be improved by moves that are tried in the
same way (a local search).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from blockcache.runtime.errors import ConfigError

SHARE = 3
"""The first round takes one in so many images; the second takes one in so many plans."""

Plan = TypeVar("Plan", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class TrialOptions:
    """How many plans are tried, and on what."""

    candidates: int = 8
    images: int = 12
    moves: int = 0  # that are tried on the best plan
    steps: int = 50  # on the grid ``auto``, of the run that they are compared with
    seed: int = 98_017  # of the noise

    def __post_init__(self) -> None:
        leasts = {"candidates": 1, "images": 1, "moves": 0, "steps": 2, "seed": 0}
        for name, least in leasts.items():
            if getattr(self, name) < least:
                raise ConfigError(
                    f"Expected {name} of {least} or more to try plans with, got "
                    f"{getattr(self, name)}."
                )


def nearest(
    plans: Sequence[Plan], images: int, distances: Callable[[Plan, range], np.ndarray]
) -> tuple[int, list[float]]:
    """Which plan ends nearest; and how far each ends on average, of the images it was tried on.

    Args:
        plans: at least one.
        images: how many images there are.
        distances: tries a plan on some of the images: float [N], not finite where it failed.

    Raises:
        ConfigError: every plan failed on some image.
    """
    first, finalists = rounds(len(plans), images)
    found = [distances(plan, range(first)) for plan in plans]
    order = sorted(range(len(plans)), key=lambda i: _mean(found[i]))
    for i in order[:finalists]:
        if first < images:
            found[i] = np.append(found[i], distances(plans[i], range(first, images)))
    means = [_mean(own) for own in found]
    best = min(order[:finalists], key=lambda i: means[i])
    if math.isinf(means[best]):
        raise ConfigError("No plan ended in finite latents.")
    return best, means


def improved(
    plan: Plan,
    images: int,
    moves: int,
    neighbours: Callable[[Plan], Sequence[Plan]],
    distances: Callable[[Plan, range], np.ndarray],
) -> tuple[Plan, float]:
    """A plan that ends nearer, found by trying neighbours; and how far it ends on average.

    A neighbour that ends no farther away on a third of the images is tried on the others, and is
    gone on from where it ends nearer on all.

    Args:
        plan: to begin with.
        images: how many images there are.
        moves: how many neighbours are tried, at most.
        neighbours: of a plan, the most promising first.
        distances: as of ``nearest``.
    """
    first, _ = rounds(1, images)
    few, rest = range(first), range(first, images)

    def trial(other: Plan, bound: float) -> tuple[float, float]:
        """The means on the few and on all images; inf where the few are beyond the bound."""
        found = distances(other, few)
        if rest and _mean(found) <= bound:
            return _mean(found), _mean(np.append(found, distances(other, rest)))
        return _mean(found), math.inf if rest else _mean(found)

    bound, least = trial(plan, math.inf)
    seen, near = {plan}, iter(neighbours(plan))
    for _ in range(moves):
        other = next((other for other in near if other not in seen), None)
        if other is None:
            break
        seen.add(other)
        on_few, on_all = trial(other, bound)
        if on_all < least:
            plan, bound, least = other, on_few, on_all
            near = iter(neighbours(plan))
    return plan, least


def trials(plans: int, options: TrialOptions) -> int:
    """How many trials there will be, at most."""
    first, finalists = rounds(plans, options.images)
    halves = 2 if first < options.images else 1
    return plans + (halves - 1) * finalists + (options.moves and halves * (options.moves + 1))


def rounds(plans: int, images: int) -> tuple[int, int]:
    """The images of the first round, and the plans of the second, which takes the others."""
    return math.ceil(images / SHARE), math.ceil(plans / SHARE)


def _mean(distances: np.ndarray) -> float:
    return float(distances.mean()) if np.isfinite(distances).all() else math.inf
