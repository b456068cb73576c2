"""A request's conditions: both halves of guidance, the unconditional one with its defaults."""

from __future__ import annotations

import numpy as np
import pytest

from blockcache.runtime import InputError
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
