"""Prompts become conditions: from a file, and through a pipeline's own text encoder."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from safetensors.numpy import save_file  # noqa: E402

from blockcache.export.measure.calibration import (  # noqa: E402
    Calibration,
    check_calibration,
    encode_prompts,
    read_calibration,
)
from blockcache.export.unet.model import Condition  # noqa: E402
from blockcache.runtime import ConfigError  # noqa: E402


def test_prompts_are_encoded_by_the_pipelines_own_encoder(pipeline_folder):
    calibration = encode_prompts(pipeline_folder("sd"), ["a cat", "a dog", "cat"])
    states = calibration.positive["encoder_hidden_states"]
    assert states.shape == (3, 9, 32)
    assert states.dtype == np.float32
    assert not np.allclose(states[0], states[1])
    assert calibration.negative["encoder_hidden_states"].shape == (1, 9, 32)
    assert calibration.prompts == 3


def test_a_folder_without_text_encoder_says_what_to_give(tmp_path):
    with pytest.raises(ConfigError, match=r"Expected text_encoder/ in .*--calibration FILE"):
        encode_prompts(tmp_path, ["a"])


def test_a_calibration_file_needs_both_sides(tmp_path):
    file = tmp_path / "c.safetensors"
    save_file({"encoder_hidden_states": np.zeros((2, 7, 32), np.float32)}, file)
    with pytest.raises(ConfigError, match=r"negative\.encoder_hidden_states \[1, tokens, D\]"):
        read_calibration(file)
    with pytest.raises(ConfigError, match="Expected a calibration file at"):
        read_calibration(tmp_path / "none.safetensors")


def test_halves_are_picked_with_the_unconditional_one_first(tmp_path):
    file = tmp_path / "c.safetensors"
    positive = np.arange(2 * 7 * 32, dtype=np.float32).reshape(2, 7, 32)
    negative = -np.ones((1, 7, 32), np.float32)
    save_file({"encoder_hidden_states": positive, "negative.encoder_hidden_states": negative}, file)
    picked = read_calibration(file).pick([1, 0], guided=True)["encoder_hidden_states"].numpy()
    np.testing.assert_array_equal(picked, np.concatenate([negative, negative, positive[::-1]]))


# -- whether it fits the model ---------------------------------------------------------------------


@pytest.fixture
def fitting(tiny_models, conditions_of):
    """``fitting(kind, names...)``: a model and a calibration of three prompts that fits it."""

    def get(kind):
        model = tiny_models(kind)
        halves = conditions_of(model, 3, seed=1), conditions_of(model, 1, seed=2)
        return model, Calibration(*halves)

    return get


def fault(model, calibration, guided=True):
    with pytest.raises(ConfigError) as caught:
        check_calibration(model, calibration, guided)
    return str(caught.value)


def changed(calibration, name, values, side="positive"):
    halves = {"positive": dict(calibration.positive), "negative": dict(calibration.negative)}
    halves[side][name] = values
    return Calibration(**halves)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "refiner", "class-conditioned"])
def test_a_calibration_that_fits_passes(fitting, kind):
    check_calibration(*fitting(kind), guided=True)


STATES = "encoder_hidden_states"


@pytest.mark.parametrize(
    ("kind", "name", "values", "text"),
    [
        ("sd", "text_embeds", np.zeros((3, 16), np.float32),
         "expected the conditions ['encoder_hidden_states'] of 'tiny-sd', got 'text_embeds' too."),
        ("sd", STATES, np.zeros((3, 7, 48), np.float32),
         "of shape [1 or 3, tokens, 32] for 'tiny-sd', got [3, 7, 48]. Encode the prompts"),
        ("sd", STATES, np.zeros((7, 32), np.float32), "got [7, 32]. Encode the prompts"),
        ("sd", STATES, np.zeros((3, 7, 32), np.float16),
         "in float32, got float16. Convert it with .astype(np.float32)."),
        ("sd", STATES, np.full((3, 7, 32), np.nan, np.float32), "got NaN or infinity."),
        ("sd", STATES, np.zeros((3, 5, 32), np.float32),
         "of one length in both halves, got [5, 7] tokens. Pad the prompts alike."),
        ("sdxl", "time_ids", np.zeros((3, 5), np.float32), "time_ids of shape [1 or 3, 6] for"),
        ("sdxl", "text_embeds", np.zeros((2, 16), np.float32), "of shape [1 or 3, 16] for"),
        ("class-conditioned", "class_labels", np.array([0, 1, 5]),
         "class_labels of 0 to 4, the classes of 'tiny-class-conditioned', got 0 to 5."),
        ("class-conditioned", "class_labels", np.array([0, -1, 1]), "got -1 to 1."),
        ("class-conditioned", "class_labels", np.zeros(3, np.float32), "in int64, got float32."),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(fitting, kind, name, values, text):
    model, calibration = fitting(kind)
    assert text in fault(model, changed(calibration, name, values))


@pytest.mark.parametrize("half", [{}, {STATES: np.zeros((0, 7, 32), np.float32)}])
def test_a_calibration_without_prompts_is_refused(fitting, half):
    model, calibration = fitting("sd")
    text = fault(model, Calibration(half, calibration.negative))
    assert text == "Calibration: expected one prompt or more, got none. Encode some."


def test_what_is_missing_is_named(fitting):
    model, calibration = fitting("sdxl")
    states = {STATES: calibration.positive[STATES]}
    text = fault(model, Calibration(states, states))
    assert text == (
        "Calibration: expected text_embeds, which 'tiny-sdxl' needs, got "
        "['encoder_hidden_states']. Add it."
    )
    text = fault(model, Calibration(calibration.positive, states))
    assert text.startswith("Calibration: expected negative.text_embeds, guidance's unconditional")
    check_calibration(model, Calibration(calibration.positive, {}), guided=False)


def test_a_negative_half_is_checked_too(fitting):
    model, calibration = fitting("sd")
    other = changed(calibration, STATES, np.zeros((2, 7, 32), np.float32), "negative")
    assert "expected negative.encoder_hidden_states of shape [1 or 3, " in fault(model, other)


def test_pictures_have_the_models_own_size(fitting):
    model, calibration = fitting("sd")
    mask = Condition("mask", ("batch", 1, "height", "4*width"), "model")
    model = dataclasses.replace(model, conditions=(*model.conditions, mask))
    pictures = np.ones((3, 1, 16, 64), np.float32)
    for given in (pictures, pictures[:1]):
        masked = changed(calibration, "mask", given)
        check_calibration(model, masked, guided=True)
        assert masked.unconditional("mask") is given
    text = fault(model, changed(calibration, "mask", pictures[..., :16]))
    assert text.startswith(
        "Calibration: expected mask of shape [1 or 3, 1, 16, 64] for 'tiny-sd', got [3, 1, 16, 16]."
    )


def test_the_unconditional_half_of_an_image_embedding_is_zeros():
    """As unCLIP's pipelines have it; sizes and class numbers are those of the prompt."""
    embedding = np.ones((2, 8), np.float32)
    time_ids = np.full((2, 6), 64, np.float32)
    states = np.ones((2, 7, 32), np.float32)
    calibration = Calibration(
        {STATES: states, "class_labels": embedding, "time_ids": time_ids}, {STATES: states[:1]}
    )
    picked = calibration.pick([0, 1], guided=True)
    np.testing.assert_array_equal(picked["class_labels"][:2], np.zeros((2, 8)))
    np.testing.assert_array_equal(picked["class_labels"][2:], embedding)
    np.testing.assert_array_equal(picked["time_ids"], np.full((4, 6), 64))
    numbers = Calibration({"class_labels": np.array([3, 4])}, {})
    np.testing.assert_array_equal(numbers.pick([0, 1], guided=True)["class_labels"], [3, 4, 3, 4])


def test_the_hash_tells_calibrations_apart():
    """By names, sides, types, shapes and values, and by nothing else."""
    states = np.arange(8, dtype=np.float32).reshape(1, 2, 4)
    plain = Calibration({"a": states, "b": states}, {"a": states})
    assert Calibration({"b": states, "a": states.copy()}, {"a": states}).sha256 == plain.sha256
    others = [
        Calibration({"a": states, "c": states}, {"a": states}),
        Calibration({"a": states, "b": states}, {"a": states + 1}),
        Calibration({"a": states, "b": states.reshape(1, 4, 2)}, {"a": states}),
        Calibration({"a": states, "b": states.view(np.int32)}, {"a": states}),
        Calibration({"a": states}, {"b": states, "a": states}),
        Calibration({"a": states, "b": states, "c": states}, {}),
        Calibration({"a": states, "b": states}, {"c": states}),
    ]
    assert len({calibration.sha256 for calibration in [plain, *others]}) == len(others) + 1
