"""Files of encoded prompts are read whole, or refused by the tensor's name."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from blockcache.export.measure.encoded_prompts import NEGATIVE, read_encoded_prompts
from blockcache.runtime.errors import ConfigError

STATES = "encoder_hidden_states"


def written(folder, **changes):
    """A file of two prompts, with some tensors changed or, where None, left out."""
    whole = {STATES: np.ones((2, 3, 8), np.float32), "class_labels": np.array([0, 1])}
    negative = {f"{NEGATIVE}{STATES}": np.zeros((1, 3, 8), np.float32)}
    tensors = {**whole, **negative, **changes}
    file = folder / "prompts.safetensors"
    save_file({name: v for name, v in tensors.items() if v is not None}, file)
    return file


@given(prompts=st.integers(1, 4), tokens=st.integers(1, 5), seed=st.integers(0, 99))
def test_what_was_written_comes_back_in_its_half(tmp_path_factory, prompts, tokens, seed):
    values = np.random.default_rng(seed).standard_normal((prompts, tokens, 8), np.float32)
    file = written(tmp_path_factory.mktemp("prompts"), **{STATES: values})
    positive, negative = read_encoded_prompts(file)
    assert positive.keys() == {STATES, "class_labels"}
    assert negative.keys() == {STATES}
    assert np.array_equal(positive[STATES], values)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({STATES: np.zeros((0, 3, 8), np.float32)},
         f"Expected {STATES} of one prompt or more in "),
        ({STATES: np.array(1, np.float32)}, "got the shape []. Encode the prompts again."),
        ({STATES: np.full((2, 3, 8), np.nan, np.float32)}, f"Expected finite numbers as {STATES}"),
        ({f"{NEGATIVE}{STATES}": np.full((1, 3, 8), np.inf, np.float16)}, "got NaN or infinity."),
        ({STATES: None}, "Expected the tensors encoder_hidden_states [P, tokens, D] and negative."),
        ({f"{NEGATIVE}{STATES}": None}, "got ['class_labels', 'encoder_hidden_states']."),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_named(tmp_path, changes, text):
    with pytest.raises(ConfigError) as caught:
        read_encoded_prompts(written(tmp_path, **changes))
    assert text in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"Expected a calibration file at .*none\.safetensors"):
        read_encoded_prompts(tmp_path / "none.safetensors")
