"""Distances of single images, PSNR, and captions one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from blockcache.tools.evaluation.captions import CaptionProbe, Labelled
from blockcache.tools.evaluation.quality import Captions, picture_psnr_db, relative_distance
from blockcache.tools.evaluation.subject import RealPictures


def test_distance_is_relative_and_one_an_image():
    reference = np.random.default_rng(0).standard_normal((3, 4, 2, 2)).astype(np.float32)
    scaled = reference * np.array([1.0, 1.5, 0.0], np.float32)[:, None, None, None]
    np.testing.assert_allclose(relative_distance(scaled, reference), [0, 0.5, 1], atol=1e-6)


def test_psnr_of_equal_pictures_is_that_of_rounding():
    black = np.zeros((2, 4, 4, 3), np.uint8)
    other = black.copy()
    other[1] += 10
    found = picture_psnr_db(other, black)
    assert found[0] == pytest.approx(10 * np.log10(255**2 * 12))
    assert found[1] == pytest.approx(20 * np.log10(25.5))


def test_single_captions_add_up_to_the_score():
    rng = np.random.default_rng(1)
    concepts = np.array([f"c{i}" for i in range(12)] * 2 + ["lonely"])
    styles = np.array(["x"] * 12 + ["y"] * 12 + ["x"])
    centres = {name: rng.standard_normal(6) for name in set(concepts)}
    found = np.stack([centres[name] + 0.4 * rng.standard_normal(6) for name in concepts])
    real = RealPictures(
        pictures=np.empty((25, 3, 1, 1), np.uint8),
        styles=styles,
        concepts=concepts,
        chosen=np.arange(25),
        folder=Path(),
    )
    captions = Captions(real, found)
    drawn = found + 0.8 * rng.standard_normal(found.shape)
    top1, top5 = captions.hits(drawn)
    assert np.isnan(top1[24])
    assert np.isnan(top5[24])  # only one style draws it
    probe = CaptionProbe(Labelled(features=found, styles=styles, concepts=concepts))
    score = probe.score(Labelled(features=drawn, styles=styles, concepts=concepts))
    assert np.nanmean(top1) == pytest.approx(score.top1)
    assert np.nanmean(top5) == pytest.approx(score.top5)
    assert 0 < score.top1 < 1
    assert captions.ceiling["top1"] > score.top1
