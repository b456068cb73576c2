"""Other precisions are other values: the model stays as it is, and equal weights are shared."""

from __future__ import annotations

import copy
import dataclasses

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from blockcache.export.unet.precision import converted, rounded  # noqa: E402

TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models("sd")


@pytest.fixture
def unchanged(model):
    """Fails where a test has changed the model's weights."""
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    yield
    after = model.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(value.dtype == torch.float32 for value in after.values())


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("precision", TYPES)
def test_weights_are_those_that_a_cast_in_place_would_give(model, precision):
    cast = copy.deepcopy(model.unet).to(TYPES[precision])
    half, full = converted(model, precision), rounded(model, precision)
    assert half.unet.state_dict().keys() == model.unet.state_dict().keys()
    for name, value in cast.state_dict().items():
        assert torch.equal(half.unet.state_dict()[name], value)
        assert torch.equal(full.unet.state_dict()[name], value.float())
        assert full.unet.state_dict()[name].dtype == torch.float32
    assert not half.unet.training
    assert not any(weight.requires_grad for weight in half.unet.parameters())
    assert dataclasses.replace(half, unet=model.unet) == model, "all else is the model's own"


@pytest.mark.usefixtures("unchanged")
def test_writing_to_a_copy_leaves_the_model_alone(model):
    half = rounded(model, "bfloat16")
    with torch.no_grad():
        for weight, original in zip(half.unet.parameters(), model.unet.parameters(), strict=True):
            if weight is not original:
                weight.zero_()


def test_a_model_that_is_as_wanted_is_given_back(model):
    assert converted(model, "float32") is model
    assert rounded(model, "float32") is model
    half = rounded(model, "bfloat16")
    assert rounded(half, "bfloat16") is half


def test_weights_that_do_not_change_are_shared(model):
    """Biases of a fresh norm are 0, its scales 1: exact in every precision."""
    half = rounded(model, "bfloat16")
    pairs = list(zip(half.unet.parameters(), model.unet.parameters(), strict=True))
    assert any(ours is theirs for ours, theirs in pairs)
    assert all((ours is theirs) == torch.equal(ours, theirs) for ours, theirs in pairs)


def test_tied_weights_stay_tied(model):
    unet = copy.deepcopy(model.unet)
    unet.time_embedding.alias = unet.time_embedding.linear_1
    half = converted(dataclasses.replace(model, unet=unet), "float16").unet
    assert half.time_embedding.alias.weight is half.time_embedding.linear_1.weight
