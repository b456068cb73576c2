"""Which ControlNets fit a U-Net, what they add to a model, and how strongly they act."""

from __future__ import annotations

import pytest

from blockcache.runtime import ConfigError, UnsupportedModelError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from blockcache.export.unet.control import check_controlnet, control_factor  # noqa: E402
from blockcache.export.unet.load import load_model  # noqa: E402

UNET = {
    "out_channels": 4,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
}
NET = {**UNET, "_class_name": "ControlNetModel", "in_channels": 4, "block_out_channels": (32, 64)}


def test_a_controlnet_of_the_u_nets_own_widths_fits():
    check_controlnet(NET, UNET)


@pytest.mark.parametrize(
    "kind", ["ControlNetXSAdapter", "ControlNetUnionModel", "T2IAdapter", "MultiAdapter"]
)
def test_other_classes_are_refused_by_name(kind):
    with pytest.raises(UnsupportedModelError, match=f"Expected a ControlNetModel, got {kind}"):
        check_controlnet({**NET, "_class_name": kind}, UNET)


@pytest.mark.parametrize(
    ("name", "value"),
    [("global_pool_conditions", True), ("encoder_hid_dim_type", "text_image_proj")],
)
def test_features_are_refused_by_name(name, value):
    with pytest.raises(UnsupportedModelError, match=rf"This ControlNet uses .* \({name}\)"):
        check_controlnet({**NET, name: value}, UNET)


@pytest.mark.parametrize(
    ("name", "value", "mine"),
    [
        ("in_channels", 9, "4"),
        ("block_out_channels", [32, 96], r"\[32, 64\]"),
        ("layers_per_block", 2, "1"),
        ("cross_attention_dim", 48, "32"),
        ("addition_embed_type", "text_time", "None"),
    ],
)
def test_a_controlnet_of_another_u_net_is_refused(name, value, mine):
    with pytest.raises(ConfigError, match=f"this U-Net, whose {name} is {mine}; got one with"):
        check_controlnet({**NET, name: value}, UNET)


def test_a_factor_is_the_scale_between_its_timesteps_and_0_outside():
    scale = torch.tensor([[0.5, 800.0, 200.0]]).repeat(5, 1)
    timestep = torch.tensor([801.0, 800.0, 500.0, 200.0, 199.0])
    factor = control_factor(scale, timestep)
    assert factor.shape == (5, 1, 1, 1)
    assert factor.flatten().tolist() == [0, 0.5, 0.5, 0.5, 0]


def test_blocks_and_conditions_of_controlnets_stand_beside_the_u_nets(tiny_models):
    plain, model = tiny_models("sdxl-small"), tiny_models("sdxl-controlled")
    own = [block for block in model.blocks if not block.path.startswith("controlnet.")]
    theirs = [block for block in model.blocks if block.path.startswith("controlnet.1.")]
    assert tuple(own) == plain.blocks
    named = {block.path.removeprefix("controlnet.1."): block.depth for block in theirs}
    assert named == {b.path: b.depth for b in own if not b.path.startswith("up_blocks")}
    assert model.conditions[: len(plain.conditions)] == plain.conditions
    assert [(c.name, c.shape, c.dtype) for c in model.conditions[len(plain.conditions) :]] == [
        ("control_image", ("batch", 3, "4*height", "4*width"), "model"),
        ("control_scale", ("batch", 3), "float32"),
        ("control_image_2", ("batch", 3, "4*height", "4*width"), "model"),
        ("control_scale_2", ("batch", 3), "float32"),
    ]
    assert model.sha256 != plain.sha256


@pytest.fixture(scope="module")
def saved(tiny_models, tmp_path_factory):
    """The folders of a U-Net and of its ControlNet."""
    folder, model = tmp_path_factory.mktemp("control"), tiny_models("controlled")
    model.unet.save_pretrained(folder / "unet")
    model.controlnets[0].save_pretrained(folder / "control")
    return folder / "unet", folder / "control"


def test_controlnets_are_loaded_with_the_u_net(saved, tiny_models):
    unet, control = saved
    model, original = load_model(unet, controlnets=[control]), tiny_models("controlled")
    assert (model.blocks, model.conditions) == (original.blocks, original.conditions)
    for key, tensor in original.controlnets[0].state_dict().items():
        torch.testing.assert_close(model.controlnets[0].state_dict()[key], tensor, rtol=0, atol=0)
    both = load_model(unet, controlnets=[control, control], dtype="bfloat16")
    assert [net.dtype for net in both.controlnets] == [torch.bfloat16] * 2
    assert len({load_model(unet).sha256, model.sha256, both.sha256}) == 3


def test_what_is_no_controlnet_is_refused(saved, tmp_path):
    unet, _ = saved
    with pytest.raises(UnsupportedModelError, match="got UNet2DConditionModel"):
        load_model(unet, controlnets=[unet])
    with pytest.raises(ConfigError, match=r"Expected a ControlNet's folder with config\.json at"):
        load_model(unet, controlnets=[tmp_path])
