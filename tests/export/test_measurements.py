"""Measured presets, whole: compiled, resumed, refused, and run by the runtime."""

from __future__ import annotations

import dataclasses
import json
import shutil
from copy import deepcopy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")

from blockcache.export import measurements, pipeline  # noqa: E402
from blockcache.export.align.distil import DistillationOptions  # noqa: E402
from blockcache.export.align.fit import AlignmentOptions, fit_alignment  # noqa: E402
from blockcache.export.choose.policies import Policy  # noqa: E402
from blockcache.export.choose.preset import PresetOptions  # noqa: E402
from blockcache.export.costs.costs import counted  # noqa: E402
from blockcache.export.costs.roofline import gpu, predict  # noqa: E402
from blockcache.export.costs.timings import Timings  # noqa: E402
from blockcache.export.graph.to_onnx import ExportOptions, export_segments  # noqa: E402
from blockcache.export.measure.calibration import Calibration  # noqa: E402
from blockcache.export.measure.change import ProfileOptions  # noqa: E402
from blockcache.export.measure.converged import ConvergedOptions  # noqa: E402
from blockcache.export.measure.residuals import ResidualOptions  # noqa: E402
from blockcache.export.measure.sampling import Sampling, steps_of  # noqa: E402
from blockcache.export.measure.sensitivity import SensitivityOptions  # noqa: E402
from blockcache.export.measurements import MeasurementOptions  # noqa: E402
from blockcache.export.pipeline import CompileOptions, compile_model  # noqa: E402
from blockcache.export.unet.cached_unet import CachedUNet, Denoiser  # noqa: E402
from blockcache.export.unet.scheduler import made_scheduler, scheduler_config  # noqa: E402
from blockcache.export.unet.steps import TableSteps  # noqa: E402
from blockcache.runtime import Bundle, ConfigError, Session  # noqa: E402
from blockcache.runtime.bundles.tensor_files import read_tensors  # noqa: E402
from blockcache.runtime.provenance import Provenance  # noqa: E402
from blockcache.runtime.solvers.recorded import recorded_solver  # noqa: E402
from blockcache.runtime.solvers.solver import SolverConfig, solver_tables  # noqa: E402

MEASUREMENT = MeasurementOptions(
    guidance_scale=3.0,
    converged=ConvergedOptions(levels=20, images=1, gains=2),
    profile=ProfileOptions(prompts=2, seeds=1, images_at_once=2),
    sensitivity=SensitivityOptions(images=1),
    residuals=ResidualOptions(images=1),
    alignment=AlignmentOptions(images=2),
    distillation=DistillationOptions(iterations=1, images_at_once=1),
)
BUDGET = "dpm:4:blocks1.1:history"
STAGES = (
    "converged_run",
    "measure_gains",
    "fine_run",
    "measure_change",
    "measure_sensitivity",
    "measure_residuals",
    "fit_alignment",
    "distil",
    "judge_alignment",
)


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models("sd")


@pytest.fixture(scope="module")
def calibration(model, conditions_of):
    return Calibration(conditions_of(model, 2), conditions_of(model, 1, seed=5))


def options(*presets, **changes):
    """Segments that combine two outputs, whether a preset asks for them or not: one export."""
    return CompileOptions(
        presets=tuple(PresetOptions.parse(text) for text in presets),
        export=ExportOptions(outputs=2),
        measurement=dataclasses.replace(MEASUREMENT, **changes),
    )


@pytest.fixture(scope="module")
def calls(compiled, copied_segments):
    """Names of the measurements that ran; the export copies segments made before."""
    made = []
    bundles = {name: compiled("sd", 2, name)[1] for name in ("float32", "bfloat16")}

    def export(model, folder, options, observer):
        return copied_segments(bundles[options.precision], folder)

    def counted(name, function):
        def call(*args, **kwargs):
            made.append(name)
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "export_segments", export)
        for name in STAGES:
            function = getattr(measurements, name)
            patch.setattr(measurements, name, counted(name, function))
        yield made


@pytest.fixture(scope="module")
def made(model, calibration, calls, tmp_path_factory):
    """(The bundle of the budget preset with history, the measurements it took, the progress)."""
    calls.clear()
    heard = []
    bundle = compile_model(
        model, tmp_path_factory.mktemp("budget") / "b", options(BUDGET), calibration,
        lambda *progress: heard.append(progress),
    ).bundle  # fmt: skip
    return bundle, list(calls), heard


@pytest.fixture
def copy(made, tmp_path, calls):
    """The folder of a private copy of the bundle; nothing has been called yet."""
    shutil.copytree(made[0].folder, tmp_path / "b")
    calls.clear()
    return tmp_path / "b"


def relative(ours, reference):
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def test_a_latency_on_a_gpu_that_is_not_at_hand(made, copy, model, calibration, calls):
    """The budget counts in the milliseconds that the roofline predicts."""
    bundle = made[0]
    sizes = dataclasses.replace(bundle.model.sizes, batch=2)  # guidance
    costs = predict(bundle.segments, bundle.folder, gpu("a100"), sizes).costs(bundle.segments)
    within = costs.uncached(4) / 1.2
    preset = PresetOptions.parse(f"dpm:4:blocksms{within:.4f}:history")
    wanted = dataclasses.replace(options(BUDGET), presets=(preset,), processor=gpu("a100"))
    made_for_it = compile_model(model, copy, wanted, calibration).bundle.preset(preset.name)
    assert made_for_it.provenance.costs == "a100, roofline"
    schedule = made_for_it.schedule
    assert 0.9 * within < costs.image(schedule) <= within * 1.001
    assert schedule.computed_fraction(costs.blocks) < 1
    assert calls == ["fit_alignment"]

    two_images = Timings("trt", "", dataclasses.replace(sizes, batch=4), {"trunk_00": 1.0})
    wrong = dataclasses.replace(wanted, processor=None, timings=two_images)
    with pytest.raises(
        ConfigError, match=r"dpm-4-blocksms.*needs times of one image, at .* Measure with --images"
    ):
        compile_model(model, copy, wrong, calibration)


def test_a_budget_preset_with_history_measures_once_and_says_so(made):
    bundle, called, heard = made
    assert called == ["measure_change", "measure_sensitivity", "measure_residuals", "fit_alignment"]
    preset = bundle.preset("dpm-4-blocks1.1-history")
    assert 0 < preset.schedule.computed_fraction() < 1
    assert preset.alignment.outputs == bundle.model.outputs == 2
    policy = preset.provenance.to_json()
    assert policy.pop("profile") in bundle.manifest.files
    assert policy.pop("predicted_speedup") >= 1.1
    assert 0 < policy.pop("predicted_loss") < 1
    assert policy.pop("alignment_report").startswith("profiles/dpm-4-blocks1.1-history-alignment-")
    assert policy == {
        "kind": "budget",
        "value": 1.1,
        "costs": "FLOPs",
        "images": 2,
        "alignment": "history",
    }
    stages = list(dict.fromkeys(stage for stage, _, _ in heard))
    assert stages == [
        "export", "presets", "profile dpm-4", "sensitivity dpm-4", "residuals dpm-4", "align dpm-4",
    ]  # fmt: skip
    for stage in stages:
        done = [(count, total) for name, count, total in heard if name == stage]
        assert done == sorted(done)
        assert done[-1][0] == done[-1][1]


def test_the_report_of_the_alignment_is_a_file_of_the_bundle(made):
    bundle, _, _ = made
    preset = bundle.preset("dpm-4-blocks1.1-history")
    name = preset.provenance.alignment_report
    assert name in Bundle.open(bundle.folder).manifest.files, "verified by its hash"
    report = read_tensors(bundle.folder / name)
    reused = ~preset.schedule.recompute
    for errors in (report["before"], report["after"]):
        assert (errors[reused] > 0).all()
        assert not errors[~reused].any()
    assert report["after"].sum() < report["before"].sum()
    for k, table in enumerate(preset.alignment.tables):
        np.testing.assert_array_equal(report[f"table_{k}"], table)


def test_the_runtime_runs_what_was_calibrated(made, model, conditions_of):
    bundle, _, _ = made
    session = Session.open(bundle, preset="dpm-4-blocks1.1-history", verify=False)
    preset = session.preset
    positive, negative = conditions_of(model, 2, seed=1), conditions_of(model, 1, seed=2)
    noise = session.noise([0, 1])
    ours = session.denoise(noise, *(side["encoder_hidden_states"] for side in (positive, negative)))
    picked = Calibration(positive, negative).pick([0, 1], guided=True)
    tables = solver_tables(SolverConfig.from_json(preset.solver))
    with CachedUNet(model, 2) as cached:
        denoiser = Denoiser(cached, TableSteps(tables), picked, 3.0)
        aligned, plain = (
            denoiser.denoise(torch.from_numpy(noise), preset.schedule, alignment)
            for alignment in (preset.alignment, None)
        )
    assert relative(ours.latents, aligned.numpy()) <= 1e-4
    assert relative(ours.latents, plain.numpy()) > 1e-3, "the alignment matters"


def test_a_scheduler_of_diffusers_is_measured_evaluation_by_evaluation(
    model, calibration, calls, tmp_path
):
    """The runtime's outputs, driven by the scheduler, end where the reference with it ends."""
    preset = PresetOptions(
        solver="scheduler", steps=3, scheduler="HeunDiscreteScheduler",
        policy=Policy.parse("blocks1.2"), alignment="history",
    )  # fmt: skip
    asked = dataclasses.replace(options("dpm:4"), presets=(preset,))
    calls.clear()
    bundle = compile_model(model, tmp_path / "b", asked, calibration).bundle
    assert calls == [
        "measure_change", "measure_sensitivity", "measure_residuals", "fit_alignment",
    ]  # fmt: skip
    made = bundle.preset("HeunDiscreteScheduler-3-blocks1.2-history")
    assert made.schedule.steps == 5
    assert not made.schedule.recompute.all()
    sampling = Sampling(model, recorded_solver(made.solver), calibration, 1.0)
    with sampling.cached_unet(2) as cached:
        denoiser, noise = sampling.begin(cached, [(0, 0)])
        wanted = denoiser.denoise(noise, made.schedule, made.alignment).numpy()
    config = scheduler_config("HeunDiscreteScheduler", model.scheduler)
    scheduler = made_scheduler(config, 3)
    prompt = calibration.pick([0], False)["encoder_hidden_states"].numpy()
    sample = noise * float(scheduler.init_noise_sigma)
    with Session.open(bundle, preset=made.name, backend="ort", threads=1) as session:
        with session.begin(prompt) as request:
            for step, timestep in enumerate(scheduler.timesteps):
                scaled = scheduler.scale_model_input(sample, timestep)
                output = torch.from_numpy(request.predict(step, scaled.numpy()))
                sample = scheduler.step(output, timestep, sample).prev_sample
        assert request.record.computed_fraction < 1
    assert relative(sample.numpy(), wanted) <= 1e-4


def test_the_same_compile_again_measures_nothing(made, model, calibration, calls, copy):
    before = (copy / "manifest.json").read_text()
    compile_model(model, copy, options(BUDGET), calibration)
    assert calls == []
    assert (copy / "manifest.json").read_text() == before


def test_a_compile_interrupted_after_the_fit_does_not_fit_again(
    made, model, calibration, calls, copy
):
    before = (copy / "manifest.json").read_text()
    (copy / "manifest.json").unlink()
    shutil.rmtree(copy / "presets")
    compile_model(model, copy, options(BUDGET), calibration)
    assert calls == []
    assert (copy / "manifest.json").read_text() == before


def test_a_damaged_report_is_fitted_again_and_alike(made, model, calibration, calls, copy):
    name = made[0].preset("dpm-4-blocks1.1-history").provenance.alignment_report
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-1])
    compile_model(model, copy, options(BUDGET), calibration)
    assert calls == ["fit_alignment"]
    assert (copy / name).read_bytes() == content


def test_only_what_depends_on_an_option_is_measured_again(made, model, calibration, calls, copy):
    other = options(BUDGET, sensitivity=SensitivityOptions(images=1, seed=12))
    compile_model(model, copy, other, calibration)
    assert [name for name in calls if name != "fit_alignment"] == ["measure_sensitivity"]
    calls.clear()
    compile_model(model, copy, options(BUDGET, alignment=AlignmentOptions(images=3)), calibration)
    assert calls == ["fit_alignment"]


def test_a_budget_with_history_over_500_steps_is_refused_at_once(model, calibration, tmp_path):
    with pytest.raises(ConfigError) as caught:
        compile_model(model, tmp_path / "b", options("ddim:500:blocks1.5:history"), calibration)
    assert str(caught.value) == (
        f"Preset 'ddim-500-blocks1.5-history': a budget with history looks at all pairs of earlier "
        f"steps, {len(model.blocks) * 500**3:.2g} numbers for 500 steps. Take fewer steps, "
        f"another policy (t1.5, c1.5), or the alignment scale-shift."
    )


def test_presets_share_measurements_but_not_fits(made, model, calibration, calls, copy):
    wanted = [
        BUDGET,
        "dpm:4:blocks1.2:history",
        "dpm:4:c1.1",
        "dpm:4:0.5",
        "dpm:4:every2:scale-shift",
    ]
    bundle = compile_model(model, copy, options(*wanted), calibration).bundle
    assert calls == ["fit_alignment", "fit_alignment"]
    plain = bundle.preset("dpm-4-every2-scale-shift").alignment
    assert plain.outputs == 2, "the segments combine two"
    assert not any(table[:, 1].any() for table in plain.tables)
    assert any((table[:, 0] != 1).any() for table in plain.tables)


def test_a_distilled_preset_is_fitted_trained_and_judged(made, model, calibration, calls, copy):
    bundle = compile_model(model, copy, options("dpm:4:every2:history-distil"), calibration).bundle
    assert calls == ["fit_alignment", "distil", "judge_alignment"]
    preset = bundle.preset("dpm-4-every2-history-distil")
    report = read_tensors(copy / preset.provenance.alignment_report)
    assert (report["before"][1] > 0).all()
    assert all(table[1, 0].any() for table in preset.alignment.tables)


def test_a_fit_is_made_on_weights_as_they_are_exported(model, calibration, calls, copy):
    """The weights of the model itself stay as they are, and so do measurements in full."""
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    half = dataclasses.replace(
        options(BUDGET), export=ExportOptions(outputs=2, precision="bfloat16")
    )
    bundle = compile_model(model, copy, half, calibration).bundle
    assert calls == ["fit_alignment"], "another precision is another fit, the rest is shared"
    after = model.unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    preset = bundle.preset("dpm-4-blocks1.1-history")
    config = SolverConfig.from_json(preset.solver)
    sampling = Sampling(model, config, calibration, MEASUREMENT.guidance_scale, "bfloat16")
    fit = fit_alignment(sampling, preset.schedule, 2, MEASUREMENT.alignment)
    for ours, exact in zip(preset.alignment.tables, fit.alignment.tables, strict=True):
        np.testing.assert_array_equal(ours, exact)


@pytest.mark.usefixtures("calls")
def test_an_export_before_changes_no_measurement(model, calibration, tmp_path):
    exported = dataclasses.replace(model, unet=deepcopy(model.unet))
    wanted = dataclasses.replace(
        options(BUDGET), export=ExportOptions(outputs=2, precision="bfloat16")
    )
    export_segments(exported, tmp_path / "segments", wanted.export)
    made = []
    for source, name in ((model, "before"), (exported, "after")):
        bundle = compile_model(source, tmp_path / name, wanted, calibration).bundle
        provenance = bundle.preset("dpm-4-blocks1.1-history").provenance
        made.append([
            (bundle.folder / file).read_bytes()
            for file in (provenance.profile, provenance.alignment_report)
        ])  # fmt: skip
    assert made[0] == made[1]


def test_measuring_on_half_precision_is_refused(model, calibration, tmp_path):
    half = dataclasses.replace(model, unet=deepcopy(model.unet).bfloat16())
    with pytest.raises(ConfigError) as caught:
        compile_model(half, tmp_path / "b", options("dpm:4:0.5"), calibration)
    assert str(caught.value) == (
        "Preset 'dpm-4-d0.5' is made from measurements, which need the weights in full: expected "
        "a model loaded in float32, got bfloat16. The precision of the export is another option."
    )


def test_a_preset_that_reuses_nothing_is_not_fitted(made, model, calibration, calls, copy):
    bundle = compile_model(model, copy, options("dpm:4:every1:history"), calibration).bundle
    assert calls == []
    assert bundle.preset("dpm-4-every1-history").provenance.alignment is None


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["ddim:2:blocks1.5", "ddim:2:every2:scale-shift"])
def test_prompts_are_asked_for_before_any_work(model, calls, tmp_path, text):
    calls.clear()
    with pytest.raises(ConfigError, match=r"is made from measurements and needs prompts"):
        compile_model(model, tmp_path / "b", options(text))
    assert calls == []


def test_a_table_of_ones_own_is_refused_before_any_work(model, calibration, calls, tmp_path):
    calls.clear()
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([[1, 1]]))
    with pytest.raises(ConfigError, match=r"Expected 2 rows \(steps\) of 7 zeros and ones"):
        compile_model(model, tmp_path / "b", options("ddim:2:0.5", f"ddim:2:{path}"), calibration)
    assert calls == []


def test_a_table_of_ones_own_becomes_the_schedule(model, calls, tmp_path):
    path = tmp_path / "mine.json"
    table = [[1] * 7, [0, 1, 0, 1, 0, 1, 0]]
    path.write_text(json.dumps(table))
    bundle = compile_model(model, tmp_path / "b", options(f"ddim:2:{path}")).bundle
    made = bundle.preset("ddim-2-mine")
    assert made.schedule.recompute.astype(int).tolist() == table
    speedup = made.provenance.predicted_speedup
    assert speedup == pytest.approx(counted(bundle.segments).speedup(made.schedule), abs=1e-6)
    assert made.provenance == Provenance(kind="table", costs="FLOPs", predicted_speedup=speedup)


def test_grids_of_all_solvers_and_steps_come_from_one_converged_run(
    made, model, calibration, calls, copy
):
    calls.clear()
    presets = ("dpm-auto:3", "dpm-auto:5", "ddim-auto:3", "dpm-karras:3")
    bundle = compile_model(model, copy, options(*presets), calibration).bundle
    fits = ["judge_alignment"] * 3  # of the solvers on auto, toward one run of the trials' images
    assert calls == ["converged_run", "measure_gains", "fine_run", *fits]
    solvers = {
        name: SolverConfig.from_json(bundle.preset(name).solver) for name in bundle.preset_names
    }
    for text in presets:
        preset = PresetOptions.parse(text)
        grid = solvers[preset.name].grid
        assert (grid.name, grid.steps) == (preset.grid, preset.steps)
        assert (solvers[preset.name].fitted is not None) == preset.fits_solver
    assert solvers["dpm-auto-3"].grid.sigmas[0] == solvers["dpm-karras-3"].grid.sigmas[0]
    session = Session.open(bundle, preset="dpm-auto-3", backend="ort", threads=1)
    noise = session.noise([0])
    prompt = np.zeros((1, 7, 32), np.float32)
    ours = session.denoise(noise, prompt, prompt, guidance_scale=2.0).latents
    sampling = Sampling(model, solvers["dpm-auto-3"], calibration, 2.0)
    with sampling.cached_unet() as cached:
        denoiser, _ = sampling.begin(cached, [(0, 0)])
        zeros = {"encoder_hidden_states": torch.zeros(2, 7, 32)}
        denoiser = Denoiser(cached, steps_of(sampling.solver), zeros, 2.0)
        theirs = denoiser.denoise(torch.from_numpy(noise), sampling.uncached).numpy()
    assert relative(ours, theirs) <= 1e-4


def test_a_list_of_ones_own_is_visited(model, tmp_path):
    levels = tmp_path / "mine.json"
    levels.write_text("[12.5, 2.5, 0.3]")
    bundle = compile_model(model, tmp_path / "b", options(f"dpm-{levels}:3")).bundle
    grid = SolverConfig.from_json(bundle.preset("dpm-mine-3").solver).grid
    assert grid.name == "mine"
    assert grid.sigmas == pytest.approx([12.5, 2.5, 0.3])
    assert all(t == round(t) for t in grid.timesteps)


def test_the_grid_auto_asks_for_prompts(model, calls, tmp_path):
    calls.clear()
    with pytest.raises(ConfigError, match="needs prompts to measure with"):
        compile_model(model, tmp_path / "b", options("dpm-auto:3"))
    assert calls == []
