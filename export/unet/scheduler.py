"""Schedulers of diffusers: what runs in their place, and those that a preset runs themselves."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockcache.runtime.errors import ConfigError
from blockcache.runtime.solvers.diffusers_config import solver_of
from blockcache.runtime.solvers.recorded import DiffusersScheduler
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


def scheduler_config(where: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a scheduler that the user names.

    Args:
        where: a folder with ``scheduler_config.json`` (or a pipeline's), or a class of diffusers,
            which then reads the model's own config, as ``from_config`` does.
        own: of the model.

    Raises:
        ConfigError: neither.
    """
    folder = Path(where)
    for candidate in (folder, folder / "scheduler"):
        file = candidate / "scheduler_config.json"
        if file.is_file():
            return _read(file)
    if not where.isidentifier():
        raise ConfigError(
            f"Expected a folder with scheduler_config.json, or a class of diffusers such as "
            f"HeunDiscreteScheduler, got {where!r}."
        )
    return {**own, "_class_name": where}


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"Expected the config of a scheduler in {file}, got {error}.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"Expected the config of a scheduler in {file}, got {config!r}.")
    return config


def made_scheduler(config: Mapping[str, Any], steps: int) -> Any:
    """A scheduler of diffusers after ``set_timesteps(steps)``; ConfigError where it cannot be."""
    import diffusers

    name = str(config.get("_class_name"))
    kind: Any = getattr(diffusers, name, None)
    if diffusers.SchedulerMixin not in getattr(kind, "__mro__", ()):
        raise ConfigError(
            f"Expected a scheduler of diffusers {diffusers.__version__} such as "
            f"HeunDiscreteScheduler, got {name!r}."
        )
    try:
        made = kind.from_config({k: v for k, v in config.items() if k != "_class_name"})
        made.set_timesteps(steps)
    except Exception as error:  # whatever a scheduler says of its options
        raise ConfigError(f"{name} cannot run {steps} steps with its config: {error}") from error
    return made


def recorded_scheduler(config: Mapping[str, Any], steps: int) -> DiffusersScheduler:
    """What a preset records of a scheduler: its class, the options that differ, its timesteps."""
    made = made_scheduler(config, steps)
    kind: Any = type(made)
    defaults = inspect.signature(kind.__init__).parameters
    options = {
        name: _plain(made.config[name])
        for name, parameter in defaults.items()
        if name in made.config and made.config[name] != parameter.default
    }
    return DiffusersScheduler(
        scheduler=kind.__name__,
        config=options,
        inference_steps=steps,
        timesteps=tuple(float(time) for time in made.timesteps),
    )


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"Expected finite options of a scheduler, got {value}.")
    return value
