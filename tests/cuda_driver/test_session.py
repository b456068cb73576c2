"""Whole requests on the stand-in GPU: the CPU's latents, bit for bit."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from blockcache.runtime import Cancelled, EngineError, Session
from blockcache.runtime.devices.cuda import CudaDevice
from blockcache.runtime.devices.interop import host_array
from blockcache.runtime.devices.tensor import Tensor
from blockcache.runtime.engines.trt import TrtBackend
from blockcache.runtime.plan import LOOP_ROLES
from blockcache.runtime.solvers.solver import SolverConfig

pytestmark = pytest.mark.driver


@pytest.mark.parametrize("title", ["tensorrt_rtx", "tensorrt 11", "tensorrt 10.8"])
def test_launched_then_replayed(pair_of, standin, title):
    pair = pair_of(title=title)
    pair.same()
    launched = standin.calls("cuLaunchHostFunc")
    pair.same()  # another prompt
    assert standin.calls("cuGraphLaunch") == 1
    assert standin.calls("cuGraphUpload") == 1
    assert standin.calls("cuLaunchHostFunc") - launched < 5  # the prompt's segment alone
    assert (len(pair.gpu._graphs), pair.gpu._graphs.why_not) == (1, "")


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_solver_with_history_and_an_alignment_of_one_and_two_outputs(pair_of, outputs):
    pair = pair_of("dpm-20", outputs=outputs)
    for _ in range(2):
        pair.same()


@pytest.mark.parametrize("solver", ["unipc", "euler-a", "dpm-sde", "lcm"])
def test_solvers_with_noise_and_with_an_earlier_x0(pair_of, solver):
    pair = pair_of(solver=SolverConfig(solver=solver, steps=4))
    for seed in (3, 4):  # the graph of the first request serves the second
        pair.same(2, seeds=[seed, 7])
    assert len(pair.gpu._graphs) == 1


def test_one_graph_serves_every_guidance_and_rescale(pair_of):
    pair = pair_of()
    for scale, rescale in [(3.0, 0.7), (8.0, 0.2), (8.0, 1.0), (3.0, 0.7)]:
        pair.same(guidance_scale=scale, guidance_rescale=rescale)
    assert len(pair.gpu._graphs) == 1
    for _ in range(2):
        pair.same(guidance_scale=3.0)  # one launch less
        pair.same(guidance_scale=1.0)  # half the batch
    assert len(pair.gpu._graphs) == 3


def test_more_shapes_than_are_kept(pair_of, standin):
    pair = pair_of()
    for images in (1, 2, 3, 4, 5):
        pair.same(images)
    assert len(pair.gpu._graphs) == 4  # those of one image went with their memory
    for _ in range(2):
        pair.same(1)


def test_another_size(pair_of):
    pair = pair_of()
    for side in (16, 32):
        noise = pair.cpu.noise([5], side, side)
        for _ in range(2):
            pair.same(noise=noise)


def test_late_starts_from_a_picture(pair_of):
    pair = pair_of()
    picture = np.random.default_rng(3).standard_normal((1, 4, 16, 16), np.float32)
    for first in (3, 2, 2, 0):
        pair.same(start_step=first, image_latents=picture)


def test_callbacks_look_and_edit(pair_of):
    pair, seen = pair_of(), []

    def look(progress):
        seen.append(progress.latents.copy())

    def edit(progress):
        progress.latents = progress.latents * np.float32(0.5)

    pair.same()
    for _ in range(2):
        pair.same(callback=look)
        pair.same(callback=edit)
    assert len(pair.gpu._graphs) == 1 + 4  # the loop, and a graph a step
    np.testing.assert_array_equal(seen[:4], seen[4:8])  # on the GPU, on the CPU


def test_a_callback_edits_in_place_on_the_gpu(pair_of, standin):
    pair = pair_of()

    def on_another_stream(progress):
        device, view = CudaDevice(), progress.device_latents
        edited = device.tensor(device.allocate(4096), 0, progress.latents.shape, "float32")
        device.upload(edited, progress.latents * np.float32(0.5))
        pointer = view.__cuda_array_interface__["data"][0]
        device.copy_from(Tensor(pointer, edited.shape, "float32", view), edited.pointer)
        kept.extend([device, edited])  # the copy is pending when this returns

    def halve(progress):
        progress.latents[:] *= np.float32(0.5)

    kept = []
    request = pair.request()
    for _ in range(2):
        ours = pair.gpu.denoise(**request, callback=on_another_stream)
        theirs = pair.cpu.denoise(**request, callback=halve)
        np.testing.assert_array_equal(ours.latents, theirs.latents)


def test_after_a_cancel_and_after_an_error_in_a_callback(pair_of):
    pair = pair_of()
    request = pair.request()
    pair.same_for(request)
    answers = iter([False, False, True])
    with pytest.raises(Cancelled, match="before step 2"):
        pair.gpu.denoise(**request, cancelled=lambda: next(answers))

    def fail(progress):
        raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own"):
        pair.gpu.denoise(**request, callback=fail)
    pair.same_for(request)


def test_two_sessions_on_one_stream(pair_of):
    first = pair_of()
    second = pair_of(bundle=first.bundle, seed=2)
    second.gpu.close()
    backend = first.gpu.backend
    second.gpu = Session(first.bundle, second.cpu.preset, backend)
    assert set(first.gpu._engines.values()) == set(second.gpu._engines.values())
    for images in (1, 2, 1):  # the scratch memory moves
        second.same(images)
        first.same(images)


def test_two_backends_on_a_callers_stream_wait_for_each_other(pair_of):
    stream = CudaDevice()
    pairs = [pair_of(stream=stream.stream)]
    pairs.append(pair_of(bundle=pairs[0].bundle, seed=2, stream=stream.stream))
    devices = [pair.gpu.backend.device for pair in pairs]
    assert devices[0] is not devices[1]
    assert devices[0].session_lock() is devices[1].session_lock()
    assert devices[0].scratch is devices[1].scratch
    for _ in range(2):
        for pair in pairs:
            pair.same()


def test_sessions_on_two_devices(pair_of, standin):
    """Their engines are not shared: those of one GPU do not run on the other."""
    first = pair_of(device=0)
    second = pair_of(bundle=first.bundle, device=1)
    names = [pair.gpu.backend.name for pair in (first, second)]
    assert names == ["trt-tensorrt_rtx--cuda:0", "trt-tensorrt_rtx--cuda:1"]
    assert not set(first.gpu._engines.values()) & set(second.gpu._engines.values())
    for _ in range(2):
        for index, pair in enumerate((first, second)):
            result = pair.same()
            assert result.device_latents.__dlpack_device__()[1] == index
            np.testing.assert_array_equal(host_array(result.device_latents), result.latents)


def test_the_device_follows_from_the_stream_and_from_what_is_current(pair_of):
    on_second = CudaDevice(index=1)
    pair = pair_of(stream=on_second.stream)
    assert pair.gpu.backend.device.index == 1
    pair.same()
    with on_second.session_lock():
        assert TrtBackend().device.index == 1
    with pytest.raises(EngineError, match=r"stream of CUDA device 0, got one of device 1"):
        TrtBackend(stream=on_second.stream, device=0)
    with pytest.raises(EngineError, match=r"device of 0 to 1, got 2. CUDA_VISIBLE_DEVICES"):
        TrtBackend(device=2)


def test_open_by_name(pair_of):
    pair = pair_of()
    with Session.open(pair.bundle, preset="ddim-4", device=1, graphs="off") as session:
        assert session.backend.device.index == 1
        session.warm_up()
        assert session._graphs.why_not == "switched off"
        assert session.memory().arena > 0
        run = {s.name for s in pair.bundle.segments if s.role in (*LOOP_ROLES, "prompt")}
        assert set(session.launches()) == run


def test_threads_other_than_the_openers(pair_of):
    """Two sessions in two threads each, while a third thread opens and closes others."""
    first = pair_of()
    pairs = [first, pair_of(bundle=first.bundle, seed=2)]
    requests = [pair.request(images) for pair, images in zip(pairs, (1, 2), strict=True)]
    expected = [p.cpu.denoise(**r).latents for p, r in zip(pairs, requests, strict=True)]
    done = threading.Event()

    def open_others():
        while not done.is_set():
            with Session.open(first.bundle, preset="ddim-4", backend="trt") as session:
                session.warm_up()

    def run(which):
        for _ in range(4):
            found = pairs[which].gpu.denoise(**requests[which]).latents
            np.testing.assert_array_equal(found, expected[which])

    with ThreadPoolExecutor(5) as pool:
        opening = pool.submit(open_others)
        try:
            for running in [pool.submit(run, which) for which in (0, 1, 0, 1)]:
                running.result()
        finally:
            done.set()
        opening.result()
    assert [pair.gpu._graphs.why_not for pair in pairs] == ["", ""]


def test_a_monitor_measures_in_the_graph_and_changes_no_bit(pair_of):
    class Listener:
        def watch(self, bundle, preset):
            pass

        def add(self, change):
            changes.append(change)

    changes = []
    pair = pair_of(drift=Listener())
    plain = Session(pair.bundle, pair.gpu.preset, pair.gpu.backend)
    request = pair.request(2)
    for _ in range(2):
        result = pair.same_for(request)
        np.testing.assert_array_equal(plain.denoise(**request).latents, result.latents)
    for change in changes:
        np.testing.assert_array_equal(change, changes[0])
    assert np.isfinite(changes[0][~np.isnan(changes[0])]).all()
    assert (~np.isnan(changes[0])).any()


def test_a_loop_of_ones_own(pair_of):
    """Samples on the GPU stay there; those of numpy come back as numpy."""
    pair, rng = pair_of(), np.random.default_rng(4)
    prompt = rng.standard_normal((2, 7, 32), np.float32)
    samples = rng.standard_normal((4, 2, 4, 16, 16)).astype(np.float32)
    with pair.cpu.begin(prompt) as request:
        expected = [request.predict(step, sample).copy() for step, sample in enumerate(samples)]
    device = pair.gpu.backend.device
    for on_gpu in (False, True, True):
        with pair.gpu.begin(prompt) as request:
            for step, sample in enumerate(samples):
                if on_gpu:
                    tensor = device.tensor(
                        device.allocate(sample.nbytes), 0, sample.shape, "float32"
                    )
                    device.upload(tensor, sample)
                    sample = device.view(tensor)
                output = request.predict(step, sample)
                assert isinstance(output, np.ndarray) is not on_gpu
                np.testing.assert_array_equal(host_array(output), expected[step])


def test_no_cycle_keeps_memory_of_a_closed_session(pair_of, standin):
    pair = pair_of()
    pair.same()
    gc.collect()
    gc.disable()
    try:
        pair.gpu.close()
        del pair.gpu
        assert standin.alive() == {}
    finally:
        gc.enable()
