"""The benchmark: who takes part, what is compared with what, and that all compute the same."""

from __future__ import annotations

import dataclasses
import json
import sys
import types

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("diffusers")

from blockcache.runtime import (
    ConfigError,
    EmptyBackend,
    EngineError,
    EnginesMissingError,
    MissingExtraError,
    Preset,
    Schedule,
    Session,
    SolverConfig,
    UnknownPresetError,
)
from blockcache.runtime.provenance import Provenance
from blockcache.runtime.solvers.solver import solver_tables
from blockcache.tools.bench import torch_loop
from blockcache.tools.bench.contestants import Contestant, Entry, Lineup
from blockcache.tools.bench.latency import BenchOptions, measure_latency, own_timings
from blockcache.tools.bench.pictures import picture_rows
from blockcache.tools.bench.report import append_figures, report_text
from blockcache.tools.bench.sessions import (
    base_of,
    base_presets,
    bundle_contestants,
    host_cost_us,
)
from blockcache.tools.check.times import device_ms
from blockcache.tools.report import machine
from blockcache.tools.report.spread import Spread
from blockcache.tools.sources.references import whole_bundle, whole_preset


@pytest.fixture(scope="module")
def bundle(compiled):
    return compiled("sd")[1]


def preset_of(bundle, solver, steps, reuse=False):
    """A preset of made-up steps, with half the blocks reused where asked for."""
    found = bundle.preset("ddim-4" if solver == "ddim" else "dpm-20")
    table = np.ones((steps, found.schedule.blocks), bool)
    if reuse:
        table[1:, ::2] = False
    return dataclasses.replace(
        found,
        name=f"{solver}-{steps}{'-cached' if reuse else ''}",
        solver={**found.solver, "steps": steps},
        schedule=Schedule(table),
        alignment=dataclasses.replace(
            found.alignment,
            tables=tuple(table[np.arange(steps) % 4] for table in found.alignment.tables),
        ),
        time_tables={k: v[np.arange(steps) % 4] for k, v in found.time_tables.items()},
    )


@pytest.fixture(scope="module")
def made(bundle, with_presets):
    """Cached at 5 and 8 steps; uncached at 3, 5, 6 and, with another solver, 4."""
    return with_presets(
        bundle,
        preset_of(bundle, "ddim", 5, reuse=True),
        preset_of(bundle, "ddim", 8, reuse=True),
        *(preset_of(bundle, "ddim", steps) for steps in (3, 5, 6)),
        preset_of(bundle, "dpm", 4),
    )


# -- who takes part --------------------------------------------------------------------------------


def test_a_preset_is_compared_with_the_next_larger_uncached_run(made):
    presets = [made.preset(name) for name in made.preset_names]
    bases = base_presets(presets)
    assert [base.schedule.steps for base in bases] == [5, 8]
    assert [base_of(preset, bases).schedule.steps for preset in presets] == [5, 8, 5, 5, 8, 5]


def test_a_joint_preset_is_compared_with_the_steps_it_replaces(bundle):
    """5 cached steps in the place of 8; where nothing has 8, with its own 5."""
    joint = preset_of(bundle, "ddim", 5, reuse=True)
    joint = dataclasses.replace(joint, provenance=Provenance(kind="joint", replaced_steps=8))
    full, other = preset_of(bundle, "ddim", 8), preset_of(bundle, "ddim", 5)
    bases = base_presets([other, joint, full])
    assert bases == [full]
    assert base_of(joint, bases) is full
    assert base_presets([other, joint]) == [joint]


def test_without_a_cached_preset_every_one_is_a_base(bundle):
    presets = [preset_of(bundle, "ddim", steps) for steps in (3, 5)]
    assert base_presets(presets) == presets


def test_whole_and_split_run_once_for_each_base(made):
    presets = [made.preset(name) for name in made.preset_names]
    entries = bundle_contestants(made, presets, EmptyBackend(), "empty", 1)
    lineup = [entry.open() for entry in entries]
    assert [(c.kind, c.base, c.steps) for c in lineup] == [
        ("whole", "ddim-5", 5),
        ("split", "ddim-5", 5),
        ("whole", "ddim-8", 8),
        ("split", "ddim-8", 8),
        ("cached", "ddim-5", 5),
        ("cached", "ddim-8", 8),
        ("fewer steps", "ddim-5", 3),
        ("fewer steps", "ddim-8", 6),
        ("fewer steps", "ddim-5", 4),
    ]
    for contestant in lineup:
        assert (contestant.computed_fraction < 1) == (contestant.kind == "cached")
        assert contestant.memory["weights"] > 0
        assert (contestant.memory["blocks"] > 0) == (contestant.kind in ("split", "cached"))


def contestant(name, log=None, seconds=()):
    return Contestant(
        engine=name, kind="whole", preset="p", base="b", steps=1, images=1,
        run=lambda: log.append(name), seconds=list(seconds),
    )  # fmt: skip


def test_contestants_take_turns_and_the_first_round_is_not_timed():
    log = []
    lineup = Lineup([contestant(name, log) for name in "abc"])
    lineup.take_turns(2, between=lambda: log.append("|"))
    assert "".join(log) == "|abc|abc|abc"
    assert [len(each.seconds) for each in lineup.contestants] == [2, 2, 2]


def test_without_a_warm_up_every_call_is_timed():
    log = []
    lineup = Lineup(tried=False)
    lineup.admit("a", lambda: [Entry("a", lambda: contestant("a", log))])
    assert log == []
    lineup.take_turns(2)
    assert log == ["a", "a"]
    assert len(lineup.contestants[0].seconds) == 2
    assert lineup.contestants[0].first_s > 0


def test_turns_are_timed_by_the_clock_that_was_asked_for():
    ticks = iter(range(100))
    lineup = Lineup([contestant("a", [])])
    lineup.take_turns(3, clock=lambda: next(ticks) ** 2)
    (only,) = lineup.contestants
    assert only.seconds == [5, 9, 13]  # 3² - 2² and so on: the first turn warms up
    assert only.first_s < 1  # seconds of the wall, not of that clock


def test_who_fails_in_a_turn_is_out_with_the_reason():
    """Without a warm-up nothing fails earlier."""

    def fails():
        log.append("!")
        if log.count("!") == 2:
            raise EnginesMissingError("no memory")

    log = []
    failing = dataclasses.replace(contestant("b"), run=fails)
    lineup = Lineup([contestant("a", log), failing, contestant("c", log)], tried=False)
    lineup.take_turns(3)
    assert "".join(log) == "a!ca!cac"
    assert [each.engine for each in lineup.contestants] == ["a", "c"]
    assert lineup.absent == {"b whole p": "no memory"}


def test_a_report_does_without_those_who_fell_out(made, monkeypatch):
    """The uncut model fails in its second turn: no speed-up, but what needs none stays."""
    original = Contestant.take_turn

    def take_turn(self, *clock):
        if self.kind == "whole" and self.seconds:
            raise EngineError("no memory")
        return original(self, *clock)

    monkeypatch.setattr(Contestant, "take_turn", take_turn)
    options = BenchOptions(engines=("ort",), presets=("ddim-5-cached",), rounds=2, threads=1)
    report = measure_latency(made, options)
    assert [(row.kind, row.speedup) for row in report.rows] == [("split", None), ("cached", None)]
    assert [p.name for p in report.promises] == ["cached / segments it ran"]
    assert report.absent["ort whole ddim-5-cached"] == "no memory"

    def fail(self, *clock):
        raise EngineError("no memory")

    monkeypatch.setattr(Contestant, "take_turn", fail)
    with pytest.raises(ConfigError, match=r"there is none\. .*: no memory"):
        measure_latency(made, dataclasses.replace(options, warm_up=False))


def test_a_peer_that_fails_is_absent(loop, bundle):
    def fails(sample, at):
        raise RuntimeError("out of memory")

    made = loop.contestant("torch-compile", "whole", bundle.preset("ddim-4"), fails)
    with pytest.raises(EngineError, match="torch-compile failed: out of memory"):
        made.run()


def absent_for(reason):
    def open_it():
        raise EnginesMissingError(reason)

    return open_it


def test_who_cannot_run_is_absent_with_the_reason():
    lineup = Lineup()
    lineup.admit(
        "trt",
        lambda: [
            Entry("trt whole", absent_for("built without --whole")),
            Entry("trt split", lambda: contestant("trt", [])),
            Entry("trt fewer steps", absent_for("built without --whole")),
        ],
    )
    assert [each.engine for each in lineup.contestants] == ["trt"]
    assert lineup.absent == {"trt whole, trt fewer steps": "built without --whole"}


def test_an_engine_that_is_not_installed_is_absent_as_a_whole():
    def missing():
        raise MissingExtraError.of("onnxruntime-gpu", "gpu", "This")

    lineup = Lineup()
    lineup.admit("ort-cuda", missing)
    assert lineup.contestants == []
    assert lineup.absent["ort-cuda"].startswith("This needs the package onnxruntime-gpu")


def test_a_ratio_is_taken_within_each_round():
    assert Spread.of_ratio([2, 30, 4], [1, 10, 4]) == Spread(2.0, 1.0, 3.0)
    assert str(Spread(2.0, 1.0, 3.0)) == "2 (1 to 3)"


# -- all compute the same --------------------------------------------------------------------------


def test_the_whole_model_runs_in_the_same_loop_and_agrees(bundle, compiled, conditions_of):
    model, _ = compiled("sd")
    split = Session.open(bundle, preset="ddim-4", verify=False)
    whole = Session(whole_bundle(bundle), whole_preset(split.preset), split.backend)
    embeddings = [conditions_of(model, 1, seed)["encoder_hidden_states"] for seed in (0, 1)]
    ours = split.denoise(split.noise([0]), *embeddings, guidance_scale=2.0).latents
    theirs = whole.denoise(whole.noise([0]), *embeddings, guidance_scale=2.0).latents
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.fixture(scope="module")
def loop(compiled):
    return torch_loop.TorchLoop(compiled("sd")[0], "float32", 1)


def test_the_torch_loop_computes_what_the_runtime_does(bundle, loop):
    session = Session.open(bundle, preset="dpm-20", verify=False)
    negative, positive = loop.conditions[0].numpy()[:1], loop.conditions[0].numpy()[1:]
    noise = loop.noise.numpy()
    ours = session.denoise(noise, positive, negative, guidance_scale=torch_loop.GUIDANCE).latents
    tables = solver_tables(SolverConfig.from_json(session.preset.solver))
    theirs = loop.denoise(loop.evaluate, tables).numpy()
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("engine", ["deepcache", "diffusers-pab"])
def test_a_peer_changes_the_result_and_leaves_the_model_as_it_was(bundle, loop, engine):
    if engine == "deepcache":
        pytest.importorskip("DeepCache")
    preset: Preset = bundle.preset("ddim-4")
    tables = solver_tables(SolverConfig.from_json(preset.solver))
    results = []
    plain = loop.denoise(loop.evaluate, tables)
    made = torch_loop.TORCH_ENGINES[engine](loop, preset)
    original = loop.denoise
    try:
        loop.denoise = lambda *arguments: results.append(original(*arguments))
        made.run()
        made.run()
    finally:
        del loop.denoise
    first, second = results
    assert not (first == plain).all()
    assert (first == second).all()  # nothing is left over from one image to the next
    assert (loop.denoise(loop.evaluate, tables) == plain).all()


def test_a_missing_peer_is_named_with_the_pip_command(bundle, loop, monkeypatch):
    monkeypatch.setitem(sys.modules, "DeepCache", None)
    with pytest.raises(MissingExtraError, match="pip install DeepCache"):
        torch_loop.TORCH_ENGINES["deepcache"](loop, bundle.preset("ddim-4"))


# -- the report ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(made):
    options = BenchOptions(engines=("ort", "torch", "trt"), rounds=2, threads=1)
    return measure_latency(made, options)


def test_the_report_has_every_figure(made, report):
    assert len(report.rows) == 9
    assert {row.engine for row in report.rows} == {"ort"}
    by_name = {(row.kind, row.preset): row for row in report.rows}
    whole = by_name["whole", "ddim-5-cached"]
    assert whole.speedup == Spread(1.0, 1.0, 1.0)
    fewer = by_name["fewer steps", "ddim-3"]
    assert fewer.images_per_s == pytest.approx(1 / fewer.seconds.median)
    assert [(p.name, p.preset) for p in report.promises] == [
        ("split / whole", "ddim-5"),
        ("split / whole", "ddim-8"),
        ("cached / segments it ran", "ddim-5-cached"),
        ("cached / segments it ran", "ddim-8-cached"),
    ]
    assert all(p.ratio.low > 0 for p in report.promises)
    loop_names = {s.name for s in made.segments if s.role in ("prompt", "trunk", "block")}
    assert report.timings["ort"].segment_ms.keys() == loop_names
    assert report.absent["torch"] == "no PyTorch model given (--model)"
    assert "trt" in report.absent
    assert report.machine["cpu"]


def test_another_bundle_takes_its_turns_beside(made, tmp_path):
    folder = tmp_path / "other"
    folder.symlink_to(made.folder)
    other = dataclasses.replace(made, folder=folder)
    presets = ("ddim-5-cached", "ddim-3")
    options = BenchOptions(engines=("ort",), presets=presets, rounds=1, threads=1, cpu_time=True)
    report = measure_latency(made, options, against=other)
    kinds = ("whole", "split", "cached", "fewer steps")
    assert [(row.engine, row.kind) for row in report.rows] == [
        *(("ort", kind) for kind in kinds),
        ("ort @other", "split"),
        ("ort @other", "cached"),
    ]
    assert "no warm-up" not in report_text(report)
    assert "CPU seconds" in report_text(report)
    assert own_timings(report) is report.timings["ort"]
    assert all(row.speedup is not None for row in report.rows)  # all over the one uncut model
    assert [(p.name, p.engine) for p in report.promises] == [
        ("split / whole", "ort"),
        ("cached / segments it ran", "ort"),
        ("split / whole", "ort @other"),
        ("split / split @other", "ort"),
        ("cached / segments it ran", "ort @other"),
    ]
    assert [p.goal for p in report.promises] == [1.02, 1.03, None, None, 1.03]
    assert report.timings.keys() == {"ort", "ort @other"}
    alone = dataclasses.replace(report, timings={"ort @other": report.timings["ort @other"]})
    with pytest.raises(ConfigError, match="Expected times of the bundle's segments, no engine"):
        own_timings(alone)


def test_another_bundle_must_be_of_the_model_and_have_the_same_steps(made, with_presets):
    larger = dataclasses.replace(made.model, sizes=dataclasses.replace(made.model.sizes, height=96))
    manifest = dataclasses.replace(made.manifest, model=larger)
    options = BenchOptions(engines=("ort",), presets=("ddim-5-cached",))
    with pytest.raises(ConfigError, match=r"another bundle of the model .*height 96"):
        measure_latency(made, options, against=dataclasses.replace(made, manifest=manifest))
    uncached = dataclasses.replace(made.preset("ddim-5"), name="ddim-5-cached")
    with pytest.raises(ConfigError, match=r"'ddim-5-cached' with as many steps in both bundles"):
        measure_latency(made, options, against=with_presets(made, uncached))


def test_the_report_reads_as_markdown(report):
    text = report_text(report)
    assert "| ort cached ddim-5-cached | 5 |" in text
    assert "| split / whole, ort ddim-5 |" in text
    assert "- not run: torch: no PyTorch model given (--model)" in text
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 4
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


# -- from prompt to picture ------------------------------------------------------------------------


def times(engine, kind, *seconds, preset="p"):
    """A contestant that has had its turns."""
    return dataclasses.replace(contestant(engine, seconds=seconds), kind=kind, preset=preset)


def test_what_a_preset_gains_is_told_over_the_denoising_and_over_the_whole():
    everyone = [
        times("ort", "whole", 8, 18),
        times("ort", "text", 1, 1),
        times("trt", "whole", 4, 4),  # the engine's decoder is missing
        times("trt", "text", 1, 1),
        times("ort", "cached", 3, 3, preset="x2"),
        times("ort", "decoding", 1, 1),
        times("torch", "text", 2, 2),
        times("torch", "decoding", 2, 2),
        times("deepcache", "peer", 12, 32),
    ]
    first, cached, peer = picture_rows(everyone)
    assert (first.engine, first.kind, first.total) == ("ort", "whole", Spread(15, 10, 20))
    assert first.parts_share == pytest.approx((2 / 10 + 2 / 20) / 2)
    assert (cached.preset, cached.total_speedup) == ("x2", Spread(3, 2, 4))
    assert cached.denoising_speedup == Spread.of([8 / 3, 6])
    assert (peer.engine, peer.text, peer.total) == (
        "deepcache",
        Spread(2, 2, 2),
        Spread(26, 16, 36),
    )


def test_text_and_decoding_take_their_turns(pipeline_bundle, pipeline_folder):
    """The bundle's, and those of the folder in PyTorch."""
    engines = ("ort", "torch", "trt")
    options = BenchOptions(
        engines=engines, model=str(pipeline_folder("sd")), rounds=1, threads=1, warm_up=False
    )
    report = measure_latency(pipeline_bundle("sd"), options)
    assert [(row.engine, row.kind) for row in report.pictures] == [
        ("ort", "whole"),
        ("ort", "split"),
        ("torch", "whole"),
    ]
    assert all(row.text.low > 0 and row.decoding.low > 0 for row in report.pictures)
    assert {row.kind for row in report.rows} == {"whole", "split"}
    assert "| ort split ddim-4 |" in report_text(report)
    assert "denoising faster | whole faster" in report_text(report)


def test_a_bundle_of_the_unet_alone_has_no_pictures_and_says_why(report):
    assert report.pictures == ()
    assert (
        "Expected a bundle with text encoder and decoder" in report.absent["ort text, ort decoding"]
    )


def test_the_history_grows_by_a_line_a_run(report, tmp_path):
    file = tmp_path / "results" / "history.jsonl"
    append_figures(file, report)
    append_figures(file, report)
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert first == second
    assert (first["rounds"], first["warm_up"], first["cpu_time"]) == (2, True, False)
    assert set(first["promises"]) == {f"{p.name}, {p.engine} {p.preset}" for p in report.promises}


def test_nothing_to_time_is_an_error_with_the_reasons(made):
    with pytest.raises(
        ConfigError, match=r"at least one engine to time, there is none\. torch: no"
    ):
        measure_latency(made, BenchOptions(engines=("torch",)))


def test_an_unknown_engine_or_preset_is_refused(made):
    with pytest.raises(ConfigError, match=r"Expected engines of \['ort', .*got \['tvm'\]"):
        BenchOptions(engines=("tvm",))
    with pytest.raises(ConfigError, match="Expected 1 image and 1 round or more"):
        BenchOptions(rounds=0)
    options = BenchOptions(presets=("nothing",), engines=("ort",))
    with pytest.raises(UnknownPresetError, match="got 'nothing'"):
        measure_latency(made, options)


def test_the_host_cost_counts_launches_of_the_loop(bundle):
    assert 0 < host_cost_us(bundle, bundle.preset("ddim-4"), repeats=1) < 1e6


def test_a_gpu_times_each_segment_alone_in_the_order_of_a_step():
    """By a made-up device: every launch is captured once and replayed in turn."""
    log = []

    class Device:
        def capture(self, enqueue):
            log.append("capture")
            return enqueue

        def times_ms(self, launches):
            log.append("wait")
            for launch in launches:
                launch()
            return [1.0 if name == "a" else 2.0 for name in log[-len(launches) :]]

    launches = {"a": lambda: log.append("a"), "b": lambda: log.append("b")}
    assert device_ms(launches, Device(), repeats=1) == {"a": 1.0, "b": 2.0}
    assert log == ["wait", *"ab", "capture", "capture", "wait", *"ababab"]


# -- the machine -----------------------------------------------------------------------------------


def test_clocks_and_throttling_are_noted(monkeypatch):
    answers = iter(
        [
            "1410 MHz, 1593 MHz, 1410 MHz, 60, 250 W, 0x0",
            "900 MHz, 1593 MHz, 1410 MHz, 84, 400 W, 0x8",
        ]
    )

    def nvidia_smi(command, **_):
        return types.SimpleNamespace(returncode=0, stdout=next(answers) + "\n")

    monkeypatch.setattr(machine.shutil, "which", lambda name: name)
    monkeypatch.setattr(machine.subprocess, "run", nvidia_smi)
    steadiness = machine.Steadiness()
    steadiness.sample()
    steadiness.sample()
    notes = steadiness.notes()
    assert notes["clocks.sm"] == "900 MHz to 1410 MHz"
    assert notes["temperature.gpu"] == "60 to 84"
    assert notes["clocks_event_reasons.active"] == "0x0 0x8"


def test_a_machine_without_a_gpu_has_no_clocks(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert machine.nvidia_smi(("name",)) == {}
    assert "name" not in machine.machine_facts()
