"""The yardstick of ``blockcache check``, on the CPU: reference, plain error, what is caught."""

from __future__ import annotations

import numpy as np
import pytest

from blockcache.export.check import FACTOR, Comparison, relative_error
from blockcache.runtime.errors import EngineError
from blockcache.tools.engine_check import (
    WidenedBackend,
    check_loop,
    check_segments,
    widened_bundle,
)

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def half(compiled):
    _, bundle = compiled("sd", 1, "bfloat16")
    return bundle


class Scaled(WidenedBackend):
    """An engine library that is wrong by a factor."""

    def __init__(self, half, factor):
        super().__init__(half, rounded=True)
        self.factor, self.name = factor, f"scaled-{factor}"

    def load(self, bundle, segment):
        engine = super().load(bundle, segment)
        bind = engine.bind

        def scaled(tensors):
            launch = bind(tensors)

            def run():
                launch()
                for spec in segment.outputs:
                    tensors[spec.name].array[:] *= self.factor

            return run

        engine.bind = scaled
        return engine


def test_a_plain_half_precision_engine_is_within_the_tolerance(half):
    found = check_segments(widened_bundle(half), WidenedBackend(half, rounded=True), {})
    assert [c.name for c in found][:2] == ["prompt", "trunk_00"]
    for comparison in found:
        assert comparison.passed, comparison
        assert 1e-4 < comparison.plain_error < 2e-2, comparison  # bfloat16 holds 8 bits


def test_a_wrong_engine_is_caught(half):
    found = check_segments(widened_bundle(half), Scaled(half, 1.05), {})
    assert not any(comparison.passed for comparison in found)


def test_the_loop_is_compared_as_a_whole(half):
    wide = widened_bundle(half)
    same = check_loop(wide, WidenedBackend(half, rounded=True), "ddim-4")
    assert same.ratio == 1
    assert same.plain_error > 0
    assert not check_loop(wide, Scaled(half, 1.05), "ddim-4").passed


def test_the_tolerance_is_twice_the_plain_error():
    assert Comparison("a", FACTOR * 1e-3, 1e-3).passed
    assert not Comparison("a", FACTOR * 1.01e-3, 1e-3).passed
    assert Comparison("a", 0.0, 0.0).passed
    assert relative_error(np.array([np.nan]), np.array([1.0])) == np.inf


def test_check_without_a_device_says_what_to_do(half):
    pytest.importorskip("cuda.bindings.runtime")
    from blockcache.runtime.cuda import device_count
    from blockcache.tools.commands.check import check

    if device_count():
        pytest.skip("there is a device here")
    with pytest.raises(EngineError, match="NVIDIA GPU"):
        check(half.folder)
