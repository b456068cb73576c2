"""Fewer steps and caching together: which number of steps a speed-up is best reached with.

Either way to be faster has its own price, and the last tenth of each costs the most: 20 steps at
1.67 times the speed leave the blocks little to run, and 12 uncached steps are a coarse path. 14 or
16 steps with some caching share the burden. A joint preset tries: for a few step counts a budget
is made that reaches the speed-up, aligned, and run from noise that calibrated nothing; the one that
ends nearest to the full uncached run is kept.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from blockcache.export.choose.policies import UNCACHED, Budget, Joint
from blockcache.export.choose.preset import PresetOptions
from blockcache.export.costs.costs import Costs
from blockcache.runtime.errors import ConfigError

MOST_CANDIDATES = 5
NEGLIGIBLE = 1e-3  # a speed-up by less than this is none
UNTRAINED = {"distil": "scale-shift", "history-distil": "history"}
"""What stands for a distilled alignment in a trial: only the winner is trained."""


def step_counts(steps: int, speedup: float) -> list[int]:
    """The numbers of steps to try, fewest first: from nearly fast enough uncached to ``steps``."""
    fewest = min(steps, math.ceil(steps / speedup - 1e-9))  # 21 / 1.4 is 15.000000000000002
    count = min(MOST_CANDIDATES, steps - fewest + 1)
    return [int(value) for value in np.rint(np.linspace(fewest, steps, count))]


def candidate(preset: PresetOptions, steps: int, speedup: float) -> PresetOptions:
    """An ordinary preset of ``steps`` steps, ``speedup`` times as fast as they are uncached."""
    name = f"{preset.name}-{steps}-steps"
    if speedup <= 1 + NEGLIGIBLE:
        return replace(preset, name=name, steps=steps, policy=UNCACHED, alignment="none")
    alignment = UNTRAINED.get(preset.alignment, preset.alignment)
    return replace(preset, name=name, steps=steps, policy=Budget(speedup), alignment=alignment)


def candidates(preset: PresetOptions, costs: Costs) -> list[PresetOptions]:
    """The presets to try; each costs what ``preset`` asks for.

    Raises:
        ConfigError: none can be as fast.
    """
    speedup = _speedup(preset)
    counts = step_counts(preset.steps, speedup)
    uncached = {steps: costs.uncached(steps) for steps in counts}
    aim = uncached[preset.steps] / speedup
    found = [
        candidate(preset, steps, cost / aim)
        for steps, cost in uncached.items()
        if cost <= aim * (1 + NEGLIGIBLE) or costs.least(steps) <= aim
    ]
    if not found:
        most = uncached[preset.steps] / min(costs.least(steps) for steps in counts)
        raise ConfigError(
            f"Preset {preset.name!r}: a speed-up of {speedup:g} is out of reach with "
            f"{counts[0]} steps or more. Expected at most {math.floor(1000 * most) / 1000:g}, or "
            f"more steps."
        )
    return found


def check_reach(preset: PresetOptions, costs: Costs) -> None:
    """Raise ConfigError where a preset, joint or not, cannot be as fast as it asks to be."""
    if isinstance(preset.policy, Joint):
        candidates(preset, costs)
    else:
        preset.policy.check_costs(preset.steps, costs)


def _speedup(preset: PresetOptions) -> float:
    """What a joint preset asks for."""
    assert isinstance(preset.policy, Joint)
    return preset.policy.speedup
