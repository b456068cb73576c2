"""The yardstick of ``blockcache check``, on the CPU: reference, plain error, what is caught."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from blockcache.export.costs.bundle_timings import bundle_timings
from blockcache.export.engines.reference import FACTOR, Comparison, relative_error, widened_bundle
from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.engines.ort import OrtBackend
from blockcache.runtime.errors import EngineError
from blockcache.tools.check.loop import WidenedBackend, check_loop
from blockcache.tools.check.segments import check_segments
from blockcache.tools.check.times import time_segments

pytest.importorskip("onnxruntime")
pytest.importorskip("polygraphy")


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


class ChannelsLast(WidenedBackend):
    """An engine library whose images are NHWC in memory, as TensorRT's are here."""

    def load(self, bundle, segment):
        engine = super().load(bundle, segment)
        bind = engine.bind

        def bind_channels_last(tensors):
            launch = bind(tensors)

            def run():
                for spec in segment.inputs:
                    if images(spec):
                        array = tensors[spec.name].array
                        n, c, h, w = array.shape
                        array[:] = array.reshape(n, h, w, c).transpose(0, 3, 1, 2).copy()
                launch()
                for spec in segment.outputs:
                    if images(spec):
                        array = tensors[spec.name].array
                        array[:] = array.transpose(0, 2, 3, 1).copy().reshape(array.shape)

            return run

        engine.bind = bind_channels_last
        return engine


def images(spec):
    return len(spec.dims) == 4 and bool(spec.dims[0].axes)


def test_layouts_of_the_engines_are_undone(half):
    wide = widened_bundle(half)
    few = only(wide, "trunk_00", "block_00")
    layouts = {
        spec.name: "hwc8"
        for segment in few.segments
        for spec in (*segment.inputs, *segment.outputs)
        if images(spec)
    }
    backend = ChannelsLast(half, rounded=False)
    backend.name = "channels-last"
    for comparison in check_segments(few, backend, layouts):
        assert comparison.error < 1e-6
    assert not check_segments(few, backend, {})[1].passed


def only(bundle, *names):
    segments = tuple(s for s in bundle.segments if s.name in names)
    manifest = dataclasses.replace(bundle.manifest, segments=segments)
    return dataclasses.replace(bundle, manifest=manifest)


def test_float32_engines_may_lose_what_tf32_loses(compiled):
    _, bundle = compiled("sd")
    (found,) = check_segments(only(bundle, "block_00"), OrtBackend(), {})
    assert found.error < 1e-6
    assert 1e-5 < found.plain_error < 1e-2  # TF32 holds 11 bits
    assert found.passed


def test_inputs_and_outputs_are_kept_for_polygraphy(half, tmp_path):
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    few = only(widened_bundle(half), "block_00")
    check_segments(few, WidenedBackend(half, rounded=True), {}, save=tmp_path)
    results = RunResults.load(str(tmp_path / "block_00.outputs.json"))
    assert [name for name, _ in results] == ["float32", "rounded", "engine"]
    (inputs,) = load_json(str(tmp_path / "block_00.inputs.json"))
    assert set(inputs) == {spec.name for spec in few.segments[0].inputs}


def test_the_median_time_of_every_segment(half):
    backend = WidenedBackend(half, rounded=True)
    steps = iter([[50.0, 60.0], [9.0, 8.0] * 2 + [1.0, 3.0, 2.0, 4.0, 9.0, 9.0]])
    backend.device.times_ms = lambda launches: next(steps)
    few = only(widened_bundle(half), "block_00", "block_01")
    assert time_segments(few, backend, repeats=3) == {"block_00": 2.0, "block_01": 4.0}


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.05, 1)])
def test_the_command_prints_the_worst_and_records_times(
    bundle_copy, monkeypatch, capsys, factor, code
):
    import typer

    from blockcache.runtime.devices import cuda_driver
    from blockcache.tools.commands import check as command

    bundle = Bundle.open(bundle_copy)
    backend = Scaled(bundle, factor)
    backend.device.times_ms = lambda launches: [0.25] * len(launches)
    backend.engine = "made-up 1.0"
    monkeypatch.setattr(command, "_engines", lambda opened, name, target: (backend, {}))
    monkeypatch.setattr(cuda_driver, "device_label", lambda: "A GPU")
    try:
        command.check(bundle_copy, loop=False, as_json=True)
        exit_code = 0
    except typer.Exit as stop:
        exit_code = stop.exit_code
    printed = json.loads(capsys.readouterr().out)
    assert exit_code == code
    assert len(printed["rows"]) == 16
    assert printed["worst"] in {row["name"] for row in printed["rows"]}
    assert all(row["passed"] is (code == 0) and row["ms"] == 0.25 for row in printed["rows"])
    (times,) = bundle_timings(bundle)
    assert (times.device, times.backend, times.sizes.batch) == ("A GPU", "made-up 1.0", 2)
    assert times.costs(bundle.segments).blocks.tolist() == [0.25] * 7


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
    pytest.importorskip("cuda.bindings.driver")
    from blockcache.runtime.devices.cuda_driver import device_count
    from blockcache.tools.commands.check import check

    if device_count():
        pytest.skip("there is a device here")
    with pytest.raises(EngineError, match="NVIDIA GPU"):
        check(half.folder)
