"""Engines built without a GPU: TensorRT-RTX for named compute capabilities."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest

from blockcache.export.engines import build as build_module
from blockcache.export.engines.build import BuildOptions, ShapeOptions, build_engines
from blockcache.export.engines.report import report_table
from blockcache.export.engines.targets import Target
from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.bundles.manifest import FileEntry
from blockcache.runtime.engines.files import (
    built_targets,
    engines_folder,
    read_engines,
    read_plan,
)
from blockcache.runtime.engines.tensorrt_library import load_library
from blockcache.runtime.errors import BundlePathError, ConfigError, EngineError, ExportError
from blockcache.runtime.files import write_text
from blockcache.runtime.plan import Dim, Segment, TensorSpec

tensorrt_rtx = pytest.importorskip("tensorrt_rtx")
SM80 = Target.parse("sm80")
FEW = ("trunk_06", "trunk_07", "block_00", "block_01")


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory):
    """``demo_bundle()``: the shipped model as ``blockcache compile demo --precision bfloat16``."""

    def make():
        from blockcache.tools.commands.compile import compile_bundle

        folder = tmp_path_factory.mktemp("demo") / "bundle"
        compile_bundle("demo", folder, preset=["dpm:20"], precision="bfloat16", as_json=True)
        return Bundle.open(folder)

    return make


@pytest.fixture(scope="session")
def built(compiled, demo_bundle, tmp_path_factory):
    """``built(kind, outputs)``: (Bundle, BuildReport) of a bfloat16 bundle built for SM80."""
    made = {}

    def get(kind, outputs):
        if kind not in made:
            bundle = demo_bundle() if kind == "demo" else compiled(kind, outputs, "bfloat16")[1]
            folder = tmp_path_factory.mktemp("built") / kind
            own = Bundle.open(shutil.copytree(bundle.folder, folder))
            made[kind] = own, build_engines(own, SM80)
        return made[kind]

    return get


@pytest.fixture
def built_copy(built, tmp_path):
    """A private copy of the tiny SD-like bundle with its engines."""
    bundle, _ = built("sd", 1)
    return Bundle.open(shutil.copytree(bundle.folder, tmp_path / "bundle"))


def tiny_build(bundle, *names):
    """The bundle with only the named segments: a build of a second."""
    segments = tuple(s for s in bundle.segments if s.name in names)
    manifest = dataclasses.replace(bundle.manifest, segments=segments)
    return dataclasses.replace(bundle, manifest=manifest)


# -- every segment, as bfloat16, for SM80, with dynamic batch -------------------------------------


MODELS = [("sd", 1), ("sdxl-small", 2), pytest.param("demo", 1, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("kind", "outputs"), MODELS)
def test_every_segment_builds(built, kind, outputs):
    bundle, report = built(kind, outputs)
    engines = read_engines(bundle, "sm80")
    assert (engines.library, engines.capabilities) == ("tensorrt_rtx", ("8.0",))
    assert (engines.precision, bundle.model.precision) == ("bfloat16", "bfloat16")
    assert str(engines.profiles[0]).startswith("batch 1..8, height 16, width 16, tokens")
    built_roles = ("prompt", "condition", "trunk", "block")
    wanted = [s for s in bundle.segments if s.role in built_roles] + [*bundle.manifest.parts]
    assert [s.role for s in wanted[-3:]] == ["text_encoder", "decoder", "encoder"] or kind != "demo"
    assert [s.name for s in report.segments] == [s.name for s in wanted]
    assert set(engines.engines) == {s.name for s in wanted}
    for segment in wanted:
        assert len(read_plan(bundle, engines, segment)) > 100_000
        assert engines.engines[segment.name].kernels > 0


@pytest.mark.parametrize(("kind", "outputs"), MODELS)
def test_attention_and_scale_shift_are_fused(built, kind, outputs):
    bundle, report = built(kind, outputs)
    blocks = [s for s in bundle.segments if s.role == "block"]
    for segment in blocks:
        facts = report.entries[segment.name].facts
        assert facts["attentions"] >= 2
        # The demo model has single-headed attention on its first level, which is not one kernel.
        if kind != "demo" or facts["attentions_fused"]:
            assert facts["attentions_fused"] == facts["attentions"], segment.name
    assert report.total("attentions_fused") > report.total("attentions") / 2
    assert report.total("scale_shifts") == len(blocks)
    assert report.total("scale_shifts_fused") == len(blocks)


def test_producer_and_consumers_agree_on_layouts(built):
    _, report = built("sd", 1)
    layouts = {}
    for segment in report.segments:
        for name, layout in report.entries[segment.name].formats.items():
            layouts.setdefault(name, set()).add(layout)
    assert all(len(found) == 1 for found in layouts.values())
    assert layouts["sample"] == layouts["model_output"] == layouts["scale_0"] == {"linear"}
    assert layouts["block_0"] == layouts["trunk_0_0"] == {"hwc8"}


def test_the_report_is_plain_data_and_a_table(built):
    _, report = built("sd", 1)
    content = json.loads(json.dumps(report.to_json()))
    assert content["step_kernels"] == sum(
        row["kernels"] for row in content["engines"] if row["role"] in ("trunk", "block")
    )
    assert content["split_tax"] is None
    assert content["copied"] == report.copied()
    assert report.copied()["prompt"] >= 14  # keys and values of seven cross-attentions
    assert report_table(report).row_count == len(report.segments)


# -- rebuilt only when something changed ----------------------------------------------------------


def test_a_second_build_keeps_everything(built_copy):
    before = {p: p.stat().st_mtime_ns for p in built_copy.folder.glob("engines/sm80/*.plan")}
    report = build_engines(built_copy, SM80)
    assert report.reused == {segment.name for segment in report.segments}
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_damaged_plan_is_built_again_and_equal(built_copy):
    (plan,) = built_copy.folder.glob("engines/sm80/trunk_00-*.plan")
    size = plan.stat().st_size
    plan.write_bytes(plan.read_bytes()[:-1])
    seen = []
    report = build_engines(built_copy, SM80, observer=lambda *told: seen.append(told))
    assert {s.name for s in report.segments} - report.reused == {"trunk_00"}
    assert seen[0] == ("engines sm80", len(report.segments) - 1, len(report.segments))
    assert seen[-1] == ("engines sm80", len(report.segments), len(report.segments))
    assert plan.stat().st_size == size


def with_other_weights(bundle, name):
    """The bundle after a change of one weight that only segment ``name`` reads."""
    import onnx_ir as ir

    path = next(bundle.folder.glob(f"segments/*/{name}.onnx"))
    graph = ir.load(path).graph
    tensors = [value.const_value for value in graph.initializers.values()]
    weight = next(t for t in tensors if isinstance(t, ir.ExternalTensor) and t.length > 1000)
    weights = path.with_name("weights.bin")
    with weights.open("r+b") as file:
        file.seek(weight.offset)
        file.write(b"\x01\x02")
    files = {
        **bundle.manifest.files,
        weights.relative_to(bundle.folder).as_posix(): FileEntry.of(weights),
    }
    manifest = dataclasses.replace(bundle.manifest, files=files)
    write_text(bundle.folder / "manifest.json", manifest.to_json())
    return Bundle.open(bundle.folder)


def test_changed_weights_rebuild_only_the_segments_that_read_them(built_copy):
    report = build_engines(with_other_weights(built_copy, "trunk_00"), SM80)
    assert {s.name for s in report.segments} - report.reused == {"trunk_00"}


@pytest.mark.parametrize(("weights", "again"), [("included", {"trunk_00"}), ("refittable", set())])
def test_new_weights_do_not_rebuild_what_can_be_refitted(built_copy, weights, again):
    """A LoRA merged into the weights: planned only, since refittable engines need a driver."""
    library, options = load_library("tensorrt_rtx"), BuildOptions(weights=weights)
    store = build_module.EngineStore(built_copy.folder / "engines" / "planned")

    def plan(bundle):
        segments = [s for s in bundle.segments if s.name in ("trunk_00", *FEW)]
        recipes = [build_module._recipe(bundle, s, SM80, options, library) for s in segments]
        return build_module._plan_jobs(bundle, store, recipes, library.version)[1]

    entry = next(iter(read_engines(built_copy, "sm80").engines.values()))
    for job in plan(built_copy):
        job.plan.write_bytes(b"plan")
        file = FileEntry.of(job.plan)
        made = dataclasses.replace(entry, key=job.key, bytes=file.bytes, sha256=file.sha256)
        store.commit(job.recipe.segment.name, made)
    assert plan(built_copy) == []
    changed = with_other_weights(built_copy, "trunk_00")
    assert {job.recipe.segment.name for job in plan(changed)} == again


def test_other_options_make_other_engines(built_copy):
    few = tiny_build(built_copy, "trunk_07")
    options = BuildOptions(shapes=ShapeOptions(max_batch=4))
    assert build_engines(few, SM80, options).reused == frozenset()
    assert build_engines(few, SM80, options).reused == {"trunk_07"}


def test_several_capabilities_share_one_engine(built_copy):
    few = tiny_build(built_copy, "trunk_07")
    report = build_engines(few, Target.parse("a100+sm89"))
    assert report.engines.capabilities == ("8.0", "8.9")
    assert built_targets(built_copy) == ("sm80", "sm80+sm89")


def test_an_engine_for_any_gpu_is_no_larger(built_copy):
    few = tiny_build(built_copy, "trunk_07")
    made = [build_engines(few, Target.parse(name)) for name in ("sm80", "any")]
    assert made[1].engines.capabilities == ("8.0", "8.6", "8.9", "12.0", "12.1")  # bfloat16
    sizes = [sum(entry.bytes for entry in each.entries.values()) for each in made]
    assert sizes[1] < sizes[0] + 1024


def test_the_split_tax_is_published(built_copy):
    few = tiny_build(built_copy, "trunk_07", "whole")
    report = build_engines(few, Target.parse("sm86"), BuildOptions(whole=True))
    assert report.split_tax == pytest.approx(report.step_kernels / report.whole_kernels)
    assert report.whole_kernels > 100
    assert report.entries["whole"].facts["attentions_fused"] == 14


# -- other precisions ------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_other_precisions_build(compiled, tmp_path, precision):
    _, bundle = compiled("sd", 1, precision)
    own = Bundle.open(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    report = build_engines(tiny_build(own, *FEW), SM80)
    assert report.engines.precision == precision
    layout = report.entries["block_00"].formats["block_0"]
    assert layout == ("hwc8" if precision == "float16" else "linear")
    assert (report.total("attentions_fused") == 4) is (precision == "float16")


# -- links ----------------------------------------------------------------------------------------


def test_a_build_leaves_alone_what_links_lead_to(built_copy, tmp_path):
    """Names that can be foreseen, linked to files outside the bundle before the build."""
    bundle = tiny_build(built_copy, "trunk_07")
    folder = engines_folder(bundle, "sm86")
    made = build_engines(bundle, Target.parse("sm86"))
    plan = Path(made.entries["trunk_07"].file)
    names = [plan.name, "engines.json", f".records/{plan.stem}.json"]
    for name in names:
        (folder / name).unlink()
    for name in [*names, *(f"{name}.partial" for name in names)]:
        outside = tmp_path / name.replace("/", "-")
        outside.write_text("mine")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(outside)
    build_engines(bundle, Target.parse("sm86"))
    assert [tmp_path.joinpath(n.replace("/", "-")).read_text() for n in names] == ["mine"] * 3
    partial = [tmp_path / f"{name.replace('/', '-')}.partial" for name in names]
    assert [path.read_text() for path in partial] == ["mine"] * 3
    assert read_engines(bundle, "sm86").engines.keys() == {"trunk_07"}


def test_a_snapshot_of_the_hub_is_built(built_copy, tmp_path):
    """There every file is a link to the cache's blobs, where weights have another name."""
    cache = tmp_path / "models--maker--model"
    snapshot = cache / "snapshots" / ("0" * 40)
    (cache / "blobs").mkdir(parents=True)
    for name, entry in built_copy.manifest.files.items():
        shutil.copy(built_copy.folder / name, cache / "blobs" / entry.sha256)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(cache / "blobs" / entry.sha256)
    shutil.copy(built_copy.folder / "manifest.json", snapshot)
    bundle = Bundle.open(snapshot)
    build_engines(tiny_build(bundle, "trunk_07"), Target.parse("sm86"))
    engines = read_engines(bundle, "sm86")
    (segment,) = (s for s in bundle.segments if s.name == "trunk_07")
    assert read_plan(bundle, engines, segment)


@pytest.mark.parametrize("name", [".records", ".lock"])
def test_a_link_out_of_the_bundle_where_a_build_writes_is_refused(built_copy, tmp_path, name):
    folder = engines_folder(built_copy, "sm86")
    folder.mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    (folder / name).symlink_to(outside)
    with pytest.raises(BundlePathError, match=f"'{name}' links to .*outside"):
        build_engines(tiny_build(built_copy, "trunk_07"), Target.parse("sm86"))
    assert not any(outside.iterdir())


# -- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "described"),
    [
        (
            ShapeOptions(resolutions=((16, 16), (16, 24))),
            ["height 16, width 16", "height 16, width 24"],
        ),
        (
            ShapeOptions(resolutions=((16, 16), (24, 32)), dynamic=True),
            ["height 16..24, width 16..32"],
        ),
        (ShapeOptions(min_batch=2, max_batch=2), ["batch 2,"]),
    ],
)
def test_profiles(built_copy, shapes, described):
    few = tiny_build(built_copy, "trunk_02")
    report = build_engines(few, Target.parse("sm89"), BuildOptions(shapes=shapes))
    assert len(report.engines.profiles) == len(described)
    for profile, expected in zip(report.engines.profiles, described, strict=True):
        assert expected in str(profile), str(profile)


def test_two_builds_in_parallel_processes(built_copy):
    few = tiny_build(built_copy, "trunk_06", "trunk_07")
    report = build_engines(few, Target.parse("sm86"), BuildOptions(jobs=2))
    assert report.reused == frozenset()
    assert 1e7 < report.peak_rss_bytes < 4e8, "of a worker: this process has torch in memory"
    assert set(report.entries) == {"trunk_06", "trunk_07"}


# -- failures -------------------------------------------------------------------------------------


def test_a_node_that_does_not_parse_is_named(built_copy):
    import onnx_ir as ir

    path = next(built_copy.folder.glob("segments/*/trunk_07.onnx"))
    model = ir.load(path)
    node = next(node for node in model.graph if node.op_type == "Conv")
    node.op_type, node.name = "NoSuchOperator", "the_odd_one"
    ir.save(model, path)
    with pytest.raises(ExportError, match=r"trunk_07.*NoSuchOperator.*the_odd_one.*Try"):
        build_engines(tiny_build(built_copy, "trunk_07"), Target.parse("sm89"))


def broken(bundle, text):
    """The bundle with a graph of this text in the place of its last trunk segment's."""
    import onnx

    model = onnx.parser.parse_model(text)
    model.graph.node[0].name = "the_odd_one"
    file = next(segment.file for segment in bundle.segments if segment.name == "trunk_07")
    onnx.save(model, bundle.folder / file)
    dims = tuple(Dim.parse(dim) for dim in ("batch", 8, "tokens", 8))
    tensors = [TensorSpec(name, "bfloat16", dims) for name in "xy"]
    segment = Segment("trunk_07", "trunk", file, (tensors[0],), (tensors[1],))
    manifest = dataclasses.replace(bundle.manifest, segments=(segment,))
    return dataclasses.replace(bundle, manifest=manifest)


def test_a_node_that_does_not_build_is_named(built_copy):
    odd = broken(
        built_copy,
        """<ir_version: 10, opset_import: ["" : 22]>
        g (bfloat16[N,8,T,8] x) => (bfloat16[N,8,T,8] y)
        <int64[4] shape = {2, 8, 9, 9}> { z = Reshape(x, shape) y = Relu(z) }""",
    )
    with pytest.raises(EngineError, match=r"trunk_07.*nodes: Reshape 'the_odd_one'\. Try"):
        build_engines(odd, Target.parse("sm89"))


def test_a_crash_of_the_builder_costs_one_engine_and_names_it(built_copy):
    if tensorrt_rtx.__version__ != "1.7.1.116":
        pytest.skip("the crash is one of TensorRT-RTX 1.7.1's builder")
    odd = broken(
        built_copy,
        """<ir_version: 10, opset_import: ["" : 23]>
        g (bfloat16[N,8,T,8] x) => (bfloat16[N,8,T,8] y) { y = Attention(x, x, x) }""",
    )
    with pytest.raises(EngineError, match=r"trunk_07, their build process died.*crash"):
        build_engines(odd, Target.parse("sm89"), BuildOptions(jobs=1))
    assert "sm89" not in built_targets(built_copy)


def test_a_capability_that_the_library_lacks_is_refused(built_copy):
    with pytest.raises(ConfigError, match=r"SM90.*--target current.*'ort-cuda'"):
        build_engines(built_copy, Target.parse("h100"))


def test_stripped_weights_without_a_driver_say_what_to_do(built_copy):
    from blockcache.runtime.devices.cuda_driver import device_count

    if device_count():
        pytest.skip("there is a driver here")
    few = tiny_build(built_copy, "trunk_07")
    with pytest.raises(EngineError, match="need a CUDA driver"):
        build_engines(few, Target.parse("sm89"), BuildOptions(weights="stripped"))


# -- two builds at once, and a kill ---------------------------------------------------------------


def _build_and_wait(folder, started, go_on):
    """In another process: build, but stop after the first engine until told to go on."""

    def observe(stage, done, total):
        if done:
            started.put(stage)
            assert go_on.wait(timeout=120)

    build_engines(tiny_build(Bundle.open(folder), *FEW), Target.parse("sm86"), observer=observe)


def test_two_builds_at_once(built_copy):
    context = multiprocessing.get_context("fork")
    started, go_on = context.Queue(), context.Event()
    process = context.Process(target=_build_and_wait, args=(built_copy.folder, started, go_on))
    process.start()
    started.get(timeout=120)
    few = tiny_build(built_copy, *FEW)
    with pytest.raises(ConfigError, match=r"Another build is writing.*sm86"):
        build_engines(few, Target.parse("sm86"))
    build_engines(few, Target.parse("sm89"))  # another target is another folder
    assert set(built_targets(built_copy)) == {"sm80", "sm89"}
    go_on.set()
    process.join(timeout=120)
    assert process.exitcode == 0
    assert build_engines(few, Target.parse("sm86")).reused == set(FEW)


@pytest.mark.parametrize("vanished", [False, True])
def test_segments_that_are_replaced_meanwhile_say_so(built_copy, vanished):
    """As a compile of other weights does: another manifest, then the old segments are deleted."""
    few = tiny_build(built_copy, *FEW)
    replaced = manifest_with_hashes(few.manifest, "0" * 64)

    def compile_beside(stage, done, total):
        if not done:
            (few.folder / "manifest.json").write_text(replaced)
            if vanished:
                shutil.rmtree(few.folder / "segments")

    with pytest.raises(ConfigError, match=r"A compile has replaced the segments of .* again"):
        build_engines(few, Target.parse("sm86"), observer=compile_beside)
    assert "sm86" not in built_targets(few)


def manifest_with_hashes(manifest, sha256):
    """The manifest, with another hash for every file."""
    files = {
        name: dataclasses.replace(entry, sha256=sha256) for name, entry in manifest.files.items()
    }
    return dataclasses.replace(manifest, files=files).to_json()


def _build_and_report(folder, started):
    """In another process: build, and say when the first engine is done."""

    def observe(stage, done, total):
        if done:
            started.put(stage)

    build_engines(tiny_build(Bundle.open(folder), *FEW), Target.parse("sm86"), observer=observe)


def test_a_killed_build_resumes(built_copy):
    context = multiprocessing.get_context("fork")
    started = context.Queue()
    process = context.Process(target=_build_and_report, args=(built_copy.folder, started))
    process.start()
    started.get(timeout=120)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert "sm86" not in built_targets(built_copy)
    report = build_engines(tiny_build(built_copy, *FEW), Target.parse("sm86"))
    assert 1 <= len(report.reused) < len(FEW)
    assert set(read_engines(built_copy, "sm86").engines) == set(FEW)
    assert not list(built_copy.folder.glob("engines/sm86/*.partial"))


def test_a_build_that_stops_leaves_the_engines_that_were_there(built_copy, monkeypatch):
    few, folder = tiny_build(built_copy, *FEW), engines_folder(built_copy, "sm80")
    build_engines(few, SM80)
    before = read_engines(few, "sm80")
    run_jobs, other = build_module.run_jobs, BuildOptions(level=2)

    def stop(jobs, *arguments):
        run_jobs(jobs[:1], *arguments)
        (folder / ".0123456789abcdef.partial").write_bytes(b"of a worker that was killed")
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, "run_jobs", stop)
    with pytest.raises(KeyboardInterrupt):
        build_engines(few, SM80, other)
    assert read_engines(few, "sm80") == before
    assert all(read_plan(few, before, segment) for segment in few.segments)
    assert list(folder.rglob("*.partial")) == []
    monkeypatch.undo()
    report = build_engines(few, SM80, other)
    assert len(report.reused) == 1
    assert {path.name for path in folder.glob("*.plan")} == {
        entry.file for entry in report.entries.values()
    }


def test_a_full_disk_names_the_plan_and_leaves_the_engines_that_were_there(built_copy, monkeypatch):
    few, folder = tiny_build(built_copy, "trunk_07"), engines_folder(built_copy, "sm80")
    before = read_engines(few, "sm80")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/trunk_07-[0-9a-f]{12}.plan'"):
        build_engines(few, SM80, BuildOptions(level=2))
    assert read_engines(few, "sm80") == before
    assert list(folder.rglob("*.partial")) == []
