"""Presets take turns; a finished timing is read back, another set is timed anew."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from blockcache.tools.evaluation import timing
from blockcache.tools.evaluation.options import TimingOptions
from blockcache.tools.evaluation.subject import Subject


class FakeDrawings:
    """Sessions that note who ran when, and by how much guidance."""

    def __init__(self):
        self.ran = []

    def key(self, preset):
        return f"key-{preset.name}"

    def guidance(self, preset):
        return 2.5

    def open(self, preset):
        def denoise(noise, states, empty, **rest):
            self.ran.append((preset.name, len(noise), rest["guidance_scale"]))

        return SimpleNamespace(preset=preset, denoise=denoise, noise=lambda seeds: list(seeds))


@pytest.fixture
def subject():
    states = np.zeros((2, 3, 4), np.float32)
    return Subject(
        captions=("a", "b"),
        prompts=np.array([0, 1]),
        positive={"encoder_hidden_states": states},
        negative={"encoder_hidden_states": states[:1]},
        about="",
    )


def contestants(*names):
    return [SimpleNamespace(name=name, preset=SimpleNamespace(name=name)) for name in names]


def test_presets_take_turns_and_the_first_round_is_not_counted(subject, tmp_path):
    drawings, options = FakeDrawings(), TimingOptions(rounds=2, images=3)
    heard = []
    found = timing.measure(
        contestants("a", "b"), drawings, subject, options, tmp_path, lambda *at: heard.append(at)
    )
    assert [name for name, _, _ in drawings.ran] == ["a", "b"] * 3
    assert {(images, guidance) for _, images, guidance in drawings.ran} == {(3, 2.5)}
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 2, "b": 2}
    assert heard[0] == (0, 6)
    assert heard[-1] == (6, 6)

    again = FakeDrawings()
    assert timing.measure(contestants("a", "b"), again, subject, options, tmp_path) == found
    assert again.ran == []
    timing.measure(contestants("a"), again, subject, options, tmp_path)
    assert len(again.ran) == 3


def test_speedup_pairs_the_rounds():
    found = timing.speedup([4.0, 9.0, 8.0], [2.0, 3.0, 2.0])
    assert (found.median, found.low, found.high) == (3.0, 2.0, 4.0)
    assert timing.images_per_second([0.5, 2.0, 1.0], 4).median == 4.0
