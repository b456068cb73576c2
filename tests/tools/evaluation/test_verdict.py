"""A difference is a finding where its interval leaves out 0; the Fréchet distance is not enough."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

from blockcache.tools.evaluation.quality import BY_KEY
from blockcache.tools.evaluation.resampling import Interval, Resampled
from blockcache.tools.evaluation.verdict import Finding, compare, overall

NOISE = np.linspace(-1, 1, 41)


def measured(value, spread=1.0):
    return Resampled(value, value + spread * NOISE)


@pytest.mark.parametrize(
    ("key", "value", "verdict"),
    [
        ("frechet", 3.0, "worse"),
        ("frechet", -3.0, "better"),
        ("frechet", 0.5, "no finding"),
        ("top1", 3.0, "better"),
        ("top1", -3.0, "worse"),
        ("psnr_db", 3.0, "better"),
    ],
)
def test_the_sign_means_what_the_metric_says(key, value, verdict):
    found = Finding.of(BY_KEY[key], measured(value), Resampled(0.0, np.zeros(41)))
    assert found.verdict == verdict


def test_common_noise_does_not_hide_a_difference():
    found = Finding.of(BY_KEY["kid"], measured(10.1, spread=5), measured(10, spread=5))
    assert found.verdict == "worse"


def test_equal_presets_give_no_finding():
    assert Finding.of(BY_KEY["kid"], measured(1), measured(1)).verdict == "no finding"


def test_only_metrics_of_both_are_compared():
    found = compare({"kid": measured(1), "distance": measured(1)}, {"kid": measured(2)})
    assert set(found) == {"kid"}
    assert compare({"kid": measured(1)}, {"kid": measured(2)}, leave_out=("kid",)) == {}


VERDICTS = st.sampled_from(["better", "worse", "no finding"])


def findings(**verdicts):
    return {key: Finding(Interval(0, 0, 0), verdict) for key, verdict in verdicts.items()}


@pytest.mark.parametrize(
    ("found", "word"),
    [
        ({"frechet": "better"}, "no finding"),
        ({"frechet": "worse", "kid": "no finding"}, "no finding"),
        ({"frechet": "better", "kid": "better"}, "better"),
        ({"frechet": "better", "distance": "worse"}, "mixed"),
        ({"distance": "worse"}, "worse"),
        ({"top5": "better", "psnr_db": "worse"}, "no finding"),
        ({}, "no finding"),
    ],
)
def test_one_word_for_all(found, word):
    assert overall(findings(**found)) == word


@given(st.dictionaries(st.sampled_from(["frechet", "kid", "top1", "distance"]), VERDICTS))
def test_better_and_worse_swap_when_sides_do(verdicts):
    swap = {"better": "worse", "worse": "better"}
    other = {key: swap.get(verdict, verdict) for key, verdict in verdicts.items()}
    word = overall(findings(**verdicts))
    assert overall(findings(**other)) == swap.get(word, word)
