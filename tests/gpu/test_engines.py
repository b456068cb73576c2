"""On a GPU: open, run, compare and time engines, all by ``pytest -m gpu tests/gpu -s``."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from blockcache.export.costs.bundle_timings import bundle_timings
from blockcache.export.engines.build import BuildOptions, build_engines
from blockcache.export.engines.targets import Target
from blockcache.runtime import Session
from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.devices.cuda_driver import (
    call,
    device_capability,
    device_count,
    primary_context,
)
from blockcache.runtime.devices.device_view import DeviceView
from blockcache.runtime.devices.interop import host_array
from blockcache.runtime.engines.files import read_engines, write_engines
from blockcache.tools.check.loop import check_loop
from blockcache.tools.check.segments import check_segments
from blockcache.tools.check.times import time_segments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device_count() == 0, reason="no CUDA device"),
]


@pytest.fixture(
    scope="module",
    params=[("tensorrt_rtx", "sd"), ("tensorrt_rtx", "sdxl"), ("tensorrt", "sd")],
    ids="-".join,
)
def built(request, compiled, tmp_path_factory):
    """(library, tiny bfloat16 bundle with engines built on this machine for this GPU)."""
    library, kind = request.param
    pytest.importorskip(library)
    _, made = compiled(kind, 2 if kind == "sdxl" else 1, "bfloat16")
    own = copy_of(made, tmp_path_factory.mktemp("gpu") / kind)
    build_engines(own, Target.parse("current"), BuildOptions(library=library))
    return library, own


def copy_of(bundle, folder):
    return Bundle.open(shutil.copytree(bundle.folder, folder))


@pytest.fixture
def bundle(built):
    return built[1]


@pytest.fixture
def backend(built):
    from blockcache.runtime.engines.trt import TrtBackend

    return TrtBackend(target="current", library=built[0], graphs="check")


def request_of(session, conditions_of, images=1):
    """Arguments of ``denoise`` with random prompts."""
    model = session.bundle.model
    rng = np.random.default_rng(0)

    def side():
        sizes = dataclasses.replace(model.sizes, batch=images)
        return {s.name: rng.standard_normal(s.shape(sizes), np.float32) for s in model.conditions}

    positive, negative = side(), side()
    return {
        "noise": session.noise(list(range(images))),
        "prompt_embeds": positive.pop("encoder_hidden_states"),
        "negative_prompt_embeds": negative.pop("encoder_hidden_states"),
        "conditions": positive,
        "negative_conditions": negative,
    }


def test_sm80_plans_run_here(compiled, tmp_path):
    """Says whether this GPU runs plans for SM80; fails with the library's own words if not."""
    pytest.importorskip("tensorrt_rtx")
    from blockcache.runtime.engines.tensorrt_library import load_library
    from blockcache.runtime.engines.trt import TrtBackend

    own = copy_of(compiled("sd", 1, "bfloat16")[1], tmp_path / "bundle")
    report = build_engines(own, Target.parse("sm80"))
    plan = own.folder / "engines/sm80" / report.entries["trunk_00"].file
    library = load_library("tensorrt_rtx")
    with library.log() as log:
        runtime = library.module.Runtime(library.logger)
        engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    assert engine is not None, f"{device_capability()}: {library.quoted(log)}"
    accepted = (*report.engines.capabilities, device_capability())  # as if it had been built for
    write_engines(own, dataclasses.replace(report.engines, capabilities=accepted))
    backend = TrtBackend(target="sm80", library="tensorrt_rtx")
    found = check_segments(own, backend, layouts_of(own, "sm80"))
    times = time_segments(own, backend)
    for comparison in found:
        print(comparison, f"ratio {comparison.ratio:.2f}, {times[comparison.name]:.3f} ms")
    assert all(comparison.passed for comparison in found)


def layouts_of(bundle, target="current"):
    layouts = {}
    for entry in read_engines(bundle, target).engines.values():
        layouts.update(entry.formats)
    return layouts


def test_every_segment_is_within_twice_the_plain_error(bundle, backend):
    found = check_segments(bundle, backend, layouts_of(bundle))
    for comparison in found:
        print(comparison, f"ratio {comparison.ratio:.2f}")
    assert all(comparison.passed for comparison in found)


@pytest.mark.parametrize("preset", ["ddim-4", "dpm-20"])
def test_the_loop_is_within_twice_the_plain_error(bundle, backend, preset):
    comparison = check_loop(bundle, backend, preset)
    print(comparison, f"ratio {comparison.ratio:.2f}")
    assert comparison.passed


def test_graphs_replay_the_same_latents(bundle, backend, conditions_of):
    session = Session.open(bundle, preset="dpm-20", backend=backend)
    request = request_of(session, conditions_of)
    first, second, third = (session.denoise(**request).latents for _ in range(3))
    assert session._graphs.why_not == ""
    assert len(session._graphs) == 1
    assert (first == second).all()
    assert (second == third).all()
    watched = []
    stepped = session.denoise(**request, callback=lambda p: watched.append(p.step)).latents
    assert (stepped == first).all()
    assert watched == list(range(20))


def test_one_graph_serves_every_guidance_and_rescale(bundle, backend, conditions_of):
    session = Session.open(bundle, preset="dpm-20", backend=backend)
    request = request_of(session, conditions_of)
    for scale, rescale in [(3.0, 0.7), (8.0, 0.2), (8.0, 1.0), (3.0, 0.7)]:
        how = {"guidance_scale": scale, "guidance_rescale": rescale}
        replayed = session.denoise(**request, **how).latents
        alone = Session.open(bundle, preset="dpm-20", backend=backend)
        np.testing.assert_array_equal(replayed, alone.denoise(**request, **how).latents)
    assert len(session._graphs) == 1
    session.denoise(**request)
    assert len(session._graphs) == 2  # without rescale there is one launch less


class Listener:
    """In a monitor's place: takes any preset."""

    def watch(self, bundle, preset):
        pass

    def add(self, change):
        self.change = change


def test_a_monitor_measures_in_the_graph_and_changes_no_bit(bundle, backend, conditions_of):
    listener, plain = Listener(), Session.open(bundle, preset="dpm-20", backend=backend)
    watched = Session(bundle, plain.preset, backend, listener)
    request = request_of(plain, conditions_of, images=2)
    changes = []
    for _ in range(2):  # launched, then replayed
        ours, theirs = watched.denoise(**request), plain.denoise(**request)
        np.testing.assert_array_equal(ours.latents, theirs.latents)
        changes.append(listener.change)
    np.testing.assert_array_equal(*changes)
    assert np.isnan(changes[0][0]).all()
    assert (changes[0][1:] > 0).all()
    assert np.isfinite(changes[0][1:]).all()


def test_two_images_are_the_same_alone_and_together(bundle, backend, conditions_of):
    session = Session.open(bundle, preset="ddim-4", backend=backend)
    request = request_of(session, conditions_of, images=2)
    both = session.denoise(**request).latents
    assert np.isfinite(both).all()
    assert np.abs(both[0] - both[1]).max() > 0


def test_sessions_share_engines_and_one_scratch_memory(bundle, backend, conditions_of):
    sessions = [Session.open(bundle, preset=p, backend=backend) for p in ("ddim-4", "dpm-20")]
    assert sessions[0]._engines == sessions[1]._engines
    for session in sessions:
        session.denoise(**request_of(session, conditions_of))
    engines = [made._engine for made in sessions[0]._engines.values()]
    needed = [engine.get_device_memory_size_for_profile_v2(0) for engine in engines]
    assert backend.device.scratch.bytes == max(needed)


def test_kernels_compiled_at_first_run_are_kept(built, backend, conditions_of):
    library, bundle = built
    session = Session.open(bundle, preset="ddim-4", backend=backend)
    session.denoise(**request_of(session, conditions_of))
    kept = list(bundle.folder.glob("engines/current/runtime-*.cache"))
    assert len(kept) == (library == "tensorrt_rtx")


def test_the_callers_stream_and_a_result_in_place(built, conditions_of):
    from blockcache.runtime.engines.trt import TrtBackend

    library, bundle = built
    with primary_context(0):
        stream = int(call("cuStreamCreate", 0))
    own = Session.open(bundle, preset="ddim-4", backend=TrtBackend(library=library))
    given = Session.open(
        bundle, preset="ddim-4", backend=TrtBackend(library=library, stream=stream)
    )
    assert given.backend.device.stream == stream
    request = request_of(own, conditions_of)
    expected, result = own.denoise(**request), given.denoise(**request)
    np.testing.assert_array_equal(result.latents, expected.latents)
    np.testing.assert_array_equal(host_array(result.device_latents), result.latents)
    moved = {**request, "noise": DeviceView(upload(given, request["noise"]), stream, 0)}
    np.testing.assert_array_equal(given.denoise(**moved).latents, expected.latents)


def upload(session, values):
    device = session.backend.device
    tensor = device.tensor(device.allocate(values.nbytes), 0, values.shape, "float32")
    device.upload(tensor, values)
    return tensor


@pytest.mark.parametrize("weights", ["stripped", "refittable"])
def test_weights_come_from_the_bundle(built, tmp_path, weights):
    from blockcache.runtime.engines.trt import TrtBackend

    library, bundle = built
    own = copy_of(bundle, tmp_path / "bundle")
    build_engines(own, Target.parse("current"), BuildOptions(library=library, weights=weights))
    backend = TrtBackend(target="current", library=library)
    assert all(c.passed for c in check_segments(own, backend, layouts_of(own)))


def test_the_check_command_records_times(built, tmp_path, capsys):
    from blockcache.tools.commands.check import check

    own = copy_of(built[1], tmp_path / "bundle")
    check(own.folder, target="current", loop=False)
    print(capsys.readouterr().out)
    (times,) = bundle_timings(own)
    costs = times.costs(own.segments)
    print(times.device, times.backend, f"blocks {costs.blocks.sum():.3f} ms of a step, ")
    print(f"the rest {costs.trunk:.3f} ms")
    assert (costs.blocks > 0).all()


def test_time_of_the_loop(bundle, backend, conditions_of):
    """Prints the latency with and without CUDA graphs."""
    session = Session.open(bundle, preset="dpm-20", backend=backend)
    request = request_of(session, conditions_of)
    for _ in range(3):
        session.denoise(**request)
    times = sorted(session.denoise(**request).record.total_ms for _ in range(20))
    print(f"{device_capability()}: graph {times[10]:.2f} ms for 20 steps")
    assert times[0] > 0


def test_the_onnxruntime_cuda_engine(compiled, conditions_of):
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("onnxruntime without CUDA")
    _, made = compiled("sd")
    cpu = Session.open(made, preset="ddim-4", backend="ort")
    gpu = Session.open(made, preset="ddim-4", backend="ort-cuda")
    request = request_of(cpu, conditions_of)
    expected, got = cpu.denoise(**request).latents, gpu.denoise(**request).latents
    assert np.abs(got - expected).max() / np.abs(expected).max() < 1e-2  # TF32 convolutions
