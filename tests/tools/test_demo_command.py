"""The demo's table: what each run costs, and how far it ends from the converged one."""

from __future__ import annotations

import numpy as np
import pytest

from blockcache.tools.commands.demo import demo_rows


def test_every_run_is_held_against_the_last_one(compiled):
    _, bundle = compiled("sd")
    about = {"dpm-20": "many steps", "ddim-4": "the converged run"}
    latents = {
        "dpm-20": np.full((2, 4, 3, 3), 1.5, np.float32),
        "ddim-4": np.ones((2, 4, 3, 3), np.float32),
    }
    plain, converged = demo_rows(bundle, about, latents, {"dpm-20": 2.0, "ddim-4": 0.5})
    assert (plain.flops, plain.distance, plain.steps) == (1.0, 0.5, 20)
    assert (converged.distance, converged.seconds, converged.about) == (
        0.0,
        0.5,
        "the converged run",
    )
    assert converged.flops == pytest.approx(0.2, abs=0.01)
