"""Latents become the pictures that the model's own pipeline makes of them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from blockcache.runtime import ConfigError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from blockcache.export.parts.decode import decode_latents  # noqa: E402


def latents():
    return np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)


@pytest.mark.parametrize(
    "options", [{}, {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 2.0, 0.5, 1.0]}]
)
def test_pictures_equal_the_pipelines_own(pipeline_folder, tmp_path, options):
    """SDXL's, after one step whose latents a callback keeps."""
    folder = shutil.copytree(pipeline_folder("sdxl"), tmp_path / "model")
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps({**config, **options}))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    last = {}

    def keep(pipe, step, timestep, tensors):
        last["latents"] = tensors["latents"]
        return tensors

    images = pipeline(
        "a cat", height=32, width=32, num_inference_steps=1, output_type="np",
        latents=torch.from_numpy(latents()[:1]), callback_on_step_end=keep,
    ).images  # fmt: skip
    ours = decode_latents(folder, last["latents"].numpy())
    np.testing.assert_array_equal(ours, (images * 255).round().astype(np.uint8))


def test_a_vae_of_a_variant_is_read(pipeline_folder, tmp_path):
    folder = shutil.copytree(pipeline_folder("sd"), tmp_path / "half")
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    vae.half().save_pretrained(folder / "vae", variant="fp16")
    ours = decode_latents(folder, latents())
    assert ours.shape == (2, 32, 32, 3)
    assert ours.dtype == np.uint8
    wanted = decode_latents(pipeline_folder("sd"), latents())
    assert np.abs(ours.astype(int) - wanted).max() <= 2


def test_a_folder_without_vae_and_a_pickled_vae_are_refused(pipeline_folder, tmp_path):
    with pytest.raises(ConfigError) as caught:
        decode_latents(tmp_path, latents())
    assert str(caught.value) == (
        f"Expected a VAE in {tmp_path}/vae, found none. Save latents instead: --out FILE.npy."
    )
    folder = shutil.copytree(pipeline_folder("sd"), tmp_path / "pickled")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ConfigError, match=r"found the pickle diffusion_pytorch_model\.bin\."):
        decode_latents(folder, latents())
