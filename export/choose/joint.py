"""Fewer steps and caching together: which number of steps a speed-up is best reached with.

Either way to be faster has its own price, and the last tenth of each costs the most: 20 steps at
1.67 times the speed leave the blocks little to run, and 12 uncached steps are a coarse path. 14 or
16 steps with some caching share the burden. A joint preset tries: for a few step counts a budget
is made that reaches the speed-up, aligned, and run from noise that calibrated nothing; the one that
ends nearest to the full uncached run is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from blockcache.export.choose.policies import UNCACHED, Budget, Joint
from blockcache.export.choose.preset import PresetOptions
from blockcache.export.costs.costs import Costs
from blockcache.export.measure.calibration import Calibration, calibration_inputs
from blockcache.export.unet import torch_kernels
from blockcache.export.unet.cached_unet import CachedUNet, denoise
from blockcache.export.unet.model import SourceModel
from blockcache.runtime.errors import ConfigError
from blockcache.runtime.plan import Alignment, Schedule
from blockcache.runtime.solver import SolverTables

MOST_CANDIDATES = 5
NEGLIGIBLE = 1e-3  # a speed-up by less than this is none
UNTRAINED = {"distil": "least-squares", "history-distil": "history"}
"""What stands for a distilled alignment in a trial: only the winner is trained."""


@dataclass(frozen=True, kw_only=True)
class TrialOptions:
    """How candidates are compared."""

    images: int = 16
    seed: int = 900_001  # of the noise; no calibration takes it

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ConfigError(f"Expected at least one image to compare on, got {self.images}.")


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


def measured_for(preset: PresetOptions) -> list[PresetOptions]:
    """Presets whose measurements the candidates need; their speed-ups are not known yet."""
    speedup = _speedup(preset)
    return [candidate(preset, steps, speedup + 1) for steps in step_counts(preset.steps, speedup)]


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


def _speedup(preset: PresetOptions) -> float:
    """What a joint preset asks for."""
    assert isinstance(preset.policy, Joint)
    return preset.policy.speedup


def trial_latents(
    model: SourceModel,
    tables: SolverTables,
    schedule: Schedule,
    alignment: Alignment | None,
    calibration: Calibration,
    guidance_scale: float,
    options: TrialOptions,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Where a candidate ends, or the uncached run: float32 [N, C, H, W].

    Args:
        model: the U-Net, float32.
        tables: solver and steps.
        schedule: of the candidate.
        alignment: of the candidate; None: outputs are reused as they are.
        calibration: prompts, spread evenly over the images.
        guidance_scale: as in use; 1 means none.
        options: how many images, of which noise.
        progress: called with (steps done, steps in all).
    """
    jobs = [
        (i * calibration.prompts // options.images, options.seed + i) for i in range(options.images)
    ]
    outputs = 1 if alignment is None else alignment.outputs
    with CachedUNet(model, outputs) as cached, torch_kernels.on_gpu(model.unet):
        noise, conditions = calibration_inputs(model, calibration, jobs, guidance_scale)

        def after_step(step: int) -> None:
            if progress is not None:
                progress(step + 1, schedule.steps)

        made = denoise(
            cached, tables, schedule, alignment, noise, conditions, guidance_scale, after_step
        )
    return made.cpu().numpy()


def mean_distance(latents: np.ndarray, reference: np.ndarray) -> float:
    """Mean over images of |latents - reference| / |reference|."""
    ours, full = (x.reshape(len(x), -1).astype(np.float64) for x in (latents, reference))
    return float((np.linalg.norm(ours - full, axis=1) / np.linalg.norm(full, axis=1)).mean())
