"""A trial: the distance between two ends, and a run against the loop that it is."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from blockcache.export.measure.calibration import Calibration  # noqa: E402
from blockcache.export.measure.sampling import Sampling  # noqa: E402
from blockcache.export.measure.trial import TrialOptions, mean_distance, trial_latents  # noqa: E402
from blockcache.runtime import Alignment, ConfigError, Schedule  # noqa: E402
from blockcache.runtime.solvers.diffusers_config import solver_from_diffusers  # noqa: E402


def test_the_distance_is_relative_and_a_mean_over_images():
    full = np.array([[3.0, 4.0], [0.0, 2.0]], np.float32)
    made = np.array([[3.0, 3.0], [0.0, 2.0]], np.float32)
    assert mean_distance(made, full) == pytest.approx((1 / 5 + 0) / 2)


def test_a_trial_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="at least one image to compare on, got 0"):
        TrialOptions(images=0)


def test_a_trial_is_the_cached_loop_on_its_own_noise(tiny_models, conditions_of):
    model = tiny_models("one-level")
    calibration = Calibration(conditions_of(model, 4), conditions_of(model, 1, seed=5))
    solver = solver_from_diffusers(model.scheduler, solver="dpm", steps=2)
    sampling = Sampling(model, solver, calibration, 3.0)
    schedule = Schedule(np.array([[True] * len(model.blocks), [False] * len(model.blocks)]))
    alignment = Alignment.identity(2, tuple(block.channels for block in model.blocks), 2)
    options, heard = TrialOptions(images=2), []
    made = trial_latents(
        sampling, schedule, alignment, options, observer=lambda *told: heard.append(told)
    )
    assert heard == [("try", 1, 2), ("try", 2, 2)]
    with sampling.cached_unet() as cached:
        jobs = [(0, options.seed), (2, options.seed + 1)]
        denoiser, noise = sampling.begin(cached, jobs)
        np.testing.assert_array_equal(made, denoiser.denoise(noise, schedule).numpy())
