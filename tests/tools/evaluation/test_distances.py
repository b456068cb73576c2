"""The quick distances are those of the textbook, for the whole and for every half."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from hypothesis import given, settings
from hypothesis import strategies as st

from blockcache.tools.evaluation import distances
from blockcache.tools.evaluation.distances import SetDistances
from blockcache.tools.evaluation.resampling import Resampled, random_halves


def features(count, width, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).standard_normal((width, width)) / np.sqrt(width)
    return (rng.standard_normal((count, width)) @ mixing + shift).astype(np.float32)


def frechet(a, b):
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), matrix by matrix."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ second @ root).clip(min=0)
    shift = a.mean(0) - b.mean(0)
    return shift @ shift + np.trace(first) + np.trace(second) - 2 * np.sqrt(cross).sum()


def kid(a, b):
    """The mean kernel within each set, pairs of equal pictures left out, less twice across."""

    def kernel(x, y):
        return (x.astype(np.float64) @ y.astype(np.float64).T / x.shape[1] + 1) ** 3

    def within(x):
        matrix = kernel(x, x)
        return (matrix.sum() - np.trace(matrix)) / (len(x) * (len(x) - 1))

    return 1000 * (within(a) + within(b) - 2 * kernel(a, b).mean())


def test_frechet_distance_of_gaussians_in_closed_form():
    """Commuting covariances: |mu|^2 + sum (sqrt(a) - sqrt(b))^2."""
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    a, b = rng.uniform(0.5, 4, 6), rng.uniform(0.5, 4, 6)
    mean = rng.standard_normal(6)
    # White to the last digit, so that the sets have exactly these covariances.
    white = rng.standard_normal((200, 6))
    white = np.linalg.qr(white - white.mean(0))[0] * np.sqrt(199)
    first = (white * np.sqrt(a)) @ rotation.T
    second = (white * np.sqrt(b)) @ rotation.T + mean
    expected = mean @ mean + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert SetDistances(first).frechet(second).value == pytest.approx(expected, rel=1e-10)
    assert SetDistances(second).frechet(first).value == pytest.approx(expected, rel=1e-10)
    assert SetDistances(first).frechet(first).value == pytest.approx(0, abs=1e-10)


def test_kid_is_unbiased_on_one_distribution():
    """Over many draws from one distribution the mean is zero within three standard errors."""
    rng = np.random.default_rng(2)
    values = [
        SetDistances(rng.standard_normal((30, 8))).kernel(rng.standard_normal((40, 8))).value
        for _ in range(300)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_kid_sees_a_shift():
    rng = np.random.default_rng(3)
    sets = SetDistances(rng.standard_normal((80, 8)))
    near, far = (sets.kernel(rng.standard_normal((80, 8)) + shift).value for shift in (0, 1))
    assert far > 10 * abs(near)


@given(st.integers(8, 40), st.integers(3, 24), st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_they_agree_with_the_textbook(count, width, seed):
    reference, drawn = features(50, width, 1), features(count, width, seed, 0.3)
    halves = random_halves(count, 4, seed)
    sets = SetDistances(reference)
    ours, kernel = sets.frechet(drawn, halves), sets.kernel(drawn, halves)
    scale = max(1.0, frechet(drawn, reference))
    assert ours.value == pytest.approx(frechet(drawn, reference), abs=1e-5 * scale)
    assert kernel.value == pytest.approx(kid(drawn, reference), abs=1e-6)
    for place, half in enumerate(halves):
        part = drawn[half]
        assert ours.halves[place] == pytest.approx(frechet(part, reference), abs=1e-4 * scale)
        expected = kid(part, reference)
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
    far = kid(features(200, 6, 1, shift=1.0), real)
    assert max(map(abs, found["kid"])) < 0.05 * far


def test_the_floor_takes_pictures_that_are_not_in_the_reference(monkeypatch):
    seen = []

    class Recorder:
        def __init__(self, reference):
            self.reference = reference

        def frechet(self, chosen):
            seen.append((set(chosen[:, 0]), set(self.reference[:, 0])))
            return Resampled(0.0, np.empty(0))

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
    sets = SetDistances(features(300, 8, 5))
    fresh = [
        (sets.frechet(drawn).value, sets.kernel(drawn).value)
        for drawn in (features(80, 8, 100 + draw, 0.5) for draw in range(150))
    ]
    drawn, halves = features(80, 8, 7, 0.5), random_halves(80, 300, 0)
    estimated = [sets.frechet(drawn, halves).halves.std(), sets.kernel(drawn, halves).halves.std()]
    for truth, estimate in zip(np.std(fresh, axis=0), estimated, strict=True):
        assert 0.7 < estimate / truth < 1.4
