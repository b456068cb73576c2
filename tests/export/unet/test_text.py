"""What a prompt becomes equals what the model's own diffusers pipeline feeds its U-Net."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from blockcache.runtime import ConfigError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
from blockcache.export.unet.load import load_model  # noqa: E402
from blockcache.export.unet.text import encode_text  # noqa: E402

PROMPTS = ["a cat", "a dog", "cat"]


def fed(folder, prompts, size=None):
    """What the whole pipeline, its weights loaded, gives its U-Net at the first call."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    calls = []
    pipeline.unet.register_forward_pre_hook(
        lambda module, args, named: calls.append(named), with_kwargs=True
    )
    request = {"prompt": prompts, "num_inference_steps": 4, "output_type": "latent"}
    if isinstance(pipeline, diffusers.StableDiffusionXLImg2ImgPipeline):
        height, width = size or (16, 16)
        request["image"] = torch.zeros(len(prompts), 3, height * 4, width * 4)
    elif size is not None:
        request |= {"height": size[0] * 4, "width": size[1] * 4}
    pipeline(**request)
    given = calls[0]
    return {
        "encoder_hidden_states": given["encoder_hidden_states"],
        **(given.get("added_cond_kwargs") or {}),
    }


@pytest.mark.parametrize("size", [None, (8, 24)])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sdxl-encodes-empty", "refiner"])
def test_conditions_equal_the_pipelines_own(pipeline_folder, kind, size):
    folder = pipeline_folder(kind)
    wanted = fed(folder, PROMPTS, size)
    positive, negative = encode_text(folder, PROMPTS, size)
    assert positive.keys() == negative.keys() == wanted.keys()
    for name, values in wanted.items():
        unconditional, conditional = values.numpy()[:3], values.numpy()[3:]
        np.testing.assert_array_equal(positive[name], conditional, err_msg=name)
        repeated = np.repeat(negative[name], 3, axis=0)
        np.testing.assert_array_equal(repeated, unconditional, err_msg=name)
        assert positive[name].dtype == np.float32


@pytest.mark.parametrize(("kind", "plain"), [("sdxl-inpaint", "sdxl"), ("depth2img", "sd")])
def test_a_pipeline_that_takes_pictures_does_the_same_with_prompts(pipeline_folder, kind, plain):
    """All tiny text encoders are alike."""
    ours, wanted = (encode_text(pipeline_folder(each), PROMPTS) for each in (kind, plain))
    for side, other in zip(ours, wanted, strict=True):
        assert side.keys() == other.keys()
        for name, values in side.items():
            np.testing.assert_array_equal(values, other[name], err_msg=name)


def test_sdxl_has_zeros_for_the_empty_prompt_and_the_picture_s_size(pipeline_folder):
    """The cases that were wrong once, by their values."""
    _, negative = encode_text(pipeline_folder("sdxl"), PROMPTS)
    assert not negative["encoder_hidden_states"].any()
    assert not negative["text_embeds"].any()
    np.testing.assert_array_equal(negative["time_ids"], [[64, 64, 0, 0, 64, 64]])
    _, encoded = encode_text(pipeline_folder("sdxl-encodes-empty"), PROMPTS)
    assert encoded["encoder_hidden_states"].any()
    positive, negative = encode_text(pipeline_folder("refiner"), PROMPTS[:1])
    np.testing.assert_array_equal(positive["time_ids"], [[64, 64, 0, 0, 6]])
    np.testing.assert_array_equal(negative["time_ids"], [[64, 64, 0, 0, 2.5]])


@pytest.mark.parametrize("kind", ["sd", "sdxl", "refiner"])
def test_conditions_fit_the_model_that_is_loaded(pipeline_folder, kind):
    model = load_model(pipeline_folder(kind))
    positive, _ = encode_text(pipeline_folder(kind), PROMPTS)
    axes = {"batch": 3, "tokens": model.tokens}
    wanted = {c.name: tuple(axes.get(s, s) for s in c.shape) for c in model.conditions}
    assert {name: values.shape for name, values in positive.items()} == wanted


def test_no_weights_but_those_of_the_text_encoders_are_read(pipeline_folder, tmp_path):
    folder = shutil.copytree(pipeline_folder("sdxl"), tmp_path / "light")
    wanted, _ = encode_text(folder, PROMPTS[:1])
    for part in ("unet", "vae"):
        (folder / part / "diffusion_pytorch_model.safetensors").unlink()
    positive, _ = encode_text(folder, PROMPTS[:1])
    np.testing.assert_array_equal(
        positive["encoder_hidden_states"], wanted["encoder_hidden_states"]
    )


def test_text_encoders_of_a_variant_are_read(pipeline_folder, tmp_path):
    folder = shutil.copytree(pipeline_folder("sd"), tmp_path / "half")
    encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    (folder / "text_encoder" / "model.safetensors").unlink()
    encoder.half().save_pretrained(folder / "text_encoder", variant="fp16")
    positive, _ = encode_text(folder, PROMPTS)
    wanted, _ = encode_text(pipeline_folder("sd"), PROMPTS)
    states = "encoder_hidden_states"
    # Half precision has 11 bits: two layers and norms stay within a few of its roundings.
    np.testing.assert_allclose(positive[states], wanted[states], atol=0.01)
    assert not np.array_equal(positive[states], wanted[states])


def refusal(folder):
    with pytest.raises(ConfigError) as caught:
        encode_text(folder, ["a"])
    return str(caught.value)


def test_a_pickled_text_encoder_is_refused_by_name(pipeline_folder, tmp_path):
    folder = shutil.copytree(pipeline_folder("sd"), tmp_path / "pickled")
    weights = folder / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    assert f"in {folder}/text_encoder, found the pickle pytorch_model.bin." in refusal(folder)


def test_what_is_no_pipeline_is_refused(pipeline_folder, tmp_path):
    assert refusal(tmp_path) == (
        f"Expected text_encoder/ in {tmp_path}: the profile needs prompts. Give a pipeline folder, "
        f"or --calibration FILE with encoded prompts."
    )
    folder = shutil.copytree(pipeline_folder("sd"), tmp_path / "foreign")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "MyPipeline"}))
    assert refusal(folder).startswith(
        f"Expected the name of a class of diffusers in {folder}/model_index.json, got 'MyPipeline'."
    )
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "tokenizer")
    assert refusal(folder).startswith(f"Expected the files of a tokenizer in {folder}/tokenizer, f")
    shutil.rmtree(folder / "scheduler")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{")
    assert refusal(folder).startswith(f"Expected a pipeline with text encoders at {folder}, got: ")


def test_a_pipeline_that_needs_more_than_prompts_is_refused(pipeline_folder, tmp_path):
    folder = shutil.copytree(pipeline_folder("sd"), tmp_path / "larger")
    index = json.loads((folder / "model_index.json").read_text())
    other = {**index, "_class_name": "StableDiffusionLatentUpscalePipeline"}
    (folder / "model_index.json").write_text(json.dumps(other))
    text = refusal(folder)
    assert text.startswith(f"Expected a pipeline that draws from prompts alone at {folder}, got a")
    assert "StableDiffusionLatentUpscalePipeline that says: " in text
