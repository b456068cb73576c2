"""What a model's own scheduler says about the solver that runs in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXCHANGEABLE = frozenset(
    {
        "DDIMScheduler",
        "DDPMScheduler",  # how the model was trained, not how it is to be drawn from
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    }
)
"""diffusers' solvers of the one equation: more steps bring each of them to the same picture."""


def other_kind(name: str, scheduler: Mapping[str, Any], solver: str) -> str | None:
    """What to say where ``solver`` replaces a scheduler of another kind; None where it does not.

    Other kinds add fresh noise at every step (ancestral, SDE) or belong to a distilled model (LCM,
    TCD): their pictures are not those that the solver converges to.
    """
    kind = str(scheduler.get("_class_name", "DDPMScheduler"))
    algorithm = str(scheduler.get("algorithm_type", ""))
    if kind in EXCHANGEABLE and not algorithm.startswith("sde"):
        return None
    variant = f" ({algorithm})" if algorithm.startswith("sde") else ""
    return (
        f"{name}: its scheduler is {kind}{variant}, which blockcache does not have. Solver "
        f"{solver} runs in its place, on the same noise schedule: look at its pictures before you "
        f"use them."
    )
