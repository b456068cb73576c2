"""A folder that diffusers saved is compiled, and draws what its own pipeline draws."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

from blockcache.export.choose.preset import PresetOptions  # noqa: E402
from blockcache.export.pipeline import CompileOptions, compile_model  # noqa: E402
from blockcache.export.unet.load import load_model  # noqa: E402
from blockcache.export.unet.text import encode_text  # noqa: E402
from blockcache.runtime import Session  # noqa: E402

STEPS, GUIDANCE = 4, 4.0


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_latents_equal_the_pipelines_own(pipeline_folder, tmp_path, kind):
    """Prompts, sizes, guidance and solver together, at a size that is not the model's own."""
    folder, prompts, size = pipeline_folder(kind), ["a cat", "a dog"], (8, 24)
    presets = (PresetOptions.parse(f"ddim:{STEPS}"),)
    options = CompileOptions(presets=presets)
    session = Session.open(compile_model(load_model(folder), tmp_path / "bundle", options).bundle)
    noise = session.noise([0, 1], *size)
    positive, negative = encode_text(folder, prompts, size)
    ours = session.denoise(
        noise,
        positive.pop("encoder_hidden_states"),
        negative.pop("encoder_hidden_states"),
        conditions=positive,
        negative_conditions=negative,
        guidance_scale=GUIDANCE,
    ).latents
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    scale = pipeline.vae_scale_factor
    wanted = pipeline(
        prompts, height=size[0] * scale, width=size[1] * scale, num_inference_steps=STEPS,
        guidance_scale=GUIDANCE, latents=torch.from_numpy(noise), output_type="latent",
    ).images.numpy()  # fmt: skip
    assert np.abs(ours - wanted).max() <= 1e-4 * np.abs(wanted).max()
