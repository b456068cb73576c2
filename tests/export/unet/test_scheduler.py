"""A scheduler of another kind than the solver that replaces it is told; the others pass."""

from __future__ import annotations

import pytest

from blockcache.runtime.solvers.diffusers_config import solver_from_diffusers

diffusers = pytest.importorskip("diffusers")
from blockcache.export.unet.scheduler import EXCHANGEABLE, OURS, other_kind  # noqa: E402

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def config_of(kind, **options):
    return {**getattr(diffusers, kind)(**NOISE, **options).config, "_class_name": kind}


@pytest.mark.parametrize("kind", sorted(EXCHANGEABLE))
def test_a_solver_stands_for_an_exchangeable_scheduler_of_diffusers(kind):
    said = other_kind("model", config_of(kind), "dpm")
    assert said == (
        None
        if kind in OURS
        else f"model: its scheduler is {kind}, which blockcache does not have. Solver dpm stands "
        f"for it, on the same noise schedule: both converge to the same picture."
    )


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("LCMScheduler", "which is the solver lcm"),
        ("EulerAncestralDiscreteScheduler", "which is the solver euler-a"),
        ("TCDScheduler", "which blockcache does not have"),
        ("KDPM2AncestralDiscreteScheduler", "which blockcache does not have"),
    ],
)
def test_a_scheduler_of_another_kind_is_named(kind, own):
    config = config_of(kind)
    solver_from_diffusers(config, solver="euler", steps=4)  # it runs, so it has to be told
    assert other_kind("turbo", config, "euler") == (
        f"turbo: its scheduler is {kind}, {own}. Solver euler runs in its place, on the same noise "
        f"schedule: look at its pictures before you use them."
    )


@pytest.mark.parametrize(
    ("kind", "options", "solver"),
    [
        ("LCMScheduler", {}, "lcm"),
        ("EulerAncestralDiscreteScheduler", {}, "euler-a"),
        ("UniPCMultistepScheduler", {}, "unipc"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpm-sde"),
    ],
)
def test_a_schedulers_own_solver_needs_no_word(kind, options, solver):
    config = config_of(kind, **options)
    assert other_kind("model", config, solver) is None
    assert solver_from_diffusers(config, steps=4).solver == solver


def test_an_sde_is_of_another_kind_than_its_ode():
    config = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
    text = other_kind("model", config, "ddim")
    assert "is DPMSolverMultistepScheduler (sde-dpmsolver++), which is the solver dpm-sde" in text


def test_a_solver_that_adds_noise_is_told_where_the_scheduler_adds_none():
    assert other_kind("model", config_of("DDIMScheduler"), "euler-a") == (
        "model: its scheduler is DDIMScheduler. Solver euler-a runs in its place and adds fresh "
        "noise at every step: look at its pictures before you use them."
    )


def test_a_config_without_a_class_passes():
    assert other_kind("model", NOISE, "ddim") is None
