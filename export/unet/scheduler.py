"""What a model's own scheduler says about the solver that runs in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockcache.runtime.solvers.diffusers_config import solver_of
from blockcache.runtime.solvers.solver import STOCHASTIC

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

OURS = frozenset(
    {
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "UniPCMultistepScheduler",
    }
)
"""Those among them that need no word: blockcache has them, or nobody draws with them."""


def other_kind(name: str, scheduler: Mapping[str, Any], solver: str) -> str | None:
    """What to say where ``solver`` replaces another scheduler; None where nothing needs saying.

    Other kinds add fresh noise at every step (ancestral, SDE) or belong to a distilled model (LCM,
    TCD): their pictures are not those that the solver converges to.
    """
    kind = str(scheduler.get("_class_name", "DDPMScheduler"))
    algorithm = str(scheduler.get("algorithm_type", ""))
    own = solver_of(scheduler)
    if solver == own and kind != "PNDMScheduler":
        return None
    is_sde = algorithm.startswith("sde")
    exchangeable = kind in EXCHANGEABLE and not is_sde
    if exchangeable and solver not in STOCHASTIC:
        if kind in OURS:
            return None
        return (
            f"{name}: its scheduler is {kind}, which blockcache does not have. Solver {solver} "
            f"stands for it, on the same noise schedule: both converge to the same picture."
        )
    if exchangeable:
        return (
            f"{name}: its scheduler is {kind}. Solver {solver} runs in its place and adds fresh "
            f"noise at every step: look at its pictures before you use them."
        )
    variant = f" ({algorithm})" if is_sde else ""
    known = f"which is the solver {own}" if own else "which blockcache does not have"
    return (
        f"{name}: its scheduler is {kind}{variant}, {known}. Solver {solver} runs in its place, on "
        f"the same noise schedule: look at its pictures before you use them."
    )
