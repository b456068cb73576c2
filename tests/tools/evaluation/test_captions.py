import numpy as np
import pytest

from blockcache.tools.evaluation.captions import CaptionProbe, Labelled


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
