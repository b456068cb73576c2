"""What alignments could repair, on outputs whose law is known."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
from blockcache.tools.research.alignment_limits import errors

SHAPE = (2, 8, 6, 32)  # branch, image, channel, position
PAPER = "scale and shift by channel (the paper)"
MATRIX = "a matrix over all channels and a shift"
HISTORY = "last two outputs by channel (history)"
BEFORE = "scale and shift by channel, before the projection"
TURN, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((6, 6)))  # of the last layer


def noise(seed, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape)


def left(step, period=2, projection=TURN):
    """Errors for the outputs that ``step(s)`` makes, float32 [S, ...]."""
    return errors(np.stack([step(s) for s in range(14)]).astype(np.float32), period, projection)


def test_every_kind_is_told_apart_and_plain_reuse_is_the_unit():
    found = left(lambda s: noise(s))
    assert found["as it is"] == 1.0
    assert len(found) == 9
    # Of outputs that have nothing in common the mean is the best guess: 1 / sqrt(2).
    assert all(0.65 < error < 0.85 for kind, error in found.items() if kind != "as it is")


def test_a_scale_and_shift_of_each_channel_is_repaired_by_the_paper_s_adjustment():
    rate, shift, base = 0.8 + 0.1 * noise(1, (6, 1)), noise(2, (6, 1)), noise(0)
    found = left(lambda s: base * rate**s + s * shift)
    assert found[PAPER] < 0.02
    assert found["scale and shift by channel, every image its own"] < 0.02


@pytest.mark.parametrize("period", [2, 3, 4])
def test_a_scale_of_what_the_last_layer_sees_is_repaired_before_it(period):
    weight, rate, base = TURN + 0.3 * noise(4, (6, 6)), 0.8 + 0.1 * noise(1, (6, 1)), noise(0)
    found = left(lambda s: np.einsum("dc,bicp->bidp", weight, base * rate**s), period, weight)
    assert found[BEFORE] < 0.02
    assert found[PAPER] > 0.05


def test_a_movement_of_each_position_needs_history():
    start, way = noise(0), noise(1)
    found = left(lambda s: 20 * start + s * way)
    assert found[PAPER] > 0.5
    assert found[HISTORY] < 0.02


def test_a_mixture_of_channels_needs_a_matrix():
    base = noise(0)
    found = left(lambda s: np.einsum("dc,bicp->bidp", np.linalg.matrix_power(TURN, s), base))
    assert found[PAPER] > 0.3
    assert found[MATRIX] < 0.02


def test_what_holds_for_an_image_alone_is_no_law_for_others():
    base = noise(0)
    found = left(lambda s: base * (1 + 0.2 * noise(s + 1, (1, 8, 6, 1))))
    assert found["scale and shift by channel, every image its own"] < 0.05
    assert found[PAPER] > 0.3


def test_what_holds_for_a_branch_is_found_by_branch():
    base = noise(0)
    found = left(lambda s: base * (1 + 0.2 * noise(s + 1, (2, 1, 6, 1))))
    assert found["scale and shift by channel and guidance branch"] < 0.02
    assert found[PAPER] > 0.3
