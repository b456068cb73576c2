"""A scheduler of diffusers taken step by step, in any order, ends where it ends by itself."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from blockcache.runtime.errors import ConfigError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from blockcache.export.unet.scheduler import (  # noqa: E402
    made_scheduler,
    recorded_scheduler,
    scheduler_config,
)
from blockcache.export.unet.steps import SchedulerSteps, TableSteps  # noqa: E402
from blockcache.runtime.solvers.diffusers_config import solver_from_diffusers  # noqa: E402
from blockcache.runtime.solvers.solver import solver_tables  # noqa: E402

OWN = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
       "clip_sample": False, "_class_name": "DDIMScheduler"}  # fmt: skip


def model(sample, timestep):
    return torch.tanh(0.5 * sample) + float(timestep) / 2000


def noise(images=2):
    return torch.randn(images, 4, 3, 3, generator=torch.Generator().manual_seed(0))


def states(steps, latents):
    """(latents, past) before each step and at the end."""
    made = [(latents, ())]
    for step, timestep in enumerate(steps.timesteps):
        output = model(steps.model_input(*made[-1], step), timestep)
        made.append(steps.advance(*made[-1], output, step))
    return made


@pytest.mark.parametrize(
    "name",
    ["HeunDiscrete", "KDPM2AncestralDiscrete", "LMSDiscrete", "PNDM", "SASolver", "UniPCMultistep"],
)
def test_steps_are_the_schedulers_own(name):
    config = scheduler_config(f"{name}Scheduler", OWN)
    steps = SchedulerSteps(made_scheduler(config, 6), [5, 6])
    made = states(steps, steps.start(noise(), None, 0))
    scheduler = made_scheduler(config, 6)
    sample = noise() * float(scheduler.init_noise_sigma)
    draws = "generator" in inspect.signature(scheduler.step).parameters
    for step, timestep in enumerate(scheduler.timesteps):
        made_from = [torch.Generator().manual_seed((seed << 16) + step) for seed in (5, 6)]
        drawn = {"generator": made_from} if draws else {}
        output = model(scheduler.scale_model_input(sample, timestep), timestep)
        sample = scheduler.step(output, timestep, sample, **drawn).prev_sample
        assert torch.equal(made[step + 1][0], sample)
    # Any step again, in any order, from its own state.
    for step in (4, 2, 4):
        output = model(steps.model_input(*made[step], step), steps.timesteps[step])
        again, past = steps.advance(*made[step], output, step)
        assert torch.equal(again, made[step + 1][0])
        assert all(map(torch.equal, past, made[step + 1][1]))


def test_an_image_has_the_same_noise_alone_and_in_a_batch():
    config = scheduler_config("EulerAncestralDiscreteScheduler", OWN)
    both, one = (SchedulerSteps(made_scheduler(config, 4), seeds) for seeds in ([5, 6], [6]))
    ends = [states(steps, steps.start(z, None, 0))[-1][0] for steps, z in
            ((both, noise()), (one, noise()[1:]))]  # fmt: skip
    assert torch.allclose(ends[0][1:], ends[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", ["ddim", "euler-a", "lcm"])
def test_gains_are_those_of_the_tables(solver):
    tables = solver_tables(solver_from_diffusers(OWN, solver=solver, steps=4))
    name = {"ddim": "DDIM", "euler-a": "EulerAncestralDiscrete", "lcm": "LCM"}[solver]
    config = scheduler_config(f"{name}Scheduler", OWN)
    theirs = SchedulerSteps(made_scheduler(config, 4))
    ours = TableSteps(tables)
    for step in range(4):
        assert theirs.gain(step) == pytest.approx(ours.gain(step), rel=1e-4)


def test_what_is_recorded_makes_the_scheduler_again(tmp_path):
    made = diffusers.DPMSolverMultistepScheduler(**OWN_BETAS, solver_order=3)
    made.save_pretrained(tmp_path / "scheduler")
    config = scheduler_config(str(tmp_path), {})
    recorded = recorded_scheduler(config, 6)
    assert (recorded.scheduler, recorded.inference_steps) == ("DPMSolverMultistepScheduler", 6)
    assert recorded.config == {**OWN_BETAS, "solver_order": 3}
    made.set_timesteps(6)
    assert recorded.timesteps == tuple(made.timesteps.double().tolist())
    assert np.isfinite(recorded.timesteps).all()


OWN_BETAS = {name: OWN[name] for name in ("beta_start", "beta_end", "beta_schedule")}


def test_an_unknown_scheduler_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^Expected a folder with scheduler_config\.json, or a"):
        scheduler_config("no/such/folder", OWN)
    (tmp_path / "scheduler_config.json").write_text("{")
    with pytest.raises(
        ConfigError, match=r"^Expected the config of a scheduler in .*, got Expecting"
    ):
        scheduler_config(str(tmp_path), OWN)
    with pytest.raises(ConfigError, match=r"^Expected a scheduler of diffusers .*, got 'UNet2DMod"):
        made_scheduler(scheduler_config("UNet2DModel", OWN), 4)
    with pytest.raises(ConfigError, match=r"^LCMScheduler cannot run 99 steps with its config: "):
        made_scheduler(scheduler_config("LCMScheduler", OWN), 99)


def test_the_reference_by_a_scheduler_starts_from_noise():
    steps = SchedulerSteps(made_scheduler(OWN, 4))
    with pytest.raises(ConfigError, match="the reference starts from noise alone"):
        steps.start(noise(), noise(), 1)
