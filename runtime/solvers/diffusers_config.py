"""Reads diffusers' ``scheduler_config.json`` as the configuration of our solvers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from blockcache.runtime.solvers.grid import Grid
from blockcache.runtime.solvers.noise import NoiseSchedule
from blockcache.runtime.solvers.options import require
from blockcache.runtime.solvers.solver import (
    DERIVES_LEVELS,
    LCM_STEPS,
    MULTISTEP,
    READ_BY,
    SOLVERS,
    SolverConfig,
)

_DPM = ("dpm", "dpm-sde")
# diffusers' options that change the result, and the values that we support.
_SUPPORTED: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("thresholding", "clip_sample", "use_flow_sigmas", "use_lu_lambdas"), (False,)),
    **dict.fromkeys(("use_exponential_sigmas", "use_beta_sigmas"), (False,)),
    **dict.fromkeys(("sigma_min", "sigma_max", "snr_shift_scale", "solver_p"), (None,)),
    **{"solver_order": (2,), "timestep_type": ("discrete",), "interpolation_type": ("linear",)},
    "lambda_min_clipped": (-np.inf,),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    **{"predict_x0": (True,), "disable_corrector": ([],)},
    **{"original_inference_steps": (LCM_STEPS,), "timestep_scaling": (10.0,)},
}
# The same, where it depends on the solver. diffusers reads deis as dpmsolver++, and types that a
# solver does not have as its default.
_SUPPORTED_BY: dict[str, dict[str, tuple[object, ...]]] = {
    "algorithm_type": {
        "dpm": ("dpmsolver++", "deis"),
        "dpm-sde": ("dpmsolver++", "sde-dpmsolver++", "deis"),
    },
    "solver_type": {
        **dict.fromkeys(_DPM, ("midpoint", "logrho", "bh1", "bh2")),
        "unipc": ("bh2", "midpoint", "logrho", "heun"),
    },
}
_RENAMED = {
    "num_train_timesteps": "train_timesteps",
    "rescale_betas_zero_snr": "rescale_zero_snr",
    "prediction_type": "prediction",
    "timestep_spacing": "spacing",
    "use_karras_sigmas": "karras",
    "final_sigmas_type": "final_sigma",
}
_CLASSES = {
    "DPMSolverMultistepScheduler": "dpm",
    "EulerDiscreteScheduler": "euler",
    "UniPCMultistepScheduler": "unipc",
    "EulerAncestralDiscreteScheduler": "euler-a",
    "LCMScheduler": "lcm",
    **dict.fromkeys(("DDIMScheduler", "DDPMScheduler", "PNDMScheduler"), "ddim"),
}
# Options of diffusers that only some of our solvers would read.
_THEIRS_READ_BY: dict[str, tuple[str, ...]] = {
    "clip_sample": ("ddim", "lcm"),
    "lambda_min_clipped": _DPM,
    "solver_order": MULTISTEP,
    **dict.fromkeys(("timestep_type", "interpolation_type"), ("euler",)),
    **dict.fromkeys(("sigma_min", "sigma_max"), ("euler", "unipc")),
    **dict.fromkeys(("predict_x0", "disable_corrector", "solver_p"), ("unipc",)),
    **dict.fromkeys(("original_inference_steps", "timestep_scaling"), ("lcm",)),
}


def solver_from_diffusers(
    scheduler_config: Mapping[str, Any],
    *,
    solver: str | None = None,
    steps: int,
    spacing: str | None = None,
    grid: Grid | None = None,
) -> SolverConfig:
    """Read a ``scheduler_config.json`` of diffusers, whichever scheduler wrote it.

    It means what ``Target.from_config`` makes of it there: an absent option has the target's
    default, except that an absent ``clip_sample`` is true only for DDIM and DDPM.

    Args:
        scheduler_config: the file's content.
        solver: one of ``SOLVERS``; None takes the class's own (DDPM and PNDM: ddim).
        steps: S.
        spacing: leading, trailing or linspace, in place of the config's.
        grid: noise levels in place of where the config puts them.

    Raises:
        ConfigError: an option that would change the result and that we do not have, by name.
    """
    unset = scheduler_config.get("_use_default_values", ())
    given = {k: v for k, v in scheduler_config.items() if k not in unset and v is not None}
    solver = solver or solver_of(scheduler_config)
    _refuse_unsupported(scheduler_config, given, solver)
    given = {_RENAMED.get(key, key): value for key, value in given.items()}
    betas = {f.name: given[f.name] for f in fields(NoiseSchedule) if f.name in given}
    read = [f.name for f in fields(SolverConfig) if solver in READ_BY.get(f.name, SOLVERS)]
    options: dict[str, Any] = {"spacing": "leading" if solver in ("ddim", "lcm") else "linspace"}
    options |= {name: given[name] for name in read if name in given}
    options |= {} if spacing is None else {"spacing": spacing}
    if spacing is not None or grid is not None:
        options.pop("karras", None)
    if grid is not None:
        options = {k: v for k, v in options.items() if k not in DERIVES_LEVELS}
    noise = NoiseSchedule(**betas)
    return SolverConfig(solver=solver, steps=steps, noise=noise, grid=grid, **options)


def solver_of(scheduler_config: Mapping[str, Any]) -> str:
    """The solver that a class of diffusers is, or whose place it takes; "" where there is none."""
    name = str(scheduler_config.get("_class_name"))
    is_sde = scheduler_config.get("algorithm_type") == "sde-dpmsolver++"
    return "dpm-sde" if _CLASSES.get(name) == "dpm" and is_sde else _CLASSES.get(name, "")


def _refuse_unsupported(source: Mapping[str, Any], given: Mapping[str, Any], solver: str) -> None:
    name, advice = source.get("_class_name"), "Name one: this scheduler stands for none."
    require(solver in SOLVERS, "solver", f"one of {SOLVERS} for {name}", solver, advice)
    betas, advice = {"beta_schedule", "trained_betas"} & set(source), "Use a DDPM-like model."
    require(bool(betas), "beta_schedule", "the noise schedule of the training", name, advice)
    if name in ("DDIMScheduler", "DDPMScheduler"):
        given = {"clip_sample": True, **given}
    supported = _SUPPORTED | {
        key: values[solver] for key, values in _SUPPORTED_BY.items() if solver in values
    }
    for key, values in supported.items():
        if key in given and solver in _THEIRS_READ_BY.get(key, SOLVERS):
            advice = f"Solver {solver!r} has nothing else; change it only if the model allows."
            require(given[key] in values, key, f"one of {values}", given[key], advice)
