"""Pictures that a model makes for its own calibration."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from blockcache.export import MeasurementOptions, Parts  # noqa: E402
from blockcache.export.measure.calibration import Calibration  # noqa: E402
from blockcache.export.measure.own_pictures import (  # noqa: E402
    SEED,
    Coders,
    own_pictures,
    own_pictures_of,
    random_depths,
    random_mask,
)
from blockcache.export.measure.sampling import Sampling, Tally  # noqa: E402
from blockcache.export.measurements import Measurements  # noqa: E402
from blockcache.export.observer import unobserved  # noqa: E402
from blockcache.export.parts.part import Part  # noqa: E402
from blockcache.export.stages import StageStore  # noqa: E402
from blockcache.runtime import ConfigError  # noqa: E402
from blockcache.runtime.solvers.diffusers_config import solver_from_diffusers  # noqa: E402

seeds = st.integers(0, 2**32 - 1)
sides = st.integers(2, 40)


@given(seeds, sides, sides)
def test_a_mask_is_one_rectangle(seed, height, width):
    mask = random_mask(np.random.default_rng(seed), height, width)
    assert mask.shape == (1, height, width)
    rows, columns = mask[0].any(1), mask[0].any(0)
    assert rows.any()
    np.testing.assert_array_equal(mask[0], np.outer(rows, columns))


@given(seeds, sides, sides)
def test_depths_are_between_minus_one_and_one(seed, height, width):
    depths = random_depths(np.random.default_rng(seed), height, width)
    assert depths.shape == (1, height, width)
    assert (depths.min(), depths.max()) == (-1, 1)


def decode(latents):
    """Pictures twice as large as latents."""
    return torch.sigmoid(torch.nn.functional.interpolate(latents[:, :3], scale_factor=2.0))


def encode(pictures):
    """The mean of what becomes a latent, its first channel once more."""
    mean = torch.nn.functional.avg_pool2d(pictures, 2)
    return torch.cat([mean, mean[:, :1]], dim=1)


LEVELS = (0.9, 0.7, 0.5, 0.0)
CODERS = Coders(decode, encode, LEVELS)


@pytest.fixture(scope="module")
def sampling_of(tiny_models, conditions_of):
    """``sampling_of(kind)``: two prompts of a tiny model, without the pictures that it reads."""

    def make(kind):
        model = tiny_models(kind)
        sides = (conditions_of(model, 2), conditions_of(model, 1, seed=5))
        own = own_pictures_of(model)
        texts = [{n: v for n, v in side.items() if n not in own} for side in sides]
        solver = solver_from_diffusers(model.scheduler, solver="dpm", steps=2)
        return Sampling(model, solver, Calibration(*texts), 3.0, tally=Tally())

    return make


def drawn_with(sampling, pictures):
    """What decodes from an uncached run of both prompts."""
    positive = {**sampling.calibration.positive, **pictures}
    calibration = Calibration(positive, sampling.calibration.negative)
    full = dataclasses.replace(sampling, calibration=calibration)
    with full.cached_unet() as cached:
        denoiser, noise = full.begin(cached, [(0, SEED), (1, SEED)])
        return decode(denoiser.denoise(noise, full.uncached)) * 2 - 1


def test_an_inpainting_model_sees_its_drawing_behind_a_mask(sampling_of):
    sampling = sampling_of("sdxl-inpaint")
    made = own_pictures(sampling, CODERS)
    mask, latents = made["mask"], made["masked_image_latents"]
    assert mask.shape == (2, 1, 16, 16)
    assert 0 < mask.mean() < 1
    assert not np.array_equal(*mask)
    grey = encode(torch.zeros(1, 3, 32, 32)).numpy()
    whole = {"mask": np.ones((1, 1, 16, 16), np.float32), "masked_image_latents": grey}
    wanted = encode(drawn_with(sampling, whole)).numpy()
    kept, hidden = (away_from_the_border(area) for area in (1 - mask, mask))
    np.testing.assert_allclose(latents * kept, wanted * kept, atol=1e-5)
    assert not (latents * hidden).any(), "grey is zero"


def away_from_the_border(areas):
    """Areas [N, 1, h, w] less one latent on every side: what becomes it lies in them whole."""
    padded = np.pad(areas, [(0, 0), (0, 0), (1, 1), (1, 1)], mode="edge")
    _, _, height, width = areas.shape
    moved = [padded[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.min(moved, axis=0)


def test_an_editing_model_edits_the_next_prompts_drawing(sampling_of):
    """Drawn without a picture, and guided by the text alone."""
    sampling = dataclasses.replace(sampling_of("instruct-pix2pix"), image_guidance_scale=1.5)
    (latents,) = own_pictures(sampling, CODERS).values()
    plain = dataclasses.replace(sampling, image_guidance_scale=1.0)
    nothing = {"image_latents": np.zeros((1, 4, 16, 16), np.float32)}
    wanted = encode(drawn_with(plain, nothing)).numpy()
    np.testing.assert_allclose(latents, wanted[::-1], atol=1e-5)
    assert sampling.tally.evaluations == 2 * (2 + 2), "counted an image and step"


def test_an_upscaler_enlarges_its_drawing_made_small(sampling_of, monkeypatch):
    """Drawn of noise alone; what it enlarges has little noise."""
    monkeypatch.setattr("blockcache.export.measure.own_pictures.LEVEL", 0)
    sampling = sampling_of("upscale")
    clear = dataclasses.replace(CODERS, noise_levels=(1.0, *LEVELS[1:]))
    made = own_pictures(sampling, clear)
    np.testing.assert_array_equal(made["class_labels"], [0])
    start = {
        "image": np.random.default_rng(SEED).standard_normal((1, 3, 16, 16), np.float32),
        "class_labels": np.array([3]),
    }
    wanted = torch.nn.functional.avg_pool2d(drawn_with(sampling, start), 2).numpy()
    np.testing.assert_allclose(made["image"], wanted, atol=1e-5)
    noised = own_pictures(sampling, CODERS)["image"]
    apart = noised - 0.9**0.5 * wanted
    assert abs(apart.std() - 0.1**0.5) < 0.05


def test_depths_are_made_without_a_run(sampling_of):
    sampling = sampling_of("depth2img")
    (depths,) = own_pictures(sampling, None).values()
    assert depths.shape == (2, 1, 16, 16)
    assert not np.array_equal(*depths)
    assert sampling.tally.evaluations == 0


def test_what_cannot_be_made_is_not_named(tiny_models):
    assert own_pictures_of(tiny_models("sd")) == ()
    assert own_pictures_of(tiny_models("upscale")) == ("image", "class_labels")
    assert own_pictures_of(tiny_models("inpaint")) == ("mask", "masked_image_latents")


class Half(torch.nn.Module):
    """Half an autoencoder."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def measurements(sampling, store, parts):
    options = MeasurementOptions(guidance_scale=3.0)
    return Measurements(
        sampling.model, "float32", sampling.calibration, options, store, unobserved, parts
    )


def test_pictures_are_made_once_for_a_bundle(sampling_of, tmp_path):
    sampling, store = sampling_of("instruct-pix2pix"), StageStore(tmp_path)
    loaded = []

    def half(role, function):
        def load(dtype):
            loaded.append((role, dtype))
            return Half(function)

        return Part(name=role, role=role, sha256=role, load=load, inputs={}, outputs={})

    parts = Parts(parts=(half("decoder", decode), half("encoder", encode)))
    made = measurements(sampling, store, parts)
    assert loaded == [], "nothing is drawn before it is needed"
    complete = made._complete_calibration
    assert complete.positive["image_latents"].shape == (2, 4, 16, 16)
    again = measurements(sampling, StageStore(tmp_path), parts)._complete_calibration
    assert again.sha256 == complete.sha256
    assert loaded == [("decoder", torch.float32), ("encoder", torch.float32)]
    given = dataclasses.replace(sampling, calibration=complete)
    assert measurements(given, store, None)._complete_calibration is complete


def whole(*roles):
    """Parts with these halves of an autoencoder."""
    made = [Part(name=r, role=r, sha256=r, load=Half, inputs={}, outputs={}) for r in roles]
    return Parts(parts=tuple(made))


@pytest.mark.parametrize(
    ("kind", "parts", "lacking"),
    [
        ("inpaint", None, "decoder, encoder"),
        ("instruct-pix2pix", whole("decoder"), "encoder"),
        ("upscale", whole("decoder", "encoder"), "low_res_scheduler"),
    ],
)
def test_what_draws_pictures_is_asked_for(sampling_of, tmp_path, kind, parts, lacking):
    names = " and ".join(own_pictures_of(sampling_of(kind).model))
    with pytest.raises(
        ConfigError,
        match=rf"^Calibration: expected {names}, which 'tiny-{kind}' reads, or the pipeline's "
        rf"autoencoder, .* \(no {lacking}\)\. Add them, or compile with all parts",
    ):
        measurements(sampling_of(kind), StageStore(tmp_path), parts)


def test_half_of_the_pictures_are_not_enough(sampling_of, tmp_path):
    sampling = sampling_of("inpaint")
    mask = {"mask": np.ones((1, 1, 16, 16), np.float32)}
    positive = {**sampling.calibration.positive, **mask}
    half = dataclasses.replace(
        sampling, calibration=Calibration(positive, sampling.calibration.negative)
    )
    with pytest.raises(ConfigError, match="Calibration: expected masked_image_latents, which"):
        measurements(half, StageStore(tmp_path), None)
