"""A request's conditions: both halves of guidance, the unconditional one with its defaults."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from blockcache.runtime import InputError, Session
from blockcache.runtime.plan import (
    BlockFacts,
    Dim,
    ModelFacts,
    Sizes,
    TensorSpec,
    default_negative,
)
from blockcache.runtime.request import checked_request, guidance_of


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
    ),
)


def conditions(images, value):
    return {
        "encoder_hidden_states": np.full((images, 7, 32), value, np.float32),
        "text_embeds": np.full((images, 16), value, np.float32),
        "time_ids": np.full((images, 6), value, np.float32),
        "class_labels": np.full((images, 12), value, np.float32),
    }


def request(positive, negative):
    return checked_request(
        MODEL,
        4,
        noise=np.zeros((2, 4, 8, 8), np.float32),
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


def test_what_is_given_replaces_a_default():
    made = request(conditions(2, 3), conditions(1, 5))
    assert all((values[:2] == 5).all() and (values[2:] == 3).all() for values in made.values())


@pytest.mark.parametrize("name", ["encoder_hidden_states", "text_embeds"])
def test_a_prompt_has_no_default(name):
    negative = conditions(1, 5)
    del negative[name]
    with pytest.raises(InputError, match=f"negative {name}: expected a tensor, got none"):
        request(conditions(2, 3), negative)


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
