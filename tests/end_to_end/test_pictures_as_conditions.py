"""Pipelines of diffusers that take pictures draw the same with a bundle in their U-Net's place."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

from blockcache.diffusers import attach, detach  # noqa: E402
from blockcache.runtime import InputError  # noqa: E402

STEPS = 4
SIZE = (16, 24)  # of the latents, which is not the model's own
PIXELS = (64, 96)


def pictures(count=1, channels=3, size=PIXELS, seed=0):
    """float32 [count, channels, *size] in 0..1."""
    made = np.random.default_rng(seed).random((count, channels, *size), np.float32)
    return torch.from_numpy(made)


def mask(count=1):
    """float32 [count, 1, *PIXELS]: a rectangle is drawn anew."""
    made = torch.zeros(count, 1, *PIXELS)
    made[:, :, 10:40, 30:80] = 1
    return made


REQUESTS = {
    "inpaint": lambda: {"image": pictures(2), "mask_image": mask(), "height": 64, "width": 96},
    "instruct-pix2pix": lambda: {"image": pictures(2), "image_guidance_scale": 1.7},
    "depth2img": lambda: {"image": pictures(2), "depth_map": pictures(2, size=(32, 32))[:, 0],
                          "strength": 1.0},
    "upscale": lambda: {"image": pictures(2, size=SIZE), "noise_level": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def pipelines(pipeline_folder):
    made = {}

    def get(kind):
        if kind not in made:
            lacking = {"depth_estimator": None, "feature_extractor": None}  # depth is given
            made[kind] = diffusers.DiffusionPipeline.from_pretrained(
                pipeline_folder(kind), **(lacking if kind == "depth2img" else {})
            )
            made[kind].set_progress_bar_config(disable=True)
        return made[kind]

    return get


def call(pipeline, kind, prompts):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(len(prompts), 4, *SIZE, generator=generator)
    given = {} if kind == "depth2img" else {"latents": latents}
    drawn = pipeline(
        prompts, num_inference_steps=STEPS, guidance_scale=4.0, output_type="latent",
        generator=torch.Generator().manual_seed(3), **given, **REQUESTS[kind](),
    )  # fmt: skip
    return drawn.images.float().numpy()


@pytest.mark.parametrize("kind", REQUESTS)
def test_attached_it_draws_what_the_pipelines_own_unet_draws(compiled, pipelines, kind):
    """The pipeline lays its pictures behind the latents; the bundle takes them as conditions."""
    pipeline = pipelines(kind)
    attach(pipeline, compiled(kind)[1], preset="ddim-4")
    ours, scheduler = call(pipeline, kind, ["a cat", "a dog"]), pipeline.scheduler
    with pytest.raises(InputError, match=r"^sample: expected \[N, 4 sample \+ .*, height, width\]"):
        pipeline.unet(torch.zeros(2, 4, *SIZE), 1.0, torch.zeros(2, 9, 32))
    detach(pipeline)
    own = pipeline.scheduler
    pipeline.register_modules(scheduler=scheduler)
    wanted = call(pipeline, kind, ["a cat", "a dog"])
    pipeline.register_modules(scheduler=own)
    assert np.abs(ours - wanted).max() <= 1e-5 * np.abs(wanted).max()
