"""At which steps a ControlNet acts: diffusers' shares of a run, as timesteps that a graph compares.

A graph knows a step by its timestep alone. So the steps at which a ControlNet acts are given by two
timesteps that lie between those of neighbouring steps.
"""

from __future__ import annotations

import numpy as np

from blockcache.runtime.arguments import finite_number, whole_number
from blockcache.runtime.errors import InputError
from blockcache.runtime.plan import LAST_TIMESTEP


def control_window(
    timesteps: np.ndarray, scale: object, start: object, end: object, first: int = 0
) -> np.ndarray:
    """What a condition ``control_scale`` holds: float32 [1, 3].

    Step i of S acts where ``i / S >= start`` and ``(i + 1) / S <= end``, as diffusers has it. The
    result is the scale, a timestep not below that of the first such step, and one not above that
    of the last; a scale of 0 where there is none.

    Args:
        timesteps: float32 [S], falling.
        scale: what the ControlNet's residuals are multiplied by.
        start: ``control_guidance_start``, 0 to 1.
        end: ``control_guidance_end``, 0 to 1, above ``start``.
        first: the first step that is executed; shares are of the steps from there.

    Raises:
        InputError: numbers out of range, or an end between two steps of one timestep.
    """
    factor = finite_number("controlnet_conditioning_scale", scale)
    from_, to = (
        finite_number(f"control_guidance_{side}", share)
        for side, share in (("start", start), ("end", end))
    )
    if not 0 <= from_ < to <= 1:
        raise InputError(
            f"control_guidance_start, control_guidance_end: expected 0 <= start < end <= 1, got "
            f"{from_:g} and {to:g}."
        )
    steps = len(timesteps) - whole_number("start_step", first, 0, len(timesteps) - 1)
    acting = [i for i in range(steps) if i / steps >= from_ and (i + 1) / steps <= to]
    if not acting:
        return np.array([[0.0, LAST_TIMESTEP, -LAST_TIMESTEP]], np.float32)
    borders = np.concatenate([[LAST_TIMESTEP], timesteps[first:], [-LAST_TIMESTEP]])
    edges = []
    for step in (acting[0], acting[-1] + 1):  # between step - 1 and step
        before, after = (np.float32(value) for value in borders[step : step + 2])
        edge = (before + after) / 2
        if not after < edge < before:
            raise InputError(
                f"control_guidance_start, control_guidance_end: expected steps of falling "
                f"timesteps, between which control begins or ends; steps {first + step - 1} and "
                f"{first + step} are at {before:g} and {after:g}. Move the share by a step."
            )
        edges.append(edge)
    return np.array([[factor, *edges]], np.float32)
