"""Folders and hub ids become source models; what cannot be loaded is refused by name."""

from __future__ import annotations

import builtins
import json
import shutil

import numpy as np
import pytest

from blockcache.runtime import ConfigError, MissingExtraError, UnsupportedModelError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from blockcache.export.unet import load as loading  # noqa: E402
from blockcache.export.unet.extra_inputs import ExtraInput  # noqa: E402
from blockcache.export.unet.load import load_model  # noqa: E402
from blockcache.export.unet.model import describe  # noqa: E402


@pytest.fixture(scope="module")
def saved(tiny_models, tmp_path_factory):
    """A pipeline folder with a U-Net, a scheduler and a tokenizer's length."""
    folder = tmp_path_factory.mktemp("source") / "my-model"
    tiny_models("sd").unet.save_pretrained(folder / "unet")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"beta_start": 0.00085}')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"model_max_length": 33}')
    return folder


def test_a_saved_folder_is_loaded_as_it_was(saved, tiny_models):
    made = load_model(saved)
    original = tiny_models("sd")
    assert (made.name, made.tokens, made.scheduler) == ("my-model", 33, {"beta_start": 0.00085})
    assert (made.blocks, made.conditions) == (original.blocks, original.conditions)
    for key, tensor in original.unet.state_dict().items():
        torch.testing.assert_close(made.unet.state_dict()[key], tensor, rtol=0, atol=0)
    assert not made.unet.training
    assert not any(tensor.requires_grad for tensor in made.unet.parameters())


def test_the_u_nets_own_folder_stands_for_its_pipeline(saved):
    made, given = load_model(saved / "unet"), load_model(saved)
    assert (made.name, made.scheduler, made.tokens) == (given.name, given.scheduler, 33)
    assert made.sha256 == given.sha256


def test_a_bare_u_net_is_enough(saved, tmp_path):
    bare = load_model(shutil.copytree(saved / "unet", tmp_path / "bare"))
    assert (bare.name, bare.scheduler, bare.tokens) == ("bare", {}, 77)


def test_the_dtype_of_the_weights_may_be_chosen(saved):
    assert load_model(saved, dtype="bfloat16").unet.dtype == torch.bfloat16


def test_a_folder_with_a_variant_only_is_loaded(tiny_models, tmp_path):
    unet = diffusers.UNet2DConditionModel.from_config(tiny_models("sd").unet.config).half()
    unet.save_pretrained(tmp_path / "unet", variant="fp16")
    assert [p.name for p in (tmp_path / "unet").glob("*.safetensors")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    made = load_model(tmp_path)
    assert made.unet.dtype == torch.float32
    weight = made.unet.conv_in.weight
    np.testing.assert_array_equal(weight.numpy(), unet.conv_in.weight.detach().float().numpy())


def test_the_hash_follows_the_weights_and_the_config(saved, tmp_path):
    first = load_model(saved).sha256
    assert load_model(saved).sha256 == first
    other = shutil.copytree(saved, tmp_path / "other")
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    assert load_model(other).sha256 != first


def refusal(kind, source):
    with pytest.raises(kind) as caught:
        load_model(source)
    return str(caught.value)


def test_a_folder_without_a_u_net_is_refused(tmp_path):
    assert refusal(ConfigError, tmp_path) == (
        f"Expected a diffusers folder with unet/config.json at {tmp_path}; it has none. "
        f"Give the folder that save_pretrained wrote."
    )


def test_weights_that_are_no_safetensors_are_refused(saved, tmp_path):
    """A pickle beside the config is never opened."""
    folder = tmp_path / "unet"
    folder.mkdir()
    shutil.copy(saved / "unet" / "config.json", folder)
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04not opened")
    assert refusal(ConfigError, tmp_path).startswith(
        f"Expected safetensors in {folder}, found the pickle diffusion_pytorch_model.bin. "
    )


def test_a_folder_with_a_single_file_checkpoint_says_how_to_convert_it(tmp_path):
    (tmp_path / "dream.safetensors").write_bytes(b"")
    text = refusal(ConfigError, tmp_path)
    assert f"got the single-file checkpoint {tmp_path}/dream.safetensors. Convert it" in text


@pytest.mark.parametrize(
    "file", ["unet/config.json", "scheduler/scheduler_config.json",
             "tokenizer/tokenizer_config.json"],
)  # fmt: skip
def test_a_broken_config_is_named(saved, tmp_path, file):
    folder = shutil.copytree(saved, tmp_path / "broken")
    (folder / file).write_text('{"half": ')
    text = refusal(ConfigError, folder)
    assert text.startswith(f"Expected JSON in {folder / file}, got: Expecting value: line 1")
    assert text.endswith("Fetch the file again.")
    (folder / file).write_text("[1]")
    assert f"Expected a JSON object in {folder / file}, got list." in refusal(ConfigError, folder)
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    assert refusal(ConfigError, folder).endswith("run 'git lfs pull' in the folder.")


def test_other_variants_do_not_count_in_the_hash(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "more")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.ema.safetensors"))
    assert load_model(folder).sha256 == load_model(saved).sha256
    assert load_model(folder, variant="ema").sha256 != load_model(saved).sha256


def test_an_unsupported_folder_is_refused_before_its_weights_are_read(saved, tmp_path):
    config = json.loads((saved / "unet" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention_type": "gated"}))
    assert "GLIGEN" in refusal(UnsupportedModelError, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "in_channels": 6}))
    assert "6 input channels for 4" in refusal(UnsupportedModelError, tmp_path)


@pytest.mark.parametrize(
    ("kind", "given", "names"),
    [
        ("StableDiffusionXLInpaintPipeline", None, ["mask", "masked_image_latents"]),
        (None, None, ["mask", "masked_image_latents"]),
        (
            "PaintByExamplePipeline",
            "masked_image_latents:4,mask:1",
            ["masked_image_latents", "mask"],
        ),
    ],
)
def test_a_folder_says_what_its_extra_channels_hold(tiny_models, tmp_path, kind, given, names):
    tiny_models("inpaint").unet.save_pretrained(tmp_path / "unet")
    if kind is not None:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    model = load_model(tmp_path, extra_inputs=given)
    assert [c.name for c in model.conditions if c.beside_sample] == names
    assert model.channels == 4


def test_the_names_of_extra_inputs_are_part_of_the_models_key(tiny_models):
    unet = tiny_models("inpaint").unet
    other = describe(unet, name="other", extra_inputs=[ExtraInput("five", 5)])
    assert other.sha256 != describe(unet, name="same").sha256 == tiny_models("inpaint").sha256


def test_missing_diffusers_is_named_with_the_pip_command(saved, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "diffusers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    text = refusal(MissingExtraError, saved)
    assert text == (
        "Loading a U-Net needs the package diffusers, which is not installed. "
        "Install it with: pip install 'blockcache[export]'"
    )


def test_the_prompt_length_falls_back_to_clips(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    endless = {"model_max_length": 10**30}  # what a tokenizer without a limit writes
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(endless))
    assert loading._tokens(tmp_path) == loading.DEFAULT_TOKENS == 77
