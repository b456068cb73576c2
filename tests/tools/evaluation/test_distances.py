"""The quick distances are those of the metrics, for the whole and for every half."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from hypothesis import given, settings
from hypothesis import strategies as st

from blockcache.tools.evaluation import distances, metrics
from blockcache.tools.evaluation.distances import SetDistances
from blockcache.tools.evaluation.metrics import Statistics
from blockcache.tools.evaluation.resampling import Measured, random_halves


def features(count, width, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).standard_normal((width, width)) / np.sqrt(width)
    return (rng.standard_normal((count, width)) @ mixing + shift).astype(np.float32)


def frechet(a, b):
    return metrics.frechet_distance(Statistics.of(a), Statistics.of(b))


@given(st.integers(8, 40), st.integers(3, 24), st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_they_agree_with_the_metrics(count, width, seed):
    reference, drawn = features(50, width, 1), features(count, width, seed, 0.3)
    halves = random_halves(count, 4, seed)
    sets = SetDistances(reference)
    ours, kernel = sets.frechet(drawn, halves), sets.kernel(drawn, halves)
    scale = max(1.0, frechet(drawn, reference))
    assert ours.value == pytest.approx(frechet(drawn, reference), abs=1e-5 * scale)
    assert kernel.value == pytest.approx(1000 * metrics.kernel_distance(drawn, reference), abs=1e-6)
    for place, half in enumerate(halves):
        part = drawn[half]
        assert ours.halves[place] == pytest.approx(frechet(part, reference), abs=1e-4 * scale)
        expected = 1000 * metrics.kernel_distance(part, reference)
        assert kernel.halves[place] == pytest.approx(expected, abs=1e-6)


def test_rows_are_taken_in_parts(monkeypatch):
    drawn, reference = features(20, 5, 0), features(30, 5, 1)
    whole = SetDistances(reference).kernel(drawn, random_halves(20, 2, 0))
    monkeypatch.setattr(distances, "ROWS", 7)
    parts = SetDistances(reference).kernel(drawn, random_halves(20, 2, 0))
    assert parts.value == pytest.approx(whole.value, rel=1e-10)


def test_the_floor_is_real_against_other_real_pictures():
    real = features(400, 6, 0)
    found = distances.floor(real, 200, seed=0)
    assert len(found["frechet"]) == len(found["kid"]) == 3
    assert len(set(found["frechet"])) == 3
    assert max(found["frechet"]) < 0.1 * frechet(features(200, 6, 1, shift=1.0), real)
    far = 1000 * metrics.kernel_distance(features(200, 6, 1, shift=1.0), real)
    assert max(map(abs, found["kid"])) < 0.05 * far


def test_the_floor_takes_pictures_that_are_not_in_the_reference(monkeypatch):
    seen = []

    class Recorder:
        def __init__(self, reference):
            self.reference = reference

        def frechet(self, chosen, halves):
            seen.append((set(chosen[:, 0]), set(self.reference[:, 0])))
            return Measured(0.0, np.empty(0))

        kernel = frechet

    monkeypatch.setattr(distances, "SetDistances", Recorder)
    distances.floor(np.arange(50)[:, None], 20, seed=0)
    assert len(seen) == 6
    for chosen, reference in seen:
        assert (len(chosen), len(reference)) == (20, 30)
        assert not chosen & reference


def test_the_floor_never_takes_more_than_half():
    assert all(np.isfinite(distances.floor(features(21, 3, 0), 1000, seed=1)["frechet"]))


def test_the_spread_of_the_halves_is_that_of_new_pictures():
    """KID and Fréchet distance over fresh draws vary as the halves of one draw do."""
    sets, none = SetDistances(features(300, 8, 5)), np.empty((0, 0), np.int64)
    fresh = [
        (sets.frechet(drawn, none).value, sets.kernel(drawn, none).value)
        for drawn in (features(80, 8, 100 + draw, 0.5) for draw in range(150))
    ]
    drawn, halves = features(80, 8, 7, 0.5), random_halves(80, 300, 0)
    estimated = [sets.frechet(drawn, halves).halves.std(), sets.kernel(drawn, halves).halves.std()]
    for truth, estimate in zip(np.std(fresh, axis=0), estimated, strict=True):
        assert 0.7 < estimate / truth < 1.4
