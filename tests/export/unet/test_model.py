"""The source model: its blocks in order, its inputs, and what is refused by name."""

from __future__ import annotations

import pytest

from blockcache.runtime import UnsupportedModelError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from blockcache.export.unet.model import check_supported, describe  # noqa: E402

PLAIN = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 32}

REFUSED = {
    "IP-adapter or image projection (encoder_hid_dim_type)": {
        "encoder_hid_dim_type": "ip_image_proj"
    },
    "added conditions of type 'image'": {"addition_embed_type": "image"},
    "added conditions of type 'image_hint'": {"addition_embed_type": "image_hint"},
    "GLIGEN gated attention (attention_type)": {"attention_type": "gated"},
    "guidance embedding (time_cond_proj_dim)": {"time_cond_proj_dim": 256},
    "dual cross attention": {"dual_cross_attention": True},
    "class embedding concatenated to the time embedding": {"class_embeddings_concat": True},
}


@pytest.mark.parametrize(("feature", "config"), REFUSED.items(), ids=REFUSED.keys())
def test_an_unsupported_feature_is_refused_by_name(feature, config):
    with pytest.raises(UnsupportedModelError) as caught:
        check_supported({**PLAIN, **config})
    text = str(caught.value)
    assert text.startswith(f"This U-Net uses {feature}, which blockcache does not support.")
    assert "ControlNet residuals and adapters cannot be exported either." in text


@pytest.mark.parametrize(
    "config",
    [{}, {"addition_embed_type": "text_time"}, {"attention_type": "default"},
     {"encoder_hid_dim_type": "text_proj"}, {"num_class_embeds": 10},
     {"dual_cross_attention": False}],
)  # fmt: skip
def test_supported_features_pass(config):
    check_supported({**PLAIN, **config})


def test_a_u_net_in_memory_is_checked_too(tiny_models):
    unet = tiny_models("sd").unet

    class UNet2DConditionModel:
        def __init__(self):
            self.config = {**unet.config, "attention_type": "gated"}

    gated = UNet2DConditionModel()
    with pytest.raises(UnsupportedModelError, match="GLIGEN"):
        describe(gated, name="gated")


@pytest.mark.parametrize(
    "kind",
    ["UNet3DConditionModel", "UNetMotionModel", "UNet2DModel", "AudioLDM2UNet2DConditionModel",
     "ControlNetModel", "MyUNet2DConditionModel"],
)  # fmt: skip
def test_another_class_is_refused_by_name(kind):
    with pytest.raises(UnsupportedModelError) as caught:
        check_supported({**PLAIN, "_class_name": kind})
    assert str(caught.value).startswith(f"Expected a UNet2DConditionModel, got {kind}, which")


def test_a_derived_class_is_refused_in_memory(tiny_models):
    """It may compute something else in its forward, which the export would take as it is."""

    class Derived(diffusers.UNet2DConditionModel):
        pass

    with pytest.raises(UnsupportedModelError, match="got Derived, which"):
        describe(Derived(**tiny_models("sd").unet.config), name="derived")


def test_a_u_net_without_transformers_has_nothing_to_cache():
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), mid_block_type=None, up_block_types=("UpBlock2D",),
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError) as caught:
        describe(unet, name="bare")
    assert "bare has none, so there is nothing to cache" in str(caught.value)


def test_blocks_stand_in_execution_order(tiny_models):
    model = tiny_models("sd")
    assert [block.path for block in model.blocks] == [
        "down_blocks.0.attentions.0",
        "down_blocks.1.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
        "up_blocks.2.attentions.0",
        "up_blocks.2.attentions.1",
    ]
    assert [block.channels for block in model.blocks] == [32, 64, 64, 64, 64, 32, 32]


def test_blocks_are_called_in_the_order_they_are_listed(tiny_models, conditions_of):
    model = tiny_models("two-layers")
    called = []
    hooks = [
        model.unet.get_submodule(block.path).register_forward_hook(
            lambda *_, path=block.path: called.append(path)
        )
        for block in model.blocks
    ]
    prompt = torch.from_numpy(conditions_of(model, 1)["encoder_hidden_states"])
    with torch.no_grad():
        model.unet(torch.zeros(1, 4, 8, 8), torch.zeros(1), encoder_hidden_states=prompt)
    for hook in hooks:
        hook.remove()
    assert called == [block.path for block in model.blocks]


def test_conditions_are_read_from_the_config(tiny_models):
    def conditions(kind):
        return {c.name: (c.shape, c.dtype) for c in tiny_models(kind).conditions}

    text = (("batch", "tokens", 32), "model")
    assert conditions("sd") == {"encoder_hidden_states": text}
    assert conditions("sdxl") == {
        "encoder_hidden_states": text,
        "text_embeds": (("batch", 16), "model"),
        "time_ids": (("batch", 6), "model"),
    }
    assert conditions("refiner") == {
        "encoder_hidden_states": text,
        "text_embeds": (("batch", 32), "model"),
        "time_ids": (("batch", 5), "model"),
    }
    assert conditions("pooled-prompt") == {"encoder_hidden_states": text}
    assert conditions("class-conditioned") == {
        "encoder_hidden_states": text,
        "class_labels": (("batch",), "int64"),
    }


@pytest.mark.parametrize(("pooled", "ids"), [(16, 6), (24, 5), (None, 6)])
def test_the_text_encoders_width_tells_the_number_of_time_ids(tiny_models, pooled, ids):
    """The U-Net's config holds one number for both: 64 = 16 + 6 * 8 = 24 + 5 * 8."""
    made = describe(tiny_models("sdxl").unet, name="sdxl", pooled=pooled)
    assert {c.name: c.shape for c in made.conditions}["time_ids"] == ("batch", ids)


@pytest.mark.parametrize(("pooled", "both", "wanted"), [(20, 64, 20), (None, 40, -8)])
def test_added_conditions_that_do_not_add_up_are_refused(tiny_models, pooled, both, wanted):
    config = {**tiny_models("sdxl").unet.config, "projection_class_embeddings_input_dim": both}
    unet = diffusers.UNet2DConditionModel.from_config(config)
    with pytest.raises(UnsupportedModelError) as caught:
        describe(unet, name="sdxl", pooled=pooled)
    assert str(caught.value).startswith(
        f"Expected added conditions of 5 or 6 time_ids, 8 numbers each, and text_embeds of "
        f"{wanted}; got {both} numbers in all"
    )


def test_sizes_are_read_from_the_config(tiny_models):
    assert (tiny_models("sd").downsampling, tiny_models("sd").sample_size) == (4, (16, 16))
    assert tiny_models("two-layers").downsampling == 2
