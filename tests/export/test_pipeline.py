"""The order of the stages: resuming, staleness, refusals. Its two expensive steps are stand-ins."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil

import numpy as np
import pytest

from blockcache.runtime import (
    Bundle,
    BundleError,
    BundleFormatError,
    BundlePathError,
    ConfigError,
    Provenance,
    Session,
    files,
)

pytest.importorskip("torch")
pytest.importorskip("diffusers")
from filelock import FileLock

from blockcache.export import measurements, pipeline, preset_maker
from blockcache.export.choose.preset import PresetOptions
from blockcache.export.costs.costs import counted
from blockcache.export.graph.to_onnx import ExportOptions
from blockcache.export.measure import change
from blockcache.export.measure.calibration import Calibration
from blockcache.export.measure.change import ProfileOptions, measure_change
from blockcache.export.measure.sampling import Sampling
from blockcache.export.measurements import MeasurementOptions
from blockcache.export.pipeline import CompileOptions, compile_model
from blockcache.runtime.solvers.diffusers_config import solver_from_diffusers

PROFILE = ProfileOptions(prompts=2, seeds=2, images_at_once=2)  # four images in two batches


# -- a compile without its expensive steps ---------------------------------------------------------


@pytest.fixture
def model(tiny_models):
    return tiny_models("small")


@pytest.fixture
def calibration(conditions_of, model):
    return Calibration(conditions_of(model, 2), conditions_of(model, 1, seed=5))


@pytest.fixture
def calls(compiled, copied_segments, monkeypatch):
    """Names of the expensive stages that ran; they copy segments and make changes up."""
    made, really = [], pipeline.export_segments

    def export(model, folder, options, observer):
        made.append("export")
        with pytest.MonkeyPatch.context() as patch:  # these, compiled once, are exported really
            patch.setattr(pipeline, "export_segments", really)
            _, source = compiled("small", options.outputs, options.precision)
        return copied_segments(source, folder)

    def profile(*args, **kwargs):
        made.append("profile")
        return measure_change(*args, **kwargs)

    def measure(sampling, cached, jobs, accumulator):
        for prompt, seed in jobs:
            change = (1 + prompt + 10 * seed) / 32  # the mean is 0.203125
            accumulator.sums[:, 1:] += np.array([change, change**2])[:, None, None]
        accumulator.images += len(jobs)

    monkeypatch.setattr(pipeline, "export_segments", export)
    monkeypatch.setattr(measurements, "measure_change", profile)
    monkeypatch.setattr(change, "_measure_batch", measure)
    return made


def options(*presets, **changes):
    parsed = tuple(PresetOptions.parse(text) for text in presets or ("ddim:2:0.1",))
    measurement = MeasurementOptions(profile=PROFILE)
    return CompileOptions(presets=parsed, measurement=measurement, **changes)


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture
def uninterrupted(model, calibration, calls, tmp_path):
    """The manifest of a compile that nothing disturbed."""
    compile_model(model, tmp_path / "whole", options(), calibration)
    calls.clear()
    return manifest(tmp_path / "whole")


def test_a_compile_gives_a_bundle_that_verifies(model, calibration, calls, tmp_path):
    heard = []
    made = compile_model(
        model, tmp_path / "b", options("ddim:2:0.1", "dpm:3"), calibration,
        lambda *progress: heard.append(progress),
    ).bundle  # fmt: skip
    assert calls == ["export", "profile"]
    assert Bundle.open(tmp_path / "b").manifest == made.manifest
    assert made.manifest.presets["dpm-3"].computed_fraction == 1.0
    preset = made.preset("ddim-2-d0.1")
    policy = preset.provenance.to_json()
    assert policy.pop("profile") in made.manifest.files
    predicted = counted(made.segments).speedup(preset.schedule)
    assert policy.pop("predicted_speedup") == pytest.approx(predicted, abs=1e-6)
    assert policy == {"kind": "threshold", "value": 0.1, "costs": "FLOPs", "images": 4}
    assert made.preset("dpm-3").provenance == Provenance(
        kind="uncached", costs="FLOPs", predicted_speedup=1.0
    )
    stages = [stage for stage, _, _ in heard]
    assert list(dict.fromkeys(stages)) == ["export", "presets", "profile ddim-2"]
    for stage in set(stages):
        done = [(count, total) for name, count, total in heard if name == stage]
        assert done == sorted(done)
        assert done[-1][0] == done[-1][1]


def test_an_unchanged_compile_redoes_nothing(model, calibration, calls, tmp_path):
    compile_model(model, tmp_path / "b", options(), calibration)
    before = manifest(tmp_path / "b")
    calls.clear()
    compile_model(model, tmp_path / "b", options(), calibration)
    assert calls == []
    assert manifest(tmp_path / "b") == before


def test_another_delta_makes_one_preset_more(model, calibration, calls, tmp_path):
    compile_model(model, tmp_path / "b", options("ddim:2:0.1"), calibration)
    calls.clear()
    made = compile_model(model, tmp_path / "b", options("ddim:2:9"), calibration).bundle
    assert calls == []
    assert list(made.preset_names) == ["ddim-2-d0.1", "ddim-2-d9"]
    assert not made.preset("ddim-2-d9").schedule.recompute[1:].any()


def test_presets_that_differ_in_delta_share_a_profile(model, calibration, calls, tmp_path):
    compile_model(model, tmp_path / "b", options("ddim:2:0.1", "ddim:2:0.2"), calibration)
    assert calls.count("profile") == 1


def test_other_prompts_profile_again_but_export_once(model, calibration, calls, tmp_path):
    compile_model(model, tmp_path / "b", options(), calibration)
    other = {name: values + 1 for name, values in calibration.positive.items()}
    compile_model(model, tmp_path / "b", options(), Calibration(other, calibration.negative))
    assert calls == ["export", "profile", "profile"]


def test_other_export_options_export_again(model, calls, tmp_path):
    compile_model(model, tmp_path / "b", options("ddim:2"))
    other = dataclasses.replace(options("ddim:2"), export=ExportOptions(hoist=False))
    compile_model(model, tmp_path / "b", other)
    assert calls == ["export", "export"]


def test_a_damaged_file_is_made_again(model, calls, tmp_path):
    compile_model(model, tmp_path / "b", options("ddim:2"))
    path = next((tmp_path / "b").glob("segments/*/trunk_00.onnx"))
    path.write_bytes(path.read_bytes()[:-1])
    compile_model(model, tmp_path / "b", options("ddim:2"))
    assert calls == ["export", "export"]
    Bundle.open(tmp_path / "b")


# -- interrupts ------------------------------------------------------------------------------------


def interrupted(function, times=1, error=SystemExit):
    """``function``, then an interrupt after the given number of calls have returned."""
    count = []

    def wrapped(*args, **kwargs):
        result = function(*args, **kwargs)
        count.append(None)
        if len(count) == times:
            raise error
        return result

    return wrapped


STAGES = {
    "after the profile": (measurements, "write_tensors", ["profile"]),
    "after the export": (pipeline, "_costs", ["profile"]),
    "before the manifest": (pipeline, "keep_presets", []),
}


@pytest.mark.parametrize(("module", "stage", "left"), STAGES.values(), ids=STAGES.keys())
def test_an_interrupted_compile_is_no_bundle_and_resumes(
    model, calibration, calls, uninterrupted, tmp_path, monkeypatch, module, stage, left
):
    folder = tmp_path / "b"
    with monkeypatch.context() as patch:
        patch.setattr(module, stage, interrupted(getattr(module, stage)))
        with pytest.raises(SystemExit):
            compile_model(model, folder, options(), calibration)
    assert not (folder / "manifest.json").exists()
    with pytest.raises(BundleFormatError, match="run blockcache compile again to resume it"):
        Bundle.open(folder)
    calls.clear()
    compile_model(model, folder, options(), calibration)
    assert calls == left
    assert manifest(folder) == uninterrupted


def test_an_interrupted_profile_goes_on_where_it_stopped(
    model, calibration, calls, uninterrupted, tmp_path, monkeypatch
):
    folder, measured = tmp_path / "b", []
    real = change._measure_batch  # the stand-in of ``calls``

    def counted(*args, **kwargs):
        measured.append(None)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(change._Accumulator, "save", interrupted(change._Accumulator.save))
        with pytest.raises(SystemExit):
            compile_model(model, folder, options(), calibration)
    assert not (folder / "manifest.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(change, "_measure_batch", counted)
        compile_model(model, folder, options(), calibration)
    assert len(measured) == 1  # of two
    assert manifest(folder) == uninterrupted
    assert not list(folder.rglob("*.partial*"))


def test_an_interrupted_first_call_may_be_followed_by_any_other(
    model, calls, tmp_path, monkeypatch
):
    folder = tmp_path / "b"
    with monkeypatch.context() as patch:
        patch.setattr(preset_maker, "time_tables", interrupted(preset_maker.time_tables))
        with pytest.raises(SystemExit):
            compile_model(model, folder, options("ddim:2"))
    made = compile_model(model, folder, options("ddim:3")).bundle
    assert list(made.preset_names) == ["ddim-3"]
    assert not any("ddim-2" in name for name in made.manifest.files)


# -- old until new is whole ------------------------------------------------------------------------

WRITES = ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink")
"""What changes a disk; every write of ours ends in one of them."""


class Stop:
    """Lets ``at`` changes of the disk happen; then one fails, or all, as after a kill."""

    def __init__(self, at, forever):
        self.at, self.forever, self.count = at, forever, 0

    def around(self, function):
        def call(*args, **kwargs):
            self.count += 1
            if self.count > self.at and (self.forever or self.count == self.at + 1):
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call


def stopped_compile(compile_again, at, forever):
    """Run a compile that stops at a change of the disk; False where it was finished before."""
    stop = Stop(at, forever)
    with pytest.MonkeyPatch.context() as patch:
        for name in WRITES:
            patch.setattr(os, name, stop.around(getattr(os, name)))
        with contextlib.suppress(KeyboardInterrupt):
            compile_again()
    return stop.count > at


def files_of(folder):
    """All files of a finished bundle with their content, but for the records of the stages."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".stages" not in path.parts and path.name != ".lock"
    }


STOPS = {
    "another preset, killed": (("ddim:2:9",), 5.0, ExportOptions(), True),
    "another preset, interrupted": (("ddim:2:9",), 5.0, ExportOptions(), False),
    "another export, killed": (("ddim:2:0.1", "ddim:3"), 5.0, ExportOptions(outputs=2), True),
    "another content of one name, killed": (("ddim:2:0.1",), 3.0, ExportOptions(), True),
}


@pytest.mark.parametrize(
    ("presets", "guidance", "export", "forever"), STOPS.values(), ids=STOPS.keys()
)
def test_wherever_a_compile_stops_the_old_bundle_or_the_new_one_is_whole(
    model, calibration, calls, tmp_path, presets, guidance, export, forever
):
    measurement = MeasurementOptions(profile=PROFILE, guidance_scale=guidance)
    wanted = dataclasses.replace(options(*presets, export=export), measurement=measurement)
    first, whole = tmp_path / "first", tmp_path / "whole"
    old = compile_model(model, first, options("ddim:2:0.1", "dpm:2"), calibration).bundle
    shutil.copytree(first, whole)
    new = compile_model(model, whole, wanted, calibration).bundle
    assert new.manifest != old.manifest
    at, stopped, seen = 0, True, set()
    while stopped:
        folder = tmp_path / str(at)
        shutil.copytree(first, folder)
        stopped = stopped_compile(
            lambda folder=folder: compile_model(model, folder, wanted, calibration), at, forever
        )
        opened = Bundle.open(folder)  # every file is there, with the content that is promised
        assert opened.manifest in (old.manifest, new.manifest)
        seen.add(opened.manifest == new.manifest)
        for name in opened.preset_names:
            assert opened.preset(name).name == name
        compile_model(model, folder, wanted, calibration)
        assert files_of(folder) == files_of(whole)
        shutil.rmtree(folder)
        at += 1
    assert at > 10
    assert seen == {False, True}


def test_the_old_bundle_still_draws_after_a_failed_export(
    model, conditions_of, calls, tmp_path, monkeypatch
):
    folder = tmp_path / "b"
    compile_model(model, folder, options("ddim:2"))

    def drawn():
        session = Session.open(folder, backend="ort", threads=1)
        prompt = conditions_of(model, 1)["encoder_hidden_states"]
        return session.denoise(session.noise([0]), prompt, guidance_scale=1).latents

    before = drawn()

    def fails(model, fresh, options, observer):
        (fresh / "trunk_00.onnx").write_bytes(b"half")
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pipeline, "export_segments", fails)
    other = dataclasses.replace(options("ddim:2"), export=ExportOptions(hoist=False))
    with pytest.raises(RuntimeError):
        compile_model(model, folder, other)
    np.testing.assert_array_equal(drawn(), before)
    assert len(list((folder / "segments").iterdir())) == 1


def test_a_preset_more_does_not_write_the_segments_again(model, calls, tmp_path):
    folder = tmp_path / "b"
    compile_model(model, folder, options("ddim:2"))
    before = {path: path.stat().st_mtime_ns for path in (folder / "segments").rglob("*")}
    compile_model(model, folder, options("ddim:3"))
    assert {path: path.stat().st_mtime_ns for path in (folder / "segments").rglob("*")} == before


def test_what_nobody_names_any_more_is_deleted_and_the_rest_is_left(model, calls, tmp_path):
    folder = tmp_path / "b"
    compile_model(model, folder, options("ddim:2"))
    for name in ("engines/sm80/engines.json", "times/a.json"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("{}")
    (folder / "presets" / ".0123.partial").write_text("half")
    (folder / "segments" / "old").mkdir()
    (folder / "segments" / "old" / "weights.bin").write_text("of another export")
    bundle = compile_model(model, folder, options("ddim:2")).bundle
    others = {"manifest.json", "engines/sm80/engines.json", "times/a.json"}
    assert files_of(folder).keys() == {*bundle.manifest.files, *others}
    assert not (folder / "segments" / "old").exists()


# -- presets are added to those that are there -----------------------------------------------------


def test_the_result_says_what_became_of_every_preset(model, calibration, calls, tmp_path):
    folder = tmp_path / "b"
    made = compile_model(model, folder, options("ddim:2:0.1", "ddim:3"), calibration)
    assert (made.added, made.replaced, made.kept) == (("ddim-2-d0.1", "ddim-3"), (), ())
    assert (made.removed, made.unreadable) == ({}, "")
    again = compile_model(model, folder, options("ddim:2:0.1"), calibration)
    assert (again.added, again.replaced) == ((), ())
    assert again.kept == ("ddim-2-d0.1", "ddim-3")
    named = dataclasses.replace(PresetOptions.parse("ddim:2:9"), name="ddim-2-d0.1")
    other = dataclasses.replace(options("dpm:2"), presets=(named, *options("dpm:2").presets))
    changed = compile_model(model, folder, other, calibration)
    assert changed.added == ("dpm-2",)
    assert changed.replaced == ("ddim-2-d0.1",)
    assert changed.kept == ("ddim-3",)
    assert changed.bundle.preset_names == ("ddim-2-d0.1", "ddim-3", "dpm-2")


def test_a_kept_preset_brings_its_reports(model, calibration, calls, tmp_path):
    folder = tmp_path / "b"
    first = compile_model(model, folder, options("ddim:2:0.1"), calibration).bundle
    profile = first.preset("ddim-2-d0.1").provenance.profile
    shutil.rmtree(folder / ".stages")
    bundle = compile_model(model, folder, options("dpm:2")).bundle
    assert profile in bundle.manifest.files
    assert bundle.preset("ddim-2-d0.1") == first.preset("ddim-2-d0.1")


def test_presets_of_another_precision_are_removed_and_it_is_said(model, calls, tmp_path):
    folder = tmp_path / "b"
    compile_model(model, folder, options("ddim:2"))
    half = dataclasses.replace(options("dpm:2"), export=ExportOptions(precision="bfloat16"))
    made = compile_model(model, folder, half)
    assert made.removed == {"ddim-2": "it was made for a U-Net of another precision"}
    assert made.bundle.preset_names == ("dpm-2",)


def test_presets_of_other_weights_are_removed_and_it_is_said(model, calls, tmp_path):
    folder = tmp_path / "b"
    compile_model(model, folder, options("ddim:2"))
    made = compile_model(dataclasses.replace(model, sha256="0" * 64), folder, options("dpm:2"))
    assert made.removed == {"ddim-2": "it was made for a U-Net of other weights"}


def test_a_bundle_with_a_damaged_preset_gives_nothing_and_it_is_said(model, calls, tmp_path):
    folder = tmp_path / "b"
    bundle = compile_model(model, folder, options("ddim:2", "ddim:3")).bundle
    file = bundle.manifest.presets["ddim-2"].file
    content = bytearray((folder / file).read_bytes())
    content[-1] ^= 1
    (folder / file).write_bytes(content)
    made = compile_model(model, folder, options("dpm:2"))
    assert made.unreadable.startswith(f"The content of {file} does not match its sha256")
    assert made.bundle.preset_names == ("dpm-2",)
    Bundle.open(folder)


def test_a_bundle_that_is_none_gives_nothing_and_it_is_said(model, calls, tmp_path):
    folder = tmp_path / "b"
    compile_model(model, folder, options("ddim:2"))
    (folder / "manifest.json").write_text("{}")
    made = compile_model(model, folder, options("dpm:2"))
    assert made.unreadable.startswith("Expected a blockcache-bundle manifest")
    assert made.added == ("dpm-2",)


def test_a_preset_that_stays_is_fitted_to_segments_with_history(model, calls, tmp_path):
    """Adding a preset that combines two outputs: the others get tables of that form."""
    folder = tmp_path / "b"
    compile_model(model, folder, options("ddim:2"))
    history = dataclasses.replace(options("ddim:3"), export=ExportOptions(outputs=2))
    made = compile_model(model, folder, history)
    assert made.kept == ("ddim-2",)
    assert made.bundle.preset("ddim-2").alignment.outputs == 2
    Session.open(made.bundle, preset="ddim-2", backend="empty")
    later = compile_model(model, folder, options("dpm:2")).bundle  # needs one output only
    assert later.model.outputs == 2
    assert later.preset_names == ("ddim-2", "ddim-3", "dpm-2")


def test_a_bundle_that_would_not_open_replaces_nothing(
    model, compiled, copied_segments, calls, tmp_path, monkeypatch
):
    """Segments that contradict the manifest: found before the switch."""
    folder = tmp_path / "b"
    before = compile_model(model, folder, options("ddim:2")).bundle
    _, plain = compiled("small")
    monkeypatch.setattr(
        pipeline, "export_segments", lambda _, to, *rest: copied_segments(plain, to)
    )
    history = dataclasses.replace(options("ddim:3"), export=ExportOptions(outputs=2))
    with pytest.raises(BundleFormatError, match="every tensor to be read"):
        compile_model(model, folder, history)
    assert Bundle.open(folder).manifest == before.manifest


# -- the recommended preset ------------------------------------------------------------------------


def test_the_first_preset_that_caches_is_recommended(model, calibration, calls, tmp_path):
    wanted = options("ddim:2", "ddim:2:9", "ddim:2:8")
    bundle = compile_model(model, tmp_path / "b", wanted, calibration).bundle
    assert bundle.recommended == "ddim-2-d9"
    assert bundle.preset().name == "ddim-2-d9"


def test_a_recommendation_stays_until_another_is_asked_for(model, calibration, calls, tmp_path):
    folder = tmp_path / "b"
    assert compile_model(model, folder, options("ddim:2")).bundle.recommended == "ddim-2"
    made = compile_model(model, folder, options("ddim:2:9"), calibration)
    assert made.bundle.recommended == "ddim-2-d9"  # the first that caches
    made = compile_model(model, folder, options("ddim:2:8"), calibration)
    assert made.bundle.recommended == "ddim-2-d9"
    made = compile_model(model, folder, options("ddim:3", recommended="ddim-2-d8"))
    assert made.bundle.recommended == "ddim-2-d8"


def test_a_recommended_preset_that_is_unknown_is_refused_before_any_work(model, calls, tmp_path):
    with pytest.raises(ConfigError) as caught:
        compile_model(model, tmp_path / "b", options("ddim:2", recommended="ddim-3"))
    assert str(caught.value) == "Expected a recommended preset of ['ddim-2'], got 'ddim-3'."
    assert calls == []


def test_a_recommended_preset_that_cannot_stay_leaves_the_old_bundle(model, calls, tmp_path):
    folder = tmp_path / "b"
    before = compile_model(model, folder, options("ddim:2")).bundle
    half = ExportOptions(precision="bfloat16")
    with pytest.raises(ConfigError, match=r"of \['dpm-2'\], got 'ddim-2'"):
        compile_model(model, folder, options("dpm:2", export=half, recommended="ddim-2"))
    assert Bundle.open(folder).manifest == before.manifest


# -- refusals --------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_else_is_refused(model, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        compile_model(model, tmp_path, options("ddim:2"))
    assert str(caught.value) == (
        f"Expected an empty folder or a bundle at {tmp_path}, it holds other files. "
        f"Choose another folder."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["segments", "presets", "profiles", ".stages", ".lock"])
def test_a_folder_of_the_bundle_that_links_elsewhere_is_refused(model, calls, tmp_path, name):
    folder, outside = tmp_path / "b", tmp_path / "outside"
    compile_model(model, folder, options("ddim:2"))
    outside.mkdir()
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    with pytest.raises(BundlePathError, match="outside the bundle"):
        compile_model(model, folder, options("ddim:2"))
    assert not any(outside.iterdir())


def test_a_bundle_that_was_copied_without_its_records_is_taken(model, calls, tmp_path):
    folder = tmp_path / "b"
    compile_model(model, folder, options("ddim:2"))
    shutil.rmtree(folder / ".stages")
    made = compile_model(model, folder, options("ddim:3"))
    assert made.kept == ("ddim-2",)


def test_a_second_compile_into_the_same_folder_is_refused(model, calls, tmp_path):
    folder = tmp_path / "b"
    compile_model(model, folder, options("ddim:2"))
    with FileLock(folder / ".lock"), pytest.raises(ConfigError) as caught:
        compile_model(model, folder, options("ddim:2"))
    assert str(caught.value) == (
        f"Another compile is writing to {folder}. Wait for it: what it finishes is kept."
    )


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_reported_and_resumed(model, calls, tmp_path, monkeypatch, code):
    folder = tmp_path / "b"

    def full(*args):
        raise OSError(code, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_preset", full)
        with pytest.raises(BundleError) as caught:
            compile_model(model, folder, options("ddim:2"))
    text = str(caught.value)
    assert text.startswith("The disk is full (")
    assert f"GB free at {folder}). Free some space and run the same command again" in text
    assert not (folder / "manifest.json").exists()
    compile_model(model, folder, options("ddim:2"))
    assert calls == ["export"]


def test_a_disk_that_is_full_for_tensors_is_reported_too(model, calls, tmp_path, monkeypatch):
    """Tensors are written by Python itself: safetensors would report in a class of its own."""

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(BundleError, match="The disk is full"):
        compile_model(model, tmp_path / "b", options("ddim:2"))


def test_another_operating_system_error_is_not_called_a_full_disk(
    model, calls, tmp_path, monkeypatch
):
    def denied(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(pipeline, "write_preset", denied)
    with pytest.raises(PermissionError):
        compile_model(model, tmp_path / "b", options("ddim:2"))


@pytest.mark.parametrize("text", ["ddim:2:blocks9", "ddim:2:t9", "ddim:2:c9:history"])
def test_a_speed_up_out_of_reach_is_refused_before_any_measurement(
    model, calibration, calls, tmp_path, text
):
    with pytest.raises(ConfigError) as caught:
        compile_model(model, tmp_path / "b", options(text), calibration)
    assert calls == ["export"]
    found = re.fullmatch(
        r"A speed-up of 9 is out of reach with 2 steps: the trunk always runs, and every block at "
        r"step 0. Expected at most (1\.[0-9]+), or max for the most there is\.",
        str(caught.value),
    )
    within = compile_model(model, tmp_path / "b", options(f"ddim:2:t{found[1]}"), calibration)
    most = compile_model(model, tmp_path / "b", options("ddim:2:tmax"), calibration)
    for result, name in ((within, f"ddim-2-t{found[1]}"), (most, "ddim-2-tmax")):
        made = result.bundle.preset(name)
        assert (made.schedule.recompute.sum(axis=0) == 1).all()
        assert made.provenance.predicted_speedup == pytest.approx(float(found[1]), abs=1e-3)


def test_a_measured_policy_without_prompts_is_refused_before_any_work(model, calls, tmp_path):
    with pytest.raises(ConfigError) as caught:
        compile_model(model, tmp_path / "b", options("ddim:2:0.1"))
    assert str(caught.value) == (
        "Preset 'ddim-2-d0.1' is made from measurements and needs prompts to measure with: give a "
        "calibration (--calibration FILE), or leave out policy and alignment."
    )
    assert calls == []


def without_scheduler(model):
    return dataclasses.replace(model, scheduler={})


def test_a_missing_scheduler_is_refused(model, calls, tmp_path):
    with pytest.raises(ConfigError) as caught:
        compile_model(without_scheduler(model), tmp_path / "b", options("ddim:2"))
    assert str(caught.value) == (
        "Expected scheduler/scheduler_config.json beside the U-Net of 'tiny-small': the noise "
        "schedule it was trained with is in no other place. Save the pipeline's scheduler there."
    )


def test_a_scheduler_of_another_kind_is_told_once(model, calls, tmp_path):
    distilled = {**model.scheduler, "_class_name": "LCMScheduler"}
    other = dataclasses.replace(model, scheduler=distilled)
    with pytest.warns(UserWarning, match="its scheduler is LCMScheduler, which") as told:
        compile_model(other, tmp_path / "bundle", options("ddim:2", "ddim:4"))
    assert len(told) == 1


@pytest.mark.parametrize("preset", ["ddim:2", "ddim:2000"])
def test_a_solver_that_cannot_work_is_refused_before_the_export(model, calls, tmp_path, preset):
    source = without_scheduler(model) if preset == "ddim:2" else model
    with pytest.raises(ConfigError):
        compile_model(source, tmp_path / "b", options(preset))
    assert calls == []


# -- profile ---------------------------------------------------------------------------------------


def test_a_profile_is_the_same_in_any_batching_and_after_any_interrupt(
    model, calibration, tmp_path, monkeypatch
):
    solver = solver_from_diffusers(model.scheduler, solver="ddim", steps=2)
    sampling = Sampling(model, solver, calibration, 3.0)

    def measured(images_at_once, checkpoint=None):
        chosen = ProfileOptions(prompts=2, seeds=1, images_at_once=images_at_once)
        return measure_change(sampling, chosen, checkpoint=checkpoint)

    whole = measured(2)
    path = tmp_path / "partial.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(change._Accumulator, "save", interrupted(change._Accumulator.save))
        with pytest.raises(SystemExit):
            measured(1, path)
    resumed = measured(2, path)
    assert whole.images == resumed.images == 2
    assert not whole.mean[0].any()
    assert (whole.mean[1:] > 0).all()
    assert (whole.std[1:] > 0).all()
    # A mean of float32 differences in another order: parts in 1e5 of the change.
    np.testing.assert_allclose(resumed.mean, whole.mean, rtol=1e-4)
    np.testing.assert_allclose(resumed.std, whole.std, rtol=1e-3, atol=1e-6)


def test_profile_options_are_at_least_one():
    with pytest.raises(ConfigError, match="Profile at least one prompt, seed and image at once"):
        ProfileOptions(seeds=0)
