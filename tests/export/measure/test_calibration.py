"""Prompts become conditions: from a file, and through a pipeline's own text encoder."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from safetensors.numpy import save_file  # noqa: E402

from blockcache.export.measure.calibration import encode_prompts, read_calibration  # noqa: E402
from blockcache.runtime import ConfigError  # noqa: E402


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, tiny_models):
    """A Stable-Diffusion-like pipeline folder with a tiny random CLIP and a letter vocabulary."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("pipeline")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {w: i for i, w in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=9
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=9,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
    )
    model = tiny_models("sd")
    StableDiffusionPipeline(
        vae=None,
        text_encoder=transformers.CLIPTextModel(config),
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "model")
    return folder / "model"


def test_prompts_are_encoded_by_the_pipelines_own_encoder(pipeline):
    calibration = encode_prompts(pipeline, ["a cat", "a dog", "cat"])
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
