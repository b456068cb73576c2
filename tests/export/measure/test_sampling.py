"""What a measurement runs on: noise, prompts, guidance, and weights of the precision asked for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from blockcache.export.measure.calibration import Calibration  # noqa: E402
from blockcache.export.measure.sampling import Sampling, Tally, steps_of  # noqa: E402
from blockcache.export.unet.cached_unet import Denoiser  # noqa: E402
from blockcache.runtime.solvers.diffusers_config import solver_from_diffusers  # noqa: E402
from blockcache.runtime.solvers.solver import STOCHASTIC  # noqa: E402

PROMPTS = 3
jobs = st.tuples(st.integers(0, PROMPTS - 1), st.integers(0, 2**31))


@pytest.fixture(scope="module")
def sampling(tiny_models, conditions_of):
    model = tiny_models("one-level")
    calibration = Calibration(conditions_of(model, PROMPTS), conditions_of(model, 1, seed=5))
    solver = solver_from_diffusers(model.scheduler, solver="dpm", steps=4)
    return Sampling(model, solver, calibration, 3.0)


@settings(max_examples=20, deadline=None)
@given(st.lists(jobs, min_size=1, max_size=4))
def test_a_job_has_its_noise_in_any_batch(sampling, many):
    together = sampling.noise(many)
    assert together.shape == (len(many), 4, 16, 16)
    for each, job in zip(together, many, strict=True):
        assert torch.equal(each, sampling.noise([job])[0])


def test_other_seeds_and_other_prompts_are_other_noise(sampling):
    noise = sampling.noise([(0, 0), (1, 0), (0, 1)])
    assert not any(torch.equal(noise[a], noise[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("solver", STOCHASTIC)
def test_noise_that_a_solver_adds_is_the_jobs(sampling, solver):
    """The same in every run: so reuse is measured against a run with the same noise."""
    config = solver_from_diffusers(sampling.model.scheduler, solver=solver, steps=4)
    noisy = dataclasses.replace(sampling, solver=config)
    jobs = [(0, 3), (1, 4)]

    def drawn(jobs):
        with noisy.cached_unet() as cached:
            denoiser, noise = noisy.begin(cached, jobs)
            return denoiser.denoise(noise, noisy.uncached)

    together = drawn(jobs)
    assert torch.equal(drawn(jobs), together)
    assert torch.allclose(drawn(jobs[1:])[0], together[1], atol=1e-4)
    assert not torch.allclose(drawn([(0, 3), (1, 5)])[1], together[1], atol=0.1)


@given(st.integers(1, 40))
def test_prompts_are_spread_evenly(sampling, images):
    spread = sampling.spread_prompts(images)
    counts = np.bincount(spread, minlength=PROMPTS)
    assert len(spread) == images
    assert spread == sorted(spread)
    if images >= PROMPTS:
        assert counts.max() - counts.min() <= 1
    else:
        assert counts.max() == 1


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_denoiser_sees_both_halves_where_guidance_is_on(sampling, guidance_scale):
    """Off, the unconditional prompt does not matter; on, it does."""
    ends = []
    for shift in (0.0, 1.0):
        negative = {
            name: values + np.float32(shift)
            for name, values in sampling.calibration.negative.items()
        }
        calibration = dataclasses.replace(sampling.calibration, negative=negative)
        changed = dataclasses.replace(
            sampling, calibration=calibration, guidance_scale=guidance_scale
        )
        with changed.cached_unet() as cached:
            denoiser, noise = changed.begin(cached, [(0, 0)])
            ends.append(denoiser.denoise(noise, changed.uncached))
    assert torch.equal(*ends) == (guidance_scale == 1.0)


def test_guidance_by_an_image_takes_three_samples(tiny_models, conditions_of):
    """Without anything, with the image, with image and prompt."""
    model = tiny_models("instruct-pix2pix")
    positive, negative = conditions_of(model, 2), conditions_of(model, 1, seed=5)
    image = positive["image_latents"]
    prompts = [side["encoder_hidden_states"] for side in (positive, negative)]
    solver = solver_from_diffusers(model.scheduler, solver="dpm", steps=2)
    calibration = Calibration(positive, {"encoder_hidden_states": prompts[1]})
    edits = Sampling(model, solver, calibration, 3.0, image_guidance_scale=1.5)
    with edits.cached_unet() as cached:
        denoiser, noise = edits.begin(cached, [(0, 0), (1, 0)])
        drawn = denoiser.denoise(noise, edits.uncached)
        thirds = {
            "encoder_hidden_states": np.concatenate([prompts[1]] * 4 + [prompts[0]]),
            "image_latents": np.concatenate([np.zeros_like(image), image, image]),
        }
        tensors = {name: torch.from_numpy(values) for name, values in thirds.items()}
        plain = Denoiser(cached, steps_of(solver), tensors, 3.0, 0.0, 1.5)
        assert torch.equal(plain.denoise(noise, edits.uncached), drawn)
    assert edits.tally.evaluations == 2 * 2 * 2
    assert [dataclasses.replace(edits, guidance_scale=g).rows for g in (1.0, 2.0)] == [1, 3]
    other = {"encoder_hidden_states": prompts[1], "image_latents": image[1:]}
    given = Calibration(positive, other).pick([0], True, by_image=True)["image_latents"]
    np.testing.assert_array_equal(given.numpy(), image[[1, 0, 0]])


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_unet_has_weights_of_the_precision_in_float32(sampling, precision):
    weights = dict(sampling.model.unet.named_parameters())
    with dataclasses.replace(sampling, precision=precision).cached_unet() as cached:
        for name, weight in cached.model.unet.named_parameters():
            original = weights[name.replace(".inner.", ".")]
            assert torch.equal(weight, original.to(getattr(torch, precision)).float())
    assert not any("inner" in name for name, _ in sampling.model.unet.named_parameters())


def test_the_model_is_whole_again_after_an_error(sampling):
    names = list(sampling.model.unet.state_dict())
    with pytest.raises(ZeroDivisionError), sampling.cached_unet():
        raise ZeroDivisionError
    assert list(sampling.model.unet.state_dict()) == names


def test_the_schedule_and_the_steps_are_the_solvers(sampling):
    assert sampling.steps == 4
    assert sampling.uncached.recompute.shape == (4, len(sampling.model.blocks))
    assert sampling.uncached.recompute.all()
    assert len(sampling.timesteps) == 4


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_evaluations_are_counted_once_an_image_and_step(sampling, guidance_scale):
    counted = dataclasses.replace(sampling, guidance_scale=guidance_scale, tally=Tally())
    with counted.cached_unet() as cached:
        denoiser, noise = counted.begin(cached, [(0, 0), (1, 0)])
        denoiser.denoise(noise, counted.uncached)
    assert counted.tally.evaluations == 2 * 4
