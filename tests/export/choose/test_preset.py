"""What a preset is asked to be: the text, its parts, its name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockcache.export.choose.policies import (
    MOST,
    Budget,
    ChangeBudget,
    DeepCache,
    Interval,
    Policy,
    SmoothCache,
    Table,
    Threshold,
)
from blockcache.export.choose.preset import ALIGNMENTS, GRIDS, PresetOptions
from blockcache.runtime import Alignment, ConfigError, Schedule
from blockcache.runtime.plan import Preset, Sizes, preset_name
from blockcache.runtime.solvers.solver import SOLVERS

pytest.importorskip("torch")
pytest.importorskip("onnx_ir")
from blockcache.export.costs.roofline import gpu
from blockcache.export.costs.timings import Timings
from blockcache.export.graph.to_onnx import ExportOptions
from blockcache.export.pipeline import CompileOptions

READ = {
    "ddim:4": PresetOptions(solver="ddim", steps=4, name="ddim-4"),
    "dpm:20:0.5": PresetOptions(solver="dpm", steps=20, policy=Threshold(0.5), name="dpm-20-d0.5"),
    "euler:30:blocks1.5:history": PresetOptions(
        solver="euler",
        steps=30,
        policy=Budget(1.5),
        alignment="history",
        name="euler-30-blocks1.5-history",
    ),
    "dpm:20:every3:none": PresetOptions(
        solver="dpm", steps=20, policy=Interval(3), name="dpm-20-every3"
    ),
    "dpm:2:my table.json:distil": PresetOptions(
        solver="dpm",
        steps=2,
        policy=Table(Path("my table.json")),
        alignment="distil",
        name="dpm-2-my-table-distil",
    ),
}


READ |= {
    "dpm:20:blocks:max:history": PresetOptions(
        solver="dpm",
        steps=20,
        policy=Budget(MOST),
        alignment="history",
        name="dpm-20-blocksmax-history",
    ),
    "dpm-20-0.5": READ["dpm:20:0.5"],
    "dpm-20-blocks:max": PresetOptions(
        solver="dpm", steps=20, policy=Budget(MOST), name="dpm-20-blocksmax"
    ),
    "dpm-20-every3-none": READ["dpm:20:every3:none"],
    "dpm-2-my table.json-distil": READ["dpm:2:my table.json:distil"],
    "dpm-20-a-history.json-history-distil": PresetOptions(
        solver="dpm",
        steps=20,
        policy=Table(Path("a-history.json")),
        alignment="history-distil",
        name="dpm-20-a-history-history-distil",
    ),
}


@pytest.mark.parametrize(("text", "preset"), READ.items())
def test_a_preset_is_read_from_the_command_line(text, preset):
    assert PresetOptions.parse(text) == preset


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dpm",
        "dpm:x",
        "dpm:2.5",
        "dpm:-3",
        "dpm:²",
        "dpm:20:0.5:history:1",
        "dpm:٣",
        "dpm:" + "9" * 5000,
        "dpm-",
        "dpm-x",
        "dpm--3",
        "-20x",
        "dpm 20",
        "my-preset",
    ],
)
def test_a_preset_that_cannot_be_read_shows_the_form(text):
    with pytest.raises(ConfigError) as caught:
        PresetOptions.parse(text)
    assert str(caught.value) == (
        f"Expected a preset SOLVER[-GRID]:STEPS[:POLICY[:ALIGNMENT]] such as dpm:20:0.5, "
        f"dpm:20:x2 or dpm-karras:20, got {text!r}."
    )


REFUSED = {
    "heun:20": f"Expected a solver of {(*SOLVERS, 'scheduler')}, got 'heun'.",
    "dpm:0": "Expected 1 to 1000 steps, got 0.",
    "dpm:1001": "Expected 1 to 1000 steps, got 1001.",
    "dpm-1000000000": "Expected 1 to 1000 steps, got 1000000000.",
    "dpm:20:0.5:1": "Expected an alignment of none, scale-shift, distil, history, "
    "history-distil, got '1'.",
    "dpm:20:ms0": "Expected a number of milliseconds above 0, got 0.",
    "dpm:20::history": "Expected a policy such as x2 (speed-up), ms250 (latency), 0.5 "
    "(delta), blocks1.5, blocksmax (the most there is), every3, deepcache3, smooth0.1 or "
    "FILE.json, got ''.",
    "dpm-20-blocksmax-fit": "Expected a policy such as x2 (speed-up), ms250 (latency), 0.5 "
    "(delta), blocks1.5, blocksmax (the most there is), every3, deepcache3, smooth0.1 or "
    "FILE.json, got "
    "'blocksmax-fit'.",
}


@pytest.mark.parametrize(("text", "error"), REFUSED.items())
def test_a_preset_out_of_range_is_refused(text, error):
    with pytest.raises(ConfigError) as caught:
        PresetOptions.parse(text)
    assert str(caught.value) == error


def test_an_uncached_preset_has_nothing_to_align():
    with pytest.raises(ConfigError) as caught:
        PresetOptions(solver="dpm", steps=20, alignment="history")
    assert str(caught.value) == "An uncached preset reuses nothing that could be aligned."


CALIBRATED = {
    "dpm:20": False,
    "dpm:20:every3": False,
    "dpm:20:deepcache3": False,
    "dpm:20:t.json": False,
    "dpm:20:0.5": True,
    "dpm:20:blocks1.5": True,
    "dpm:20:c1.5": True,
    "dpm:20:smooth0.1": True,
    "dpm:20:every3:scale-shift": True,
}


@pytest.mark.parametrize(("text", "calibrated"), CALIBRATED.items())
def test_prompts_are_needed_to_measure_or_to_align(text, calibrated):
    assert PresetOptions.parse(text).calibrated is calibrated


policies = st.one_of(
    st.builds(Threshold, st.floats(0, 1e9)),
    st.builds(Budget, st.floats(1, 1e9) | st.just(MOST)),
    st.builds(ChangeBudget, st.floats(1, 1e9)),
    st.builds(Interval, st.integers(1, 50)),
    st.builds(DeepCache, st.integers(1, 50)),
    st.builds(SmoothCache, st.floats(0, 1e-9)),
)
tables = st.text(min_size=1).map(lambda name: Table(Path(f"{name}.json")))


@given(st.sampled_from(SOLVERS), st.integers(1, 1000), policies, st.sampled_from(list(ALIGNMENTS)))
def test_both_spellings_of_a_preset_are_read_as_the_same(solver, steps, policy, alignment):
    """Numbers of six digits: a name has no more."""
    made = PresetOptions(
        solver=solver, steps=steps, policy=Policy.parse(policy.text), alignment=alignment
    )
    assert PresetOptions.parse(made.name) == made
    assert PresetOptions.parse(f"{solver}:{steps}:{policy.text}:{alignment}") == made


GRID_TEXTS = [
    f"dpm-{grid}{mark}20{mark}{policy}"
    for grid in GRIDS
    for mark in ":-"
    for policy in ("0.5", "x2")
]


@pytest.mark.parametrize("text", [*(text for text in READ if ".json" not in text), *GRID_TEXTS])
def test_the_runtime_knows_a_preset_by_both_spellings(text):
    assert preset_name(text) == PresetOptions.parse(text).name


@given(st.sampled_from(SOLVERS), policies | tables, st.sampled_from(list(ALIGNMENTS)))
def test_the_name_made_for_a_preset_is_a_name_that_presets_may_have(solver, policy, alignment):
    made = PresetOptions(solver=solver, steps=1, policy=policy, alignment=alignment)
    Preset(made.name, {}, Schedule.uncached(1, 1), Alignment.identity(1, (4,)), {})


@pytest.mark.parametrize("presets", [(), ("ddim:4", "ddim:4")])
def test_presets_need_different_names(presets):
    with pytest.raises(ConfigError, match="Expected presets with different names, got"):
        CompileOptions(presets=tuple(PresetOptions.parse(text) for text in presets))


def test_export_options_are_checked():
    with pytest.raises(ConfigError, match=r"Expected a precision of .*, got 'int8'"):
        ExportOptions(precision="int8")
    with pytest.raises(ConfigError, match="A reuse combines 1 or 2 computed outputs; got 3"):
        ExportOptions(outputs=3)


def test_a_latency_needs_times_and_one_source_of_them():
    latency = PresetOptions.parse("dpm:20:blocksms250:history")
    assert latency.name == "dpm-20-blocksms250-history"
    with pytest.raises(ConfigError, match=r"needs times\. Give measured ones"):
        CompileOptions(presets=(latency,))
    times = Timings("trt", "", Sizes(batch=2, height=16, width=16, tokens=7), {"trunk_00": 1.0})
    with pytest.raises(ConfigError, match=r"measured timings \(--timings\) or a GPU .*got both"):
        CompileOptions(presets=(latency,), timings=times, processor=gpu("a100"))
    assert CompileOptions(presets=(latency,), timings=times).timings == times


@pytest.mark.parametrize(
    ("text", "grid", "name"),
    [
        ("dpm:20", None, "dpm-20"),
        ("dpm-karras:20", "karras", "dpm-karras-20"),
        ("dpm-auto:20:blocks1.5:history", "auto", "dpm-auto-20-blocks1.5-history"),
        ("ddim-ays-sd15:10", "ays-sd15", "ddim-ays-sd15-10"),
        ("euler-trailing:8:0.5", "trailing", "euler-trailing-8-d0.5"),
        ("euler-a:20", None, "euler-a-20"),
        ("euler-a-ays-sd15:10:0.5", "ays-sd15", "euler-a-ays-sd15-10-d0.5"),
        ("dpm-sde-karras:20:branch2:history", "karras", "dpm-sde-karras-20-branch2-history"),
        ("unipc-auto:8", "auto", "unipc-auto-8"),
        ("lcm:4", None, "lcm-4"),
        ("scheduler:20:branch2", None, "scheduler-20-branch2"),
        (
            "HeunDiscreteScheduler:20:branch2:history",
            None,
            "HeunDiscreteScheduler-20-branch2-history",
        ),
    ],
)
def test_a_grid_stands_behind_the_solver(text, grid, name):
    preset = PresetOptions.parse(text)
    assert (preset.grid, preset.name) == (grid, name)
    assert PresetOptions.parse(preset.name) == preset


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("euler-a:20:x2", "euler-a:20:branch2:history"),
        ("dpm-sde-karras:20:x1.43", "dpm-sde-karras:20:branch1.43:history"),
        ("lcm:4:ms250", "lcm:4:blocksms250:history"),
        ("dpm-sde-auto:20", "dpm-sde-karras:20"),
        ("dpm-sde-auto:20:x2", "dpm-sde-karras:20:branch2:history"),
    ],
)
def test_what_is_measured_against_a_converged_run_refuses_solvers_that_add_noise(text, instead):
    """And names the nearest preset that can be measured with the same noise."""
    with pytest.raises(
        ConfigError, match=rf"^The solver '.*' adds noise at every step, .*Take {instead}( \(|, or)"
    ):
        PresetOptions.parse(text)
    PresetOptions.parse(instead)  # can be made


def test_a_preset_is_named_for_its_scheduler(tmp_path):
    """So that two of as many steps stand beside each other."""
    names = ["HeunDiscreteScheduler", str(tmp_path / "my-heun"), str(tmp_path / "sdxl/scheduler")]
    made = [PresetOptions(solver="scheduler", steps=20, scheduler=name) for name in names]
    assert [preset.name for preset in made] == [
        "HeunDiscreteScheduler-20", "scheduler.my_heun-20", "scheduler.sdxl-20",
    ]  # fmt: skip
    assert PresetOptions.parse("scheduler:20").name == "scheduler-20"
    assert made[1].sampler == "scheduler.my_heun-20"


@pytest.mark.parametrize("text", ["scheduler:20:x2", "scheduler-karras:20"])
def test_a_scheduler_of_diffusers_places_its_own_steps(text):
    with pytest.raises(ConfigError, match=r"^A scheduler of diffusers places its own steps: "):
        PresetOptions.parse(text)


def test_a_scheduler_is_named_where_a_preset_runs_it():
    with pytest.raises(ConfigError) as caught:
        PresetOptions(solver="dpm", steps=20, scheduler="HeunDiscreteScheduler")
    assert str(caught.value) == (
        "Expected the solver 'scheduler' with a scheduler of diffusers (preset scheduler:20), got "
        "'dpm'."
    )


def test_solvers_are_fitted_on_measured_grids_of_few_steps():
    fitted = ("dpm-auto:25", "ddim-auto:8:every2", "dpm:20:x2", "dpm-karras:20:ms250")
    others = ("dpm-auto:26", "dpm:20", "dpm-karras:20", "dpm:20:branch2:history")
    assert all(PresetOptions.parse(text).fits_solver for text in fitted)
    assert not any(PresetOptions.parse(text).fits_solver for text in others)


def test_the_grid_auto_is_measured():
    assert PresetOptions.parse("dpm-auto:20").calibrated
    assert not PresetOptions.parse("dpm-karras:20").calibrated


@pytest.mark.parametrize("text", ["dpm-karas:20", "dpm-karras-x-20"])
def test_an_unknown_grid_is_refused(text):
    with pytest.raises(ConfigError, match=r"Expected a (grid|preset)"):
        PresetOptions.parse(text)


def test_a_list_of_ones_own_is_a_grid(tmp_path):
    file = tmp_path / "my-levels.json"
    file.write_text("[14.6, 3.0, 0.4]")
    preset = PresetOptions.parse(f"dpm-{file}:3")
    assert (preset.name, preset.sampler) == ("dpm-my_levels-3", "dpm-my_levels-3")
    assert preset.own_levels() == (14.6, 3.0, 0.4)
    assert not preset.calibrated
    assert PresetOptions.parse(f"dpm-sde-{file}:3:every2").solver == "dpm-sde"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "Expected a list of noise levels at .*found no such file"),
        ("[1, 2", "Expected JSON in"),
        ("[14, 1]", r"Expected 3 falling numbers above 0 .*, got 2\."),
        ('{"a": 1}', r"got dict\."),
        ("[14, 15, 1]", "Expected 3 falling numbers .*expected falling sigmas"),
        ("[14, 1, 0]", "finite sigmas above 0"),
        ('[14, 1, "x"]', "sigmas as numbers"),
    ],
)
def test_a_list_that_is_none_is_refused_before_anything_is_loaded(tmp_path, content, message):
    file = tmp_path / "levels.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        PresetOptions.parse(f"dpm-{file}:3")


def test_a_list_does_not_go_with_a_policy_that_chooses_the_levels(tmp_path):
    file = tmp_path / "levels.json"
    file.write_text("[14, 3, 1]")
    with pytest.raises(ConfigError, match="'x2' chooses the levels: expected no list"):
        PresetOptions.parse(f"dpm-{file}:3:x2")
