"""Where prompts, decoder and real pictures come from."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from safetensors.numpy import save_file

from blockcache.runtime import ConfigError
from blockcache.tools.demo import data
from blockcache.tools.demo.data import Dataset, Picture
from blockcache.tools.demo.model import default_prompts
from blockcache.tools.evaluation.subject import demo_subject, embeddings_subject, model_subject


@pytest.fixture
def work(tmp_path):
    """What ``python -m blockcache.tools.demo data`` leaves, of five pictures."""
    pictures = [
        Picture(style=f"s{i}", words=f"w{i}", category="c", caption=f"s{i}, w{i}",
                held_out=False, weight=1.0)
        for i in range(5)
    ]  # fmt: skip
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((5, 3, 4, 4), np.uint8)
    data.save(Dataset(images=images, pictures=pictures), tmp_path)
    contexts = np.arange(6, dtype=np.float16)[:, None, None] * np.ones((6, 2, 3), np.float16)
    save_file({"contexts": contexts}, tmp_path / "contexts.safetensors")
    return tmp_path


def test_captions_contexts_and_real_pictures_belong_together(work):
    subject = demo_subject(7, seed=3, work=work)
    positive, negative = subject.conditions(range(7))
    assert negative["encoder_hidden_states"].tolist() == [[[5.0] * 3] * 2]
    for image in range(7):
        picture = subject.real.chosen[image]
        assert subject.caption(image) == f"s{picture}, w{picture}"
        assert (positive["encoder_hidden_states"][image] == picture).all()
        assert (subject.real.pictures[picture] == picture).all()
        assert subject.real.concepts[picture] == f"w{picture}"
    assert sorted(subject.real.chosen[:5]) == [0, 1, 2, 3, 4]
    assert positive["encoder_hidden_states"].dtype == np.float32


def test_more_images_begin_with_the_same_captions(work):
    few, more = demo_subject(3, seed=1, work=work), demo_subject(5, seed=1, work=work)
    np.testing.assert_array_equal(more.prompts[:3], few.prompts)


def test_default_prompts_are_taken_in_turn():
    count = len(default_prompts())
    subject = demo_subject(count + 4, seed=0, work=None)
    assert subject.caption(0) == subject.caption(count)
    assert len({subject.caption(image) for image in range(count)}) == count
    assert subject.real is None


def test_another_decoder_has_another_name(tmp_path, monkeypatch):
    from blockcache.tools.demo import model

    names = {demo_subject(2, 0, None).decoder}
    monkeypatch.setattr(model, "MODEL_DIR", tmp_path)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "weights").write_bytes(b"1")
    from blockcache.tools.evaluation.subject import _demo_decoder

    names.add(_demo_decoder())
    (tmp_path / "vae" / "weights").write_bytes(b"22")
    names.add(_demo_decoder())
    assert len(names) == 3


def test_a_file_of_prompts_is_encoded_by_the_model(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("twitter emoji, red heart\n\nnoto emoji, red heart\n")
    subject = model_subject("demo", 5, file)
    assert [subject.caption(image) for image in range(3)] == [
        "twitter emoji, red heart", "noto emoji, red heart", "twitter emoji, red heart",
    ]  # fmt: skip
    positive, negative = subject.conditions([0, 1, 2])
    states = positive["encoder_hidden_states"]
    np.testing.assert_array_equal(states[0], states[2])
    assert not np.array_equal(states[0], states[1])
    assert len(negative["encoder_hidden_states"]) == 1


def test_conditions_of_one_row_hold_for_every_image(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "encoder_hidden_states": rng.standard_normal((2, 3, 4)).astype(np.float32),
        "time_ids": np.ones((1, 6), np.float32),
        "negative.encoder_hidden_states": np.zeros((1, 3, 4), np.float32),
    }
    save_file(tensors, tmp_path / "e.safetensors")
    positive, _ = embeddings_subject(tmp_path / "e.safetensors", 4).conditions([2, 3])
    assert positive["time_ids"].shape == (1, 6)
    np.testing.assert_array_equal(
        positive["encoder_hidden_states"], tensors["encoder_hidden_states"]
    )


def test_missing_pictures_are_asked_for(tmp_path):
    with pytest.raises(ConfigError, match=r"blockcache\.tools\.demo data, or leave out"):
        demo_subject(4, 0, tmp_path)
