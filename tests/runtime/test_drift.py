"""The drift monitor: what is measured, what it is held against, and who hears of it."""

from __future__ import annotations

import dataclasses
import doctest
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockcache.runtime import (
    Bundle,
    BundleFormatError,
    ConfigError,
    DriftMonitor,
    EmptyBackend,
    Schedule,
    Session,
    change_meter,
)
from blockcache.runtime.bundles.bundle_files import hash_files
from blockcache.runtime.bundles.tensor_files import write_tensors
from blockcache.runtime.change_meter import previous_steps
from blockcache.runtime.devices import cuda_kernels
from blockcache.runtime.devices.cuda_kernels import bind_change
from blockcache.runtime.devices.host import HostDevice
from blockcache.runtime.drift import Band
from blockcache.runtime.engines import ort
from blockcache.runtime.provenance import Provenance

PROFILE = "profiles/made.safetensors"
BLOCKS = 7
"""Of the tiny SD-like bundle."""


# -- the band --------------------------------------------------------------------------------------


def tables(recompute):
    """A random schedule's profile."""
    rng = np.random.default_rng(recompute.sum())
    return rng.uniform(0.05, 0.3, recompute.shape), rng.uniform(0.01, 0.1, recompute.shape)


@st.composite
def schedules(draw):
    steps, blocks = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    table = np.array(
        draw(st.lists(st.booleans(), min_size=steps * blocks, max_size=steps * blocks))
    )
    table = table.reshape(steps, blocks)
    table[0] = True
    return table


@given(schedules())
def test_the_output_before_is_the_last_recompute(recompute):
    before = previous_steps(recompute)
    for step, block in np.ndindex(*recompute.shape):
        earlier = [s for s in range(step) if recompute[s, block]]
        assert before[step, block] == (earlier[-1] if earlier else -1)


@given(schedules(), st.floats(0, 3))
def test_the_band_is_the_profile_summed_since_the_output_before(recompute, deviations):
    mean, std = tables(recompute)
    band = Band.of(mean, std, recompute, deviations)
    for step, block in np.ndindex(*recompute.shape):
        if step == 0 or not recompute[step, block]:
            assert np.isnan(band.low[step, block])
            assert np.isnan(band.high[step, block])
            continue
        since = max(s for s in range(step) if recompute[s, block])
        passed = slice(since + 1, step + 1)
        high = (mean[passed, block] + deviations * std[passed, block]).sum()
        assert band.high[step, block] == pytest.approx(high)
        low = mean[step, block] - deviations * std[step, block] if since == step - 1 else 0
        assert band.low[step, block] == pytest.approx(max(low, 0))


@given(schedules(), st.integers(0, 2**32 - 1))
def test_a_trajectory_that_changes_as_profiled_never_leaves_the_band(recompute, seed):
    """The reason for the sum: over several steps changes may cancel, but never add to more.

    Outputs of constant norm, for which the triangle inequality holds for the quotient too.
    """
    rng = np.random.default_rng(seed)
    steps, blocks = recompute.shape
    outputs = rng.standard_normal((steps, blocks, 30))
    outputs /= np.abs(outputs).sum(axis=2, keepdims=True)
    mean = np.zeros((steps, blocks))
    mean[1:] = np.abs(np.diff(outputs, axis=0)).sum(axis=2)
    band = Band.of(mean, np.zeros_like(mean), recompute, 0.0)
    before = previous_steps(recompute)
    for step, block in np.argwhere(recompute & (before >= 0)):
        change = np.abs(outputs[step, block] - outputs[before[step, block], block]).sum()
        assert band.low[step, block] - 1e-9 <= change <= band.high[step, block] + 1e-9


def test_the_documentation_example():
    assert doctest.testmod(change_meter).failed == 0


# -- the monitor -----------------------------------------------------------------------------------


@pytest.fixture
def profiled(bundle_copy):
    """``profiled(recompute, mean, std, **policy)``: a bundle whose first preset has a profile."""

    def make(recompute, mean, std, **policy):
        bundle = Bundle.open(bundle_copy, verify=False)
        preset = bundle.preset("ddim-4")
        write_tensors(
            bundle_copy / PROFILE,
            {"mean": np.asarray(mean, np.float32), "std": np.asarray(std, np.float32)},
        )
        files = {**bundle.manifest.files, **hash_files(bundle_copy, [PROFILE])}
        manifest = dataclasses.replace(bundle.manifest, files=files)
        bundle = dataclasses.replace(bundle, manifest=manifest)
        made = Provenance(**{"profile": PROFILE, "images": 16, **policy})
        schedule = Schedule(np.asarray(recompute, bool))
        return bundle, dataclasses.replace(preset, schedule=schedule, provenance=made)

    return make


@pytest.fixture
def watching(profiled):
    """``watching(monitor)``: it watches blocks recomputed at steps 0, 2, 3 that change by 0.1."""

    def watch(monitor):
        recompute = np.repeat([[1], [0], [1], [1]], BLOCKS, axis=1)
        mean = np.full((4, BLOCKS), 0.1)
        monitor.watch(*profiled(recompute, mean, 0.1 * mean))
        return monitor

    return watch


def change_of(monitor, *values):
    """A request whose measured change is ``values[i]`` in image i, times two over two steps."""
    made = np.full((*monitor.report().change.shape, len(values)), np.nan, np.float32)
    made[2], made[3] = 2 * np.float32(values), np.float32(values)
    return made


def test_nothing_is_judged_before_the_window_is_full(watching):
    heard = []
    monitor = watching(DriftMonitor(window=4, deviations=2, on_drift=heard.append))
    for _ in range(3):
        monitor.add(change_of(monitor, 5.0))
    report = monitor.report()
    assert (report.images, report.judged, report.drifted, heard) == (3, 0, False, [])
    assert report.measured == 2 * report.change.shape[1]
    np.testing.assert_allclose(report.change[3], 5.0)
    assert np.isnan(report.change[:2]).all()
    monitor.add(change_of(monitor, 5.0))
    assert monitor.report().judged == report.measured
    assert [each.images for each in heard] == [4]


def test_the_mean_over_the_window_counts_not_one_image(watching):
    monitor = watching(DriftMonitor(window=4, deviations=2))
    monitor.add(change_of(monitor, 0.06, 0.14, 0.07, 0.13))
    report = monitor.report()
    assert report.judged == report.measured
    assert not report.drifted
    assert "no alarm on 14 pairs of step and block after 4 images" in str(report)


def test_drift_is_told_once_until_it_has_gone(watching):
    heard = []
    monitor = watching(DriftMonitor(window=2, deviations=2, on_drift=heard.append))
    for value, told in [(0.1, 0), (0.3, 1), (0.4, 1), (0.1, 1), (0.1, 1), (0.3, 2)]:
        monitor.add(change_of(monitor, value, value))
        assert len(heard) == told, value
    assert heard[0].drifted
    assert not monitor.report().outside[0].change < 0.3


def test_the_farthest_stands_first_and_says_what_was_expected(watching):
    monitor = watching(DriftMonitor(window=1, deviations=2))
    change = change_of(monitor, 0.1)
    change[3, 1], change[2, 0] = 0.9, 0.5
    monitor.add(change)
    assert [(e.step, e.block) for e in monitor.report().outside] == [(3, 1), (2, 0)]
    assert str(monitor.report().outside[0]) == (
        "step 3 block 1: change 0.900, calibrated 0.080 to 0.120"
    )
    assert str(monitor.report()).startswith("preset ddim-4: 2 of 14 pairs of step and block after ")


def test_too_little_change_counts_one_step_apart_only(watching):
    monitor = watching(DriftMonitor(window=1, deviations=2))
    monitor.add(change_of(monitor, 0.01))
    assert {excess.step for excess in monitor.report().outside} == {3}


def test_an_infinite_change_is_outside(watching):
    monitor = watching(DriftMonitor(window=1))
    monitor.add(change_of(monitor, np.inf))
    assert len(monitor.report().outside) == monitor.report().measured


def test_the_default_is_a_warning_in_the_log(watching, caplog):
    monitor = watching(DriftMonitor(window=1))
    with caplog.at_level(logging.WARNING, "blockcache"):
        monitor.add(change_of(monitor, 9.0))
    assert "Drift: preset ddim-4: 14 of 14 pairs of step and block after " in caplog.text
    assert "Profile the model again." in caplog.text


def test_sessions_of_one_preset_share_a_monitor_and_others_may_not(profiled):
    bundle, preset = profiled(*_always())
    monitor = DriftMonitor()
    for _ in range(2):
        Session(bundle, preset, EmptyBackend(), monitor)
    other = dataclasses.replace(preset, name="other")
    with pytest.raises(ConfigError, match="sessions of one preset, 'ddim-4', got one of 'other'"):
        Session(bundle, other, EmptyBackend(), monitor)


def _always():
    return (np.full((4, BLOCKS), value) for value in (1, 0.1, 0.02))


@pytest.mark.parametrize(("window", "deviations"), [(0, 1), (8, -1), (8, float("nan"))])
def test_options_out_of_range_are_refused(window, deviations):
    with pytest.raises(ConfigError, match="Expected a window of 1 image or more and deviations"):
        DriftMonitor(window=window, deviations=deviations)


def test_an_idle_monitor_has_no_report():
    with pytest.raises(ConfigError, match="open a session with drift=monitor first"):
        DriftMonitor().report()


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        ({"profile": None}, ConfigError, "has no profile to compare with. Choose one that"),
        (
            {"images": 1},
            ConfigError,
            "a profile of 2 images or more, that of preset 'ddim-4' has 1",
        ),
        ({"profile": "../x"}, BundleFormatError, "the manifest has no such file. Compile again."),
    ],
)
def test_a_profile_that_cannot_serve_is_refused(profiled, policy, error, message):
    with pytest.raises(error, match=message):
        DriftMonitor().watch(*profiled(*_always(), **policy))


def test_a_profile_of_another_shape_is_refused(profiled):
    recompute, mean, std = _always()
    with pytest.raises(BundleFormatError, match=r"mean and std of shape \[4, 7\], got"):
        DriftMonitor().watch(*profiled(recompute, mean[:3], std))


# -- what a session measures -----------------------------------------------------------------------


def request(session, seeds=(0,), **changes):
    prompts = np.random.default_rng(1).standard_normal((len(seeds) + 1, 7, 32)).astype(np.float32)
    values = {
        "noise": session.noise(list(seeds)),
        "prompt_embeds": prompts[: len(seeds)],
        "negative_prompt_embeds": prompts[-1:],
        "guidance_scale": 3.0,
    }
    return {**values, **changes}


STEPS = [[1] * 7, [0, 1, 0, 1, 0, 1, 0], [1, 1, 0, 0, 1, 1, 1], [1, 0, 1, 0, 0, 1, 0]]


@pytest.fixture
def pair(profiled):
    """A session with a monitor and one without, on the same preset."""
    _, mean, std = _always()
    bundle, preset = profiled(STEPS, mean, std)
    backend = ort.OrtBackend()
    return Session(bundle, preset, backend, DriftMonitor()), Session(bundle, preset, backend)


def test_a_monitor_changes_no_bit_of_the_result(pair):
    watched, plain = pair
    for changes in ({}, {"seeds": (4, 5)}, {"guidance_scale": 1.0}, {}):
        ours = watched.denoise(**request(watched, **changes))
        theirs = plain.denoise(**request(plain, **changes))
        np.testing.assert_array_equal(ours.latents, theirs.latents)
        assert theirs.record.change is None
        assert ours.record.change.shape == (4, 7, len(changes.get("seeds", (0,))))
    assert watched.drift.report().images == 5


def test_without_a_monitor_there_is_one_buffer_and_no_meter(pair):
    watched, plain = pair
    assert watched.memory().blocks == 2 * plain.memory().blocks
    assert next(iter(plain._programs.values())).run_from(0).meter is None


def test_what_is_measured_is_what_was_recomputed_again(pair):
    watched, _ = pair
    change = watched.denoise(**request(watched)).record.change
    recompute = np.array(STEPS, bool)
    recompute[0] = False  # nothing before it to compare with
    np.testing.assert_array_equal(np.isfinite(change[:, :, 0]), recompute)
    assert (change[recompute] > 0).all()


def test_an_image_is_measured_the_same_alone_and_in_a_batch(pair):
    watched, _ = pair
    prompts = request(watched)
    del prompts["noise"]
    together = watched.denoise(watched.noise([3, 8]), **prompts)
    for image, seed in enumerate((3, 8)):
        alone = watched.denoise(watched.noise([seed]), **prompts)
        np.testing.assert_allclose(
            together.record.change[:, :, image], alone.record.change[:, :, 0], rtol=1e-3
        )


def test_a_late_start_measures_only_pairs_that_a_whole_run_has(pair):
    watched, _ = pair
    image = np.zeros((1, 4, 16, 16), np.float32)
    late = watched.denoise(**request(watched), image_latents=image, start_step=1)
    found = np.isfinite(late.record.change[:, :, 0])
    recompute = np.array(STEPS, bool)
    expected = recompute & (previous_steps(recompute) >= 1)
    np.testing.assert_array_equal(found, expected)
    assert expected.sum() == 4


def test_a_change_that_is_not_finite_is_told(pair):
    watched, _ = pair
    broken = request(watched)
    broken["noise"][0, 0, 0, 0] = np.nan
    change = watched.denoise(**broken).record.change
    assert np.isposinf(change[~np.isnan(change)]).all()


def test_a_cancelled_request_is_not_counted(pair):
    watched, _ = pair
    asked = iter([False, True])
    with pytest.raises(Exception, match="Cancelled before step 1 of 4"):
        watched.denoise(**request(watched), cancelled=lambda: next(asked))
    assert watched.drift.report().images == 0


def test_the_cuda_launch_measures_what_the_host_does(twin_library, monkeypatch):
    monkeypatch.setattr(cuda_kernels.kernels, "cuda_library", lambda: twin_library)
    device, rng = HostDevice(), np.random.default_rng(0)
    results = []
    now, before = (rng.standard_normal((6, 8, 3, 3)).astype(np.float32) for _ in range(2))
    for bind in (device.change, lambda *tensors: bind_change(device, 0, *tensors)):
        tensors = []
        for values in (np.zeros(3, np.float32), now, before):
            tensor = device.tensor(device.allocate(values.nbytes), 0, values.shape, "float32")
            device.upload(tensor, values)
            tensors.append(tensor)
        bind(*tensors)()
        results.append(tensors[0].array)
    sums = [np.abs(each).reshape(2, 3, -1).sum((0, 2)) for each in (now - before, now)]
    np.testing.assert_allclose(results[0], sums[0] / sums[1], rtol=1e-5)
    np.testing.assert_array_equal(*results)
