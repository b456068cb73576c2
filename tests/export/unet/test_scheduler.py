"""A scheduler of another kind than the solver that replaces it is told; the others pass."""

from __future__ import annotations

import pytest

from blockcache.runtime.solvers.diffusers_config import solver_from_diffusers

diffusers = pytest.importorskip("diffusers")
from blockcache.export.unet.scheduler import EXCHANGEABLE, other_kind  # noqa: E402

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("kind", sorted(EXCHANGEABLE))
def test_an_exchangeable_scheduler_is_one_of_diffusers_and_passes(kind):
    config = dict(getattr(diffusers, kind)(**NOISE).config)
    assert other_kind("model", {**config, "_class_name": kind}, "dpm") is None


@pytest.mark.parametrize(
    "kind",
    ["LCMScheduler", "TCDScheduler", "EulerAncestralDiscreteScheduler",
     "KDPM2AncestralDiscreteScheduler"],
)  # fmt: skip
def test_a_scheduler_of_another_kind_is_named(kind):
    config = {**getattr(diffusers, kind)(**NOISE).config, "_class_name": kind}
    solver_from_diffusers(config, solver="euler", steps=4)  # it runs, so it has to be told
    assert other_kind("turbo", config, "euler") == (
        f"turbo: its scheduler is {kind}, which blockcache does not have. Solver euler runs in its "
        f"place, on the same noise schedule: look at its pictures before you use them."
    )


def test_an_sde_is_of_another_kind_than_its_ode():
    config = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
    text = other_kind("model", config, "ddim")
    assert "is DPMSolverMultistepScheduler (sde-dpmsolver++), which" in text


def test_a_config_without_a_class_passes():
    assert other_kind("model", NOISE, "ddim") is None
