"""Fewer steps and caching together: which candidates are tried, what they cost, which one wins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from blockcache.export import measurements
from blockcache.export.align.fit import AlignmentOptions
from blockcache.export.choose.joint import (
    MOST_CANDIDATES,
    NEGLIGIBLE,
    candidates,
    step_counts,
)
from blockcache.export.choose.policies import UNCACHED, affordable
from blockcache.export.choose.preset import PresetOptions
from blockcache.export.costs.costs import Costs
from blockcache.export.graph.to_onnx import ExportOptions
from blockcache.export.measure.calibration import Calibration
from blockcache.export.measure.change import ProfileOptions, measure_change
from blockcache.export.measure.residuals import ResidualOptions
from blockcache.export.measure.sensitivity import SensitivityOptions
from blockcache.export.measure.trial import TrialOptions
from blockcache.export.measurements import MeasurementOptions
from blockcache.export.pipeline import CompileOptions, compile_model
from blockcache.runtime import ConfigError

COSTS = Costs(np.array([1.5, 4.0, 2.0]), trunk=3.0, prompt=1.0)
speedups = st.floats(1, 6).map(lambda value: float(f"{value:.3g}"))


def preset(steps, speedup, alignment="history"):
    return PresetOptions.parse(f"dpm:{steps}:j{speedup:g}:{alignment}")


def uncached_cost(steps):
    return COSTS.uncached(steps)


def test_the_step_counts_of_a_hand_worked_example():
    """20 / 1.67 is 11.98: 12 steps are nearly fast enough without any caching."""
    assert step_counts(20, 1.67) == [12, 14, 16, 18, 20]
    assert step_counts(20, 1.1) == [19, 20]
    assert step_counts(4, 1.0) == [4]
    assert step_counts(1, 3.0) == [1]
    assert step_counts(21, 1.4)[0] == 15, "21 / 1.4 is a little more than 15 in floating point"


@given(st.integers(1, 100), speedups)
def test_step_counts_are_few_and_end_at_all_steps(steps, speedup):
    counts = step_counts(steps, speedup)
    assert counts == sorted(set(counts))
    assert 1 <= len(counts) <= MOST_CANDIDATES
    assert counts[-1] == steps
    assert counts[0] >= steps / speedup - 1e-9


@given(st.integers(2, 60), speedups)
def test_every_candidate_costs_what_was_asked_for(steps, speedup):
    asked = preset(steps, speedup)
    aim = uncached_cost(steps) / speedup
    try:
        found = candidates(asked, COSTS)
    except ConfigError:
        reject()
    assert len({made.name for made in found}) == len(found)
    assert {made.steps for made in found} <= set(step_counts(steps, speedup))
    for made in found:
        if made.policy == UNCACHED:
            assert made.alignment == "none"
            assert uncached_cost(made.steps) <= aim * (1 + NEGLIGIBLE) * (1 + 1e-9)
        else:
            assert made.alignment == "history"
            assert made.policy.value == pytest.approx(uncached_cost(made.steps) / aim)
            assert affordable(COSTS, made.steps, made.policy.value) > 0, "within reach"


def test_a_speed_up_out_of_reach_says_so():
    """Two blocks that cost next to nothing: only fewer steps help, and 5.5 of 11 is 6."""
    costs = Costs(np.array([1e-6]), trunk=3.0, prompt=0.0)
    with pytest.raises(ConfigError) as caught:
        candidates(preset(11, 2), costs)
    assert str(caught.value) == (
        "Preset 'dpm-11-j2-history': a speed-up of 2 is out of reach with 6 steps or more. "
        "Expected at most 1.833, or more steps."
    )


def test_only_the_winner_would_be_trained():
    tried = candidates(preset(20, 1.5, "history-distil"), COSTS)
    assert {made.alignment for made in tried} <= {"history", "none"}
    assert {made.alignment for made in candidates(preset(20, 1.5, "distil"), COSTS)} <= {
        "scale-shift", "none",
    }  # fmt: skip


def test_no_stage_takes_the_noise_of_a_trial():
    options, trial = MeasurementOptions(), TrialOptions()
    trained = options.distillation
    others = [
        range(options.profile.seeds),
        range(options.sensitivity.seed, options.sensitivity.seed + 1),
        range(options.residuals.seed, options.residuals.seed + options.residuals.images),
        range(options.alignment.seed, options.alignment.seed + options.alignment.images),
        range(trained.seed, trained.seed + trained.iterations * trained.images_at_once),
    ]
    taken = set().union(*others)
    assert not taken & set(range(trial.seed, trial.seed + trial.images))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_nearest_candidate_is_kept_and_the_others_are_reported(
    tiny_models, conditions_of, tmp_path, monkeypatch, precision
):
    profiled = []

    def measure(sampling, *rest, **named):
        profiled.append(sampling.steps)
        return measure_change(sampling, *rest, **named)

    monkeypatch.setattr(measurements, "measure_change", measure)
    model = tiny_models("one-level")
    calibration = Calibration(conditions_of(model, 2), conditions_of(model, 1, seed=5))
    options = CompileOptions(
        presets=(PresetOptions.parse("dpm:4:j1.2:history"), PresetOptions.parse("dpm:4")),
        export=ExportOptions(precision=precision),
        measurement=MeasurementOptions(
            guidance_scale=3.0,
            profile=ProfileOptions(prompts=2, seeds=1),
            sensitivity=SensitivityOptions(images=1),
            residuals=ResidualOptions(images=1),
            alignment=AlignmentOptions(images=2),
            trial=TrialOptions(images=2),
        ),
    )
    bundle = compile_model(model, tmp_path / "b", options, calibration).bundle
    assert bundle.model.outputs == 2, "as the preset asks for, not the options of the export"
    made = bundle.preset("dpm-4-j1.2-history").provenance
    assert (made.kind, made.value, made.replaced_steps) == ("joint", 1.2, 4)
    assert made.costs == "FLOPs"
    tried = made.tried
    assert tried, "at least one was within reach"
    kept = bundle.preset("dpm-4-j1.2-history").schedule.steps
    assert tried[kept] == min(tried.values()) == made.predicted_loss
    assert made.predicted_speedup >= 1.2 * (1 - NEGLIGIBLE)
    assert set(tried) <= set(step_counts(4, 1.2))
    cached = not bundle.preset("dpm-4-j1.2-history").schedule.recompute.all()
    assert profiled == [kept] * cached, "the winner alone"
    assert bundle.preset("dpm-4-j1.2-history").replaced_steps == 4
    assert not any(
        name.startswith(".stages") or "-steps-" in name for name in bundle.manifest.files
    )
    again = compile_model(model, tmp_path / "b", options, calibration).bundle
    assert again.preset("dpm-4-j1.2-history").provenance == made
