"""A request's conditions: both halves of guidance, the unconditional one with its defaults."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from blockcache.runtime import InputError, Session
from blockcache.runtime.devices import dlpack
from blockcache.runtime.devices.dlpack import Lent
from blockcache.runtime.plan import (
    BlockFacts,
    Dim,
    ModelFacts,
    Sizes,
    TensorSpec,
    default_negative,
)
from blockcache.runtime.request import checked_conditions, checked_request, guidance_of


def spec(name, *dims, dtype="float32"):
    return TensorSpec(name, dtype, tuple(Dim.parse(dim) for dim in dims))


MODEL = ModelFacts(
    name="model",
    sha256="0" * 64,
    precision="float32",
    channels=4,
    downsampling=4,
    outputs=1,
    blocks=(BlockFacts("mid_block.attentions.0", 8),),
    sizes=Sizes(batch=2, height=8, width=8, tokens=7),
    conditions=(
        spec("encoder_hidden_states", "batch", "tokens", 32),
        spec("text_embeds", "batch", 16),
        spec("time_ids", "batch", 6),
        spec("class_labels", "batch", 12),
        spec("mask", "batch", 1, "height", "width"),
        spec("control_image", "batch", 3, "4*height", "4*width"),
    ),
)


def conditions(images, value, height=8, width=8):
    return {
        "encoder_hidden_states": np.full((images, 7, 32), value, np.float32),
        "text_embeds": np.full((images, 16), value, np.float32),
        "time_ids": np.full((images, 6), value, np.float32),
        "class_labels": np.full((images, 12), value, np.float32),
        "mask": np.full((images, 1, height, width), value, np.float32),
        "control_image": np.full((images, 3, 4 * height, 4 * width), value, np.float32),
    }


def request(positive, negative, size=(8, 8)):
    return checked_request(
        MODEL,
        4,
        noise=np.zeros((2, 4, *size), np.float32),
        positive=positive,
        negative=negative,
        guidance=guidance_of(3.0, 0.0),
    ).conditions


def test_what_has_a_default_need_not_be_given():
    """An image embedding is zeros there, as unCLIP's pipelines have it; sizes are the prompt's."""
    prompts = {name: conditions(1, 5)[name] for name in ("encoder_hidden_states", "text_embeds")}
    made = request(conditions(2, 3), prompts)
    np.testing.assert_array_equal(made["encoder_hidden_states"][:, 0, 0], [5, 5, 3, 3])
    np.testing.assert_array_equal(made["text_embeds"][:, 0], [5, 5, 3, 3])
    np.testing.assert_array_equal(made["time_ids"][:, 0], [3, 3, 3, 3])
    np.testing.assert_array_equal(made["class_labels"][:, 0], [0, 0, 3, 3])
    np.testing.assert_array_equal(made["mask"][:, 0, 0, 0], [3, 3, 3, 3])


def test_what_is_given_replaces_a_default():
    made = request(conditions(2, 3), conditions(1, 5))
    assert all((values[:2] == 5).all() and (values[2:] == 3).all() for values in made.values())


@pytest.mark.parametrize("name", ["encoder_hidden_states", "text_embeds"])
def test_a_prompt_has_no_default(name):
    negative = conditions(1, 5)
    del negative[name]
    with pytest.raises(InputError, match=f"negative {name}: expected a tensor, got none"):
        request(conditions(2, 3), negative)


# -- pictures --------------------------------------------------------------------------------------


def test_pictures_have_the_requests_own_size():
    """A multiple of it where the model says so; one serves all images and both halves."""
    prompts = {name: conditions(1, 5)[name] for name in ("encoder_hidden_states", "text_embeds")}
    made = request(conditions(1, 3, height=12, width=4), prompts, size=(12, 4))
    assert made["mask"].shape == (4, 1, 12, 4)
    assert made["control_image"].shape == (4, 3, 48, 16)
    assert (made["control_image"] == 3).all()


@pytest.mark.parametrize(
    ("name", "wanted"), [("mask", [2, 1, 8, 8]), ("control_image", [2, 3, 32, 32])]
)
@pytest.mark.parametrize("side", ["", "negative "])
def test_pictures_of_another_size_are_refused(name, wanted, side):
    given, other = conditions(2, 3), conditions(2, 5)
    (other if side else given)[name] = conditions(2, 3, height=8, width=12)[name]
    with pytest.raises(InputError) as caught:
        request(given, other)
    got = [*wanted[:3], wanted[3] * 12 // 8]
    assert str(caught.value) == f"{side}{name}: expected shape {wanted}, got {got}."


def test_pictures_of_a_batch_that_the_caller_laid_out_have_its_size():
    given = conditions(3, 3, height=4, width=12)
    sizes, made = checked_conditions(MODEL, given, height=4, width=12)
    assert (sizes.batch, made["control_image"].shape) == (3, (3, 3, 16, 48))
    with pytest.raises(
        InputError, match=r"^mask: expected shape \[3, 1, 8, 8\], got \[3, 1, 4, 12\]"
    ):
        checked_conditions(MODEL, {**conditions(3, 3), "mask": given["mask"]})


def test_a_picture_that_is_lent_serves_both_halves():
    mask = Lent(1 << 20, (2, 1, 8, 8), (64, 64, 8, 1), "float32", dlpack.CUDA, None)
    prompts = {name: conditions(1, 5)[name] for name in ("encoder_hidden_states", "text_embeds")}
    assert request({**conditions(2, 3), "mask": mask}, prompts)["mask"] == (mask, mask)


EDITED = replace(
    MODEL,
    conditions=(MODEL.conditions[0], spec("image_latents", "batch", 4, "height", "width")),
    extra_inputs=("image_latents",),
)


def edited(model=EDITED, negative=None, **guidance):
    def given(value):
        return conditions(1, value)["encoder_hidden_states"]

    return checked_request(
        model,
        4,
        noise=np.zeros((2, 4, 8, 8), np.float32),
        positive={
            "encoder_hidden_states": given(3),
            "image_latents": np.full((2, 4, 8, 8), 7, np.float32),
        },
        negative={"encoder_hidden_states": given(5), **(negative or {})},
        guidance=guidance_of(3.0, 0.0, **guidance),
    )


def test_guidance_by_an_image_takes_three_samples_an_image():
    """Without anything, with the image alone, with image and prompt."""
    made = edited(image_scale=1.5)
    assert made.sizes.batch == 6
    prompts, images = (made.conditions[name] for name in ("encoder_hidden_states", "image_latents"))
    np.testing.assert_array_equal(prompts[:, 0, 0], [5, 5, 5, 5, 3, 3])
    np.testing.assert_array_equal(images[:, 0, 0, 0], [0, 0, 7, 7, 7, 7])
    other = edited(image_scale=1.5, negative={"image_latents": np.ones((1, 4, 8, 8), np.float32)})
    np.testing.assert_array_equal(other.conditions["image_latents"][:, 0, 0, 0], [1, 1, 7, 7, 7, 7])


def test_without_it_both_halves_have_the_image():
    made = edited()
    assert made.sizes.batch == 4
    assert (made.conditions["image_latents"] == 7).all()


def test_guidance_by_an_image_is_refused_where_the_model_reads_none():
    with pytest.raises(InputError, match=r"^image_guidance_scale: expected 1, as 'model' has no "):
        edited(replace(EDITED, extra_inputs=()), image_scale=1.5)


def test_class_numbers_are_shared_by_both_halves():
    numbers = np.array([3, 4])
    assert default_negative("class_labels", numbers) is numbers


# -- classes by number -----------------------------------------------------------------------------

NUMBERED = replace(
    MODEL,
    conditions=(MODEL.conditions[0], spec("class_labels", "batch", dtype="int64")),
    classes=5,
)


def labelled(labels, negative=None):
    prompt = {"encoder_hidden_states": np.zeros((2, 7, 32), np.float32)}
    return checked_request(
        NUMBERED,
        4,
        noise=np.zeros((2, 4, 8, 8), np.float32),
        positive={**prompt, "class_labels": np.array(labels)},
        negative=prompt if negative is None else {**prompt, "class_labels": np.array(negative)},
        guidance=guidance_of(3.0, 0.0),
    ).conditions["class_labels"]


def test_class_labels_within_the_models_classes_are_taken():
    assert labelled([0, 4]).tolist() == [0, 4, 0, 4]


@pytest.mark.parametrize(
    ("labels", "negative", "got"),
    [([0, 5], None, "0 to 5"), ([-1, 2], None, "-1 to 2"), ([1, 2], [2, 9], "1 to 9")],
)
def test_class_labels_out_of_range_are_refused(labels, negative, got):
    """ONNX's Gather counts -1 from the end: the last class was drawn."""
    with pytest.raises(InputError) as caught:
        labelled(labels, negative)
    assert str(caught.value) == (
        f"class_labels: expected numbers of 0 to 4, the classes of 'model', got {got}."
    )


def test_a_compiled_model_knows_its_classes(compiled, conditions_of):
    model, bundle = compiled("class-conditioned")
    assert bundle.model.classes == 5
    assert compiled("sd")[1].model.classes == 0
    session = Session.open(bundle, preset="ddim-4", backend="empty")
    given = conditions_of(model, 1)
    prompt = given.pop("encoder_hidden_states")
    session.denoise(session.noise([0]), prompt, prompt, conditions=given)
    given["class_labels"] = np.array([5])
    with pytest.raises(InputError, match=r"^class_labels: expected numbers of 0 to 4, "):
        session.denoise(session.noise([0]), prompt, prompt, conditions=given)
