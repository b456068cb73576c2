import math

import numpy as np
import pytest

from blockcache.tools.evaluation.metrics import (
    CaptionProbe,
    Labelled,
    Statistics,
    frechet_distance,
    kernel_distance,
    psnr_db,
)


def test_frechet_distance_of_gaussians_in_closed_form():
    """Commuting covariances: |mu|^2 + sum (sqrt(a) - sqrt(b))^2."""
    random = np.random.default_rng(0)
    rotation = np.linalg.qr(random.standard_normal((6, 6)))[0]
    a, b = random.uniform(0.5, 4, 6), random.uniform(0.5, 4, 6)
    mean = random.standard_normal(6)
    first = Statistics(mean=np.zeros(6), covariance=(rotation * a) @ rotation.T)
    second = Statistics(mean=mean, covariance=(rotation * b) @ rotation.T)
    expected = mean @ mean + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-10)


def test_statistics_agree_with_their_definition():
    features = np.random.default_rng(1).standard_normal((50, 4)).astype(np.float32)
    found = Statistics.of(features)
    centred = features.astype(np.float64) - features.astype(np.float64).mean(0)
    assert np.allclose(found.covariance, centred.T @ centred / 49)


def test_kernel_distance_is_unbiased_on_one_distribution():
    """Over many draws from one distribution the mean is zero within three standard errors."""
    random = np.random.default_rng(2)
    values = [
        kernel_distance(random.standard_normal((40, 8)), random.standard_normal((30, 8)))
        for _ in range(300)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(len(values))


def test_kernel_distance_sees_a_shift():
    random = np.random.default_rng(3)
    a, b = random.standard_normal((80, 8)), random.standard_normal((80, 8)) + 1
    assert kernel_distance(a, b) > 10 * abs(kernel_distance(a, random.standard_normal((80, 8))))


def test_psnr_of_a_constant_error():
    a = np.full((2, 3, 4, 4), 100, np.uint8)
    assert psnr_db(a, a) == math.inf
    assert psnr_db(a, a + 5) == pytest.approx(20 * math.log10(255 / 5))


def labelled(noise, seed=0):
    """20 concepts in 3 styles: concept direction + style offset + noise."""
    random = np.random.default_rng(seed)
    concepts, styles = np.meshgrid(np.arange(20), np.arange(3))
    centres = np.random.default_rng(9).standard_normal((20, 32))
    offsets = np.random.default_rng(8).standard_normal((3, 32))
    features = centres[concepts.ravel()] + 0.3 * offsets[styles.ravel()]
    return Labelled(
        features=features + noise * random.standard_normal(features.shape),
        styles=np.array([f"s{i}" for i in styles.ravel()]),
        concepts=np.array([f"c{i:02d}" for i in concepts.ravel()]),
    )


def test_caption_probe_names_what_it_has_seen_in_other_styles():
    probe = CaptionProbe(labelled(0.05))
    score = probe.score(labelled(0.05, seed=1))
    assert score.top1 > 0.95
    assert score.top5 >= score.top1
    assert (score.candidates, score.pictures) == (20, 60)


def test_caption_probe_is_at_chance_on_shuffled_names():
    real = labelled(0.05)
    wrong = Labelled(
        features=np.roll(real.features, 7, axis=0), styles=real.styles, concepts=real.concepts
    )
    assert CaptionProbe(real).score(wrong).top1 < 0.2


def test_caption_probe_needs_common_concepts():
    real = labelled(0.05)
    lonely = Labelled(
        features=real.features,
        styles=real.styles,
        concepts=np.array([f"c{i}" for i in range(len(real.concepts))]),
    )
    with pytest.raises(ValueError, match="concepts that every style draws"):
        CaptionProbe(lonely)
