"""Weights are chosen by name, found whole before they are loaded, and loaded completely."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockcache.runtime import ConfigError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from safetensors.torch import load_file, save_file  # noqa: E402

from blockcache.export.unet.weights import (  # noqa: E402
    PREFERRED,
    check_weights,
    choose,
    load_part,
)

STEM = "diffusion_pytorch_model"
ONE = f"{STEM}.safetensors"


# -- which files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "variant", "files", "index"),
    [
        ([ONE, f"{STEM}.fp16.safetensors"], None, (ONE,), None),
        ([f"{STEM}.fp16.safetensors"], "fp16", (f"{STEM}.fp16.safetensors",), None),
        (["model.fp16.safetensors"], "fp16", ("model.fp16.safetensors",), None),
        (  # "ema" stands before "fp16" in the alphabet
            [f"{STEM}.ema.safetensors", f"{STEM}.fp16.safetensors"],
            "fp16",
            (f"{STEM}.fp16.safetensors",),
            None,
        ),
        (
            [f"{STEM}-00001-of-00002.safetensors", f"{STEM}-00002-of-00002.safetensors",
             f"{STEM}.safetensors.index.json"],
            None,
            (f"{STEM}-00001-of-00002.safetensors", f"{STEM}-00002-of-00002.safetensors"),
            f"{STEM}.safetensors.index.json",
        ),
        (
            [f"{STEM}.fp16-00001-of-00001.safetensors", f"{STEM}.safetensors.index.fp16.json"],
            "fp16",
            (f"{STEM}.fp16-00001-of-00001.safetensors",),
            f"{STEM}.safetensors.index.fp16.json",
        ),
        (  # as older versions named them
            [f"{STEM}-00001-of-00001.fp16.safetensors", f"{STEM}.safetensors.index.fp16.json"],
            "fp16",
            (f"{STEM}-00001-of-00001.fp16.safetensors",),
            f"{STEM}.safetensors.index.fp16.json",
        ),
    ],
)  # fmt: skip
def test_one_variant_is_chosen_by_name(names, variant, files, index):
    chosen = choose([*names, "config.json", f"{STEM}.bin"], "here")
    assert (chosen.variant, chosen.files, chosen.index) == (variant, files, index)


VARIANTS = ("", "fp16", "bf16", "fp32", "ema", "non_ema")


def file_of(variant):
    return f"{STEM}.{variant}.safetensors" if variant else ONE


@settings(deadline=None)
@given(st.sets(st.sampled_from(VARIANTS), min_size=1))
def test_the_first_preferred_variant_is_taken_and_no_other(held):
    names = [file_of(variant) for variant in held]
    preferred = [variant for variant in PREFERRED if variant in held]
    if preferred:
        assert choose(names, "here").files == (file_of(preferred[0]),)
    else:
        with pytest.raises(ConfigError, match="Choose one by name"):
            choose(names, "here")
    for variant in held - {""}:
        assert choose(names, "here", variant).files == (file_of(variant),)


def refused(names, variant=None):
    with pytest.raises(ConfigError) as caught:
        choose(names, "here", variant)
    return str(caught.value)


def test_what_cannot_be_chosen_is_refused():
    assert refused(["config.json"]) == (
        "Expected diffusion_pytorch_model*.safetensors or model*.safetensors in here, found none. "
        "Give a folder that save_pretrained wrote."
    )
    assert refused(["README.md", "dream.safetensors"]) == (
        "Expected diffusion_pytorch_model*.safetensors or model*.safetensors in here, found the "
        "single-file checkpoint dream.safetensors. Convert it once, in Python: "
        "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER); for an XL model "
        "with StableDiffusionXLPipeline. Then give the folder."
    )
    assert refused([f"{STEM}.bin"]) == (
        "Expected safetensors in here, found the pickle diffusion_pytorch_model.bin. blockcache "
        "does not open pickles, which can run code. Where you trust it, convert it once, in "
        "Python: DiffusionPipeline.from_pretrained(SOURCE, use_safetensors=False)"
        ".save_pretrained(FOLDER)."
    )
    assert refused([file_of("ema"), file_of("non_ema")]) == (
        "Expected weights without a variant, or of fp16, bf16 or fp32, in here, found ema, "
        "non_ema. Choose one by name: --variant, or load_model(..., variant=...)."
    )
    assert refused([ONE], "ema").startswith(
        "Expected weights of ema in here, found some without a variant. Choose one by name"
    )
    assert refused([f"{STEM}-00001-of-00002.safetensors"]) == (
        "Expected shards and their index (*.safetensors.index.json) in here, found "
        "diffusion_pytorch_model-00001-of-00002.safetensors only. Fetch the folder again."
    )


# -- whether they are whole ------------------------------------------------------------------------


@pytest.fixture
def part(tiny_models, tmp_path):
    tiny_models("sd").unet.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def shards(tiny_models, tmp_path):
    tiny_models("sd").unet.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    return tmp_path


def fault(folder):
    with pytest.raises(ConfigError) as caught:
        load_part(diffusers.UNet2DConditionModel, folder)
    return str(caught.value)


def test_a_whole_file_and_whole_shards_pass(part, shards):
    """In one folder here: where both are, a loader may take either, so both are checked."""
    assert part == shards
    chosen = check_weights(part)
    assert (chosen.index, ONE in chosen.files) == (f"{STEM}.safetensors.index.json", True)
    (part / ONE).unlink()
    assert len(check_weights(shards).files) == len(chosen.files) - 1 > 1


def test_a_missing_shard_is_named(shards):
    gone = sorted(shards.glob("*.safetensors"))[1]
    gone.unlink()
    assert fault(shards).startswith(f"Expected {gone.name} in {shards}, found none: a shard, or")


def test_a_link_to_nothing_is_named(part):
    """A snapshot of the hub is links; their files may have been cleared away."""
    (part / ONE).unlink()
    (part / ONE).symlink_to(part / "blobs" / "gone")
    assert fault(part).startswith(f"Expected {ONE} in {part}, found none: a shard, or the file")


def test_a_shard_that_lacks_what_its_index_names_is_refused(shards):
    """diffusers believes the index, and would leave the tensor as it happens to be."""
    file = sorted(shards.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, file)
    assert f"Expected the tensor {name!r} in {file}, as {STEM}.safetensors.index" in fault(shards)


@pytest.mark.parametrize(
    "content", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": "../b"}}]
)
def test_an_index_that_is_none_is_refused(shards, content):
    index = shards / f"{STEM}.safetensors.index.json"
    index.write_text(json.dumps(content))
    assert fault(shards) == (
        f"Expected a weight_map of tensors to the files beside it in {index}, got something else. "
        f"Fetch the folder again."
    )


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_file_is_named(part, length):
    content = (part / ONE).read_bytes()
    (part / ONE).write_bytes(content[:length])
    text = fault(part)
    assert text.startswith(f"Expected a whole safetensors file at {part / ONE}, got one that")
    assert text.endswith("It is truncated or damaged: fetch it again.")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3438167536\n"


def test_a_pointer_of_git_lfs_is_named(part):
    (part / ONE).write_text(POINTER)
    assert fault(part).endswith(
        "It is a git-lfs pointer, not the file itself: run 'git lfs pull' in the folder."
    )


def change(part, made):
    tensors = load_file(part / ONE)
    made(tensors)
    save_file(tensors, part / ONE)


def test_a_lora_that_is_not_merged_is_refused(part):
    name = "mid_block.attentions.0.proj_in"

    def wrap(tensors):
        tensors[f"{name}.base_layer.weight"] = tensors.pop(f"{name}.weight")
        tensors[f"{name}.lora_A.default.weight"] = torch.zeros(1)

    change(part, wrap)
    text = fault(part)
    assert f"got those of a LoRA that is not merged (such as '{name}.base_layer.weight')" in text
    assert "pipeline.fuse_lora(); pipeline.unload_lora_weights()" in text


def test_quantized_weights_are_refused(part):
    change(part, lambda t: t.update({"conv_in.weight": torch.zeros(1, dtype=torch.int8)}))
    assert "got 'conv_in.weight' in I8. Quantized models are not supported" in fault(part)


# -- whether they are all --------------------------------------------------------------------------


@pytest.fixture(params=["with accelerate", "without accelerate"])
def accelerate(request, monkeypatch):
    """diffusers loads in two ways; without accelerate, tensors would hold whatever memory held."""
    from diffusers.models import modeling_utils

    there = request.param == "with accelerate"
    if there:
        pytest.importorskip("accelerate")
    monkeypatch.setattr(modeling_utils, "_LOW_CPU_MEM_USAGE_DEFAULT", there)
    monkeypatch.setattr(modeling_utils, "is_accelerate_available", lambda: there)


@pytest.mark.usefixtures("accelerate")
def test_missing_unknown_and_reshaped_tensors_are_named(part):
    whole = (part / ONE).read_bytes()
    described = (
        f"Expected the weights of the UNet2DConditionModel that {part}/config.json describes, got "
        f"some "
    )
    change(part, lambda t: t.pop("conv_in.weight"))
    assert fault(part).startswith(f"{described}without 'conv_in.weight'. Config and weights")

    (part / ONE).write_bytes(whole)
    change(part, lambda t: [t.pop(name) for name in sorted(t)[:5]])
    assert " and 2 more. Config" in fault(part)

    (part / ONE).write_bytes(whole)
    change(part, lambda t: t.update({"extra.weight": torch.zeros(1)}))
    assert fault(part).startswith(f"{described}with 'extra.weight', which it does not have.")

    (part / ONE).write_bytes(whole)
    change(part, lambda t: t.update({"conv_in.weight": torch.zeros(3, 2)}))
    assert fault(part).startswith(
        f"{described}with 'conv_in.weight' of shape [3, 2] where it has [32, 4, 3, 3]."
    )


@pytest.mark.usefixtures("accelerate")
def test_a_whole_part_is_loaded_as_saved(part, tiny_models):
    made = load_part(diffusers.UNet2DConditionModel, part, torch.float32)
    for name, tensor in tiny_models("sd").unet.state_dict().items():
        np.testing.assert_array_equal(made.state_dict()[name].numpy(), tensor.numpy())


def test_tensors_to_spare_pass_where_they_may(part):
    change(part, lambda t: t.update({"extra.weight": torch.zeros(1)}))
    load_part(diffusers.UNet2DConditionModel, part, spare=True)


def test_a_config_that_the_class_does_not_take_is_refused(part):
    config = json.loads((part / "config.json").read_text())
    (part / "config.json").write_text(json.dumps({**config, "down_block_types": ["Foreign"]}))
    text = fault(part)
    assert text.startswith(f"Expected a UNet2DConditionModel in {part}, got one that does not load")
    assert text.endswith("Check its config.json.")


@pytest.mark.parametrize("kind", ["fp16", "ema"])
def test_a_variant_may_be_asked_for(part, kind, tiny_models):
    other = diffusers.UNet2DConditionModel.from_config(tiny_models("sd").unet.config)
    other.save_pretrained(part / "other", variant=kind)
    shutil.move(part / "other" / file_of(kind), part)
    made = load_part(diffusers.UNet2DConditionModel, part, variant=kind)
    np.testing.assert_array_equal(
        made.conv_in.weight.detach().numpy(), other.conv_in.weight.detach().numpy()
    )
