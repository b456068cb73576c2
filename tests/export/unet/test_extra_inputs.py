"""What a U-Net reads beside the sample: by the pipeline's class, by channels, or as it is told."""

from __future__ import annotations

import pytest

from blockcache.runtime import ConfigError, UnsupportedModelError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from blockcache.export.unet.extra_inputs import KINDS, find_extra_inputs  # noqa: E402


def config(channels, own=4):
    return {"in_channels": channels, "out_channels": own}


@pytest.mark.parametrize(
    ("channels", "kind"),
    [(9, "inpaint"), (8, "instruct-pix2pix"), (5, "depth2img"), (7, "upscale")],
)
def test_channels_say_it_where_there_is_no_pipeline(channels, kind):
    assert find_extra_inputs(config(channels)) == KINDS[kind]
    assert find_extra_inputs(config(channels), wanted=kind) == KINDS[kind]


def test_a_u_net_without_more_channels_reads_nothing_else():
    """Inpainting pipelines run plain U-Nets, too."""
    assert find_extra_inputs({}) == ()
    assert find_extra_inputs(config(4), "StableDiffusionInpaintPipeline") == ()


def test_every_pipeline_that_is_known_is_one_of_diffusers():
    from blockcache.export.unet import extra_inputs

    for name, kind in extra_inputs._PIPELINES.items():
        assert hasattr(diffusers, name)
        assert kind in KINDS


@pytest.mark.parametrize(
    ("channels", "pipeline"),
    [(6, None), (3, None), (9, "PaintByExamplePipeline"), (8, "StableDiffusionInpaintPipeline")],
)
def test_what_nobody_says_is_refused(channels, pipeline):
    with pytest.raises(UnsupportedModelError) as caught:
        find_extra_inputs(config(channels), pipeline)
    held = f"what the others hold{f' in a {pipeline}' if pipeline else ''}. Supported are inpaint,"
    text = str(caught.value)
    assert text.startswith(f"This U-Net has {channels} input channels for 4 output channels,")
    assert held in text
    assert "such as mask:1,masked_image_latents:4." in text


@pytest.mark.parametrize("wanted", ["depth2img", "image:5", "a:1,b:2"])
def test_another_number_of_channels_is_refused(wanted):
    with pytest.raises(ConfigError, match=f"of 4 channels in all, .*; got '{wanted}' of [135]"):
        find_extra_inputs(config(8), wanted=wanted)


@pytest.mark.parametrize("wanted", ["", "outpaint", "mask", "mask:0", "mask:1,mask:3", "a b:4"])
def test_what_cannot_be_read_is_refused(wanted):
    with pytest.raises(ConfigError, match="Expected extra inputs as one of inpaint, "):
        find_extra_inputs(config(8), wanted=wanted)


def test_they_stand_behind_the_sample_in_their_order(tiny_models, conditions_of):
    """As ``torch.cat([latents, mask, masked_image_latents], dim=1)`` in the pipeline."""
    from blockcache.export.unet.model import UNetCall

    model = tiny_models("inpaint")
    sample, at = torch.randn(1, 4, 8, 8), torch.full((1,), 9.0)
    given = {n: torch.from_numpy(v) for n, v in conditions_of(model, 1, size=(8, 8)).items()}
    ours = UNetCall(model.unet, model.conditions)(sample, at, *given.values())
    prompt = given.pop("encoder_hidden_states")
    joined = torch.cat([sample, given["mask"], given["masked_image_latents"]], dim=1)
    assert torch.equal(ours, model.unet(joined, at, prompt).sample)
