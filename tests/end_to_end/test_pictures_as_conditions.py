"""Pipelines of diffusers that take pictures draw the same with a bundle in their U-Net's place."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")
pytest.importorskip("typer")

from PIL import Image  # noqa: E402

from blockcache import Pipeline  # noqa: E402
from blockcache.diffusers import attach, detach  # noqa: E402
from blockcache.runtime import InputError  # noqa: E402
from blockcache.runtime.pipeline.picture_conditions import NOISE_STEP  # noqa: E402
from blockcache.runtime.solvers.philox import standard_normal  # noqa: E402

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
    "sdxl-inpaint": lambda: {**REQUESTS["inpaint"](), "strength": 1.0},
    "instruct-pix2pix": lambda: {"image": pictures(2), "image_guidance_scale": 1.7},
    "sdxl-instruct-pix2pix": lambda: {**REQUESTS["instruct-pix2pix"](), "height": 64, "width": 96},
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


RARE = ("inpaint", "sdxl-instruct-pix2pix", "depth2img", "upscale")
"""What takes another compile and shows little more: run by ``-m slow``."""


def marked(kinds):
    """Cases, the rare ones slow."""
    slow = pytest.mark.slow
    return [pytest.param(k, marks=slow) if k.split(",")[0] in RARE else k for k in kinds]


@pytest.mark.parametrize("kind", marked(REQUESTS))
def test_attached_it_draws_what_the_pipelines_own_unet_draws(pipeline_bundle, pipelines, kind):
    """The pipeline lays its pictures behind the latents; the bundle takes them as conditions."""
    pipeline = pipelines(kind)
    attach(pipeline, pipeline_bundle(kind))
    ours, scheduler = call(pipeline, kind, ["a cat", "a dog"]), pipeline.scheduler
    with pytest.raises(InputError, match=r"^sample: expected \[N, 4 sample \+ .*, height, width\]"):
        pipeline.unet(torch.zeros(2, 4, *SIZE), 1.0, torch.zeros(2, 9, 32))
    detach(pipeline)
    own = pipeline.scheduler
    pipeline.register_modules(scheduler=scheduler)
    wanted = call(pipeline, kind, ["a cat", "a dog"])
    pipeline.register_modules(scheduler=own)
    assert np.abs(ours - wanted).max() <= 1e-5 * np.abs(wanted).max()


def as_tensor(images):
    """uint8 [N, H, W, 3] as pipelines take tensors: float [N, 3, H, W] in 0..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


IMAGES = np.random.default_rng(1).integers(0, 256, (2, *PIXELS, 3)).astype(np.uint8)
SMALL = IMAGES[:, : SIZE[0], : SIZE[1]]
MASKS = np.random.default_rng(2).random((2, *PIXELS), np.float32)
DEPTHS = np.random.default_rng(3).random((2, *SIZE), np.float32)
DRAWN = {  # what the runtime's pipeline is given, and what diffusers'
    "inpaint": (
        {"image": IMAGES, "mask_image": MASKS},
        {"image": as_tensor(IMAGES), "mask_image": torch.from_numpy(MASKS)[:, None]},
    ),
    "sdxl-inpaint": (
        {"image": IMAGES, "mask_image": MASKS},
        {"image": as_tensor(IMAGES), "mask_image": torch.from_numpy(MASKS)[:, None],
         "strength": 1.0},
    ),
    "sdxl-inpaint, from the image": (
        {"image": IMAGES, "mask_image": MASKS, "strength": 0.5},
        {"image": as_tensor(IMAGES), "mask_image": torch.from_numpy(MASKS)[:, None],
         "strength": 0.5},
    ),
    "instruct-pix2pix": (
        {"image": IMAGES, "image_guidance_scale": 1.7},
        {"image": as_tensor(IMAGES), "image_guidance_scale": 1.7},
    ),
    "sdxl-instruct-pix2pix": (
        {"image": IMAGES, "image_guidance_scale": 1.7},
        {"image": as_tensor(IMAGES), "image_guidance_scale": 1.7, "height": PIXELS[0],
         "width": PIXELS[1]},
    ),
    "depth2img": (
        {"image": IMAGES, "depth_map": DEPTHS, "strength": 0.8},
        {"image": as_tensor(IMAGES), "depth_map": torch.from_numpy(DEPTHS), "strength": 0.8},
    ),
    "upscale": (
        {"image": SMALL, "noise_level": 3},
        {"image": as_tensor(SMALL), "noise_level": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", marked(DRAWN))
def test_the_pipeline_draws_what_diffusers_draws(pipeline_bundle, pipelines, monkeypatch, case):
    """Without torch: the masks and pictures encoded by the bundle's own parts."""
    kind, (ours, theirs) = case.split(",")[0], DRAWN[case]
    with Pipeline.open(pipeline_bundle(kind), preset="ddim-4", threads=1) as pipeline:
        drawn = pipeline(["abc", "q"], "x", seeds=[0, 1], guidance_scale=4.0, **ours)
        noise = torch.from_numpy(pipeline.session.noise([0, 1], *SIZE))
    assert drawn.images.shape == (2, *PIXELS, 3)
    reference = pipelines(kind)
    small = standard_normal(np.arange(2, dtype=np.uint64), NOISE_STEP, 3 * math.prod(SIZE))
    small = torch.from_numpy(small.reshape(2, 3, *SIZE))
    monkeypatch.setattr(
        sys.modules[type(reference).__module__],
        "randn_tensor",
        lambda shape, **_: small if shape[1] == 3 else noise,
    )
    distribution = type(reference.vae.encode(torch.zeros(1, 3, *PIXELS)).latent_dist)
    monkeypatch.setattr(distribution, "sample", lambda self, _generator=None: self.mode())
    size = {"height": PIXELS[0], "width": PIXELS[1]} if "inpaint" in kind else {}
    wanted = reference(
        ["abc", "q"], negative_prompt=["x", "x"], num_inference_steps=STEPS, guidance_scale=4.0,
        output_type="latent", **size, **theirs,
    ).images.numpy()  # fmt: skip
    assert np.abs(drawn.latents - wanted).max() <= 1e-4 * np.abs(wanted).max()


OPTIONS = {  # of the command line, and what the runtime's pipeline is given
    "sdxl-inpaint": (("--image", "--mask-image"), {"image": IMAGES[:1], "mask_image": MASKS[0]}),
    "instruct-pix2pix": (("--image", "--image-guidance=1.7"),
                         {"image": IMAGES[:1], "image_guidance_scale": 1.7}),
    "upscale": (("--image", "--noise-level=3"), {"image": IMAGES[:1], "noise_level": 3}),
    "depth2img": (("--depth-map", "--width=96"), {"depth_map": DEPTHS[0], "width": 96}),
}  # fmt: skip


@pytest.mark.parametrize("kind", marked(OPTIONS))
def test_the_command_line_takes_the_same_pictures(pipeline_bundle, blockcache, tmp_path, kind):
    bundle, (options, given) = pipeline_bundle(kind), OPTIONS[kind]
    Image.fromarray(IMAGES[0]).save(tmp_path / "image.png")
    Image.fromarray((MASKS[0] >= 0.5).astype(np.uint8) * 255).save(tmp_path / "mask-image.png")
    np.save(tmp_path / "depth-map.npy", DEPTHS[0])
    files = {f"--{path.stem}": f"--{path.stem}={path}" for path in tmp_path.iterdir()}
    named = [files.get(option, option) for option in options]
    out = tmp_path / "drawn.npy"
    code, _, err = blockcache("run", bundle.folder, "--prompt=abc", *named, f"--out={out}")
    assert code == 0, err
    with Pipeline.open(bundle, preset="ddim-4", threads=1) as pipeline:
        wanted = pipeline("abc", seeds=[0], **given).latents
    assert np.abs(np.load(out) - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_a_preset_is_measured_with_pictures_that_the_model_draws(
    pipeline_folder, blockcache, tmp_path
):
    (tmp_path / "prompts.txt").write_text("abc\nq\n")
    little = ["--prompts", tmp_path / "prompts.txt", "--profile-seeds", 1, "--json"]
    compiling = ["compile", pipeline_folder("sdxl-inpaint"), tmp_path / "bundle", *little]
    code, out, err = blockcache(*compiling, "--preset", "ddim:2:1000")
    assert code == 0, err
    assert list(json.loads(out)["presets"]) == ["ddim-2-d1000"]
    evaluations = 2 * 12 + 2 * 2  # two pictures in 12 steps, and the profile
    assert f"measured with {evaluations} evaluations" in err
    code, _, err = blockcache(*compiling, "--preset", "ddim:3:1000")
    assert code == 0, err
    assert "measured with 6 evaluations" in err, "the pictures are there"


@pytest.mark.parametrize(
    ("kind", "given", "error"),
    [
        ("instruct-pix2pix", {"image": IMAGES[:1], "noise_level": 3}, "noise_level: 'tiny-inst"),
        ("sdxl-inpaint", {"image": IMAGES[:1]},
         "mask_image: 'tiny-sdxl-inpaint' draws by it, got none"),
        ("sdxl-inpaint", {"image": IMAGES[:1], "mask_image": MASKS[0, :32]},
         r"mask_image: expected the image's size \[64, 96\], got \[32, 96\]"),
        ("sdxl-inpaint", {"image": IMAGES[:1], "mask_image": MASKS[0], "depth_map": DEPTHS[0]},
         "depth_map: 'tiny-sdxl-inpaint' reads no such picture"),
        ("instruct-pix2pix", {}, "image: 'tiny-instruct-pix2pix' draws by it, got none"),
        ("instruct-pix2pix", {"image": IMAGES[:1], "strength": 0.5}, "strength: nothing starts"),
    ],
)  # fmt: skip
def test_pictures_that_lack_or_do_not_belong_are_refused(pipeline_bundle, kind, given, error):
    with (
        Pipeline.open(pipeline_bundle(kind), preset="ddim-4", threads=1) as pipeline,
        pytest.raises(InputError, match=f"^{error}"),
    ):
        pipeline("abc", seeds=[0], **given)
