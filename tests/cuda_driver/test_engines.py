"""Engines on the stand-in GPU: captures that fail, what libraries say, caches, limits."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import numpy as np
import pytest

from blockcache.runtime import EngineError, Session
from blockcache.runtime.engines import ort_cuda
from blockcache.runtime.engines.choice import make_backend
from blockcache.runtime.engines.onnxruntime_library import ort
from blockcache.runtime.engines.ort import OrtBackend
from blockcache.runtime.engines.ort_cuda import OrtCudaBackend
from blockcache.runtime.engines.trt import TrtBackend
from blockcache.runtime.errors import EnginesMissingError, MissingExtraError
from blockcache.tools.check.times import time_segments

pytestmark = pytest.mark.driver


@pytest.fixture
def opened(tensorrt, bundle_of, engines_for):
    """``opened(...)``: (TensorRT stand-in, bundle with its engines)."""

    def make(title="tensorrt_rtx", **options):
        library, bundle = tensorrt(title), bundle_of()
        engines_for(bundle, library, **options)
        return library, bundle

    return make


def others_wait_for_the_device(standin, device, times):
    """Another library's thread waits for the whole device, in each of the next captures."""
    capture, wait = device.capture, standin.library.cuCtxSynchronize

    def disturbed(enqueue):
        def enqueue_meanwhile():
            enqueue()
            if times:
                times.pop()
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(in_context, device, wait).result()

        return capture(enqueue_meanwhile)

    device.capture = disturbed


def in_context(device, function):
    with device.context:
        return function()


# -- captures that fail ----------------------------------------------------------------------------


def test_a_capture_that_another_thread_breaks_costs_no_result_and_is_tried_again(
    pair_of, standin, caplog
):
    pair = pair_of()
    request = pair.request()
    others_wait_for_the_device(standin, pair.gpu.backend.device, [1, 1])
    for _ in range(2):
        pair.same_for(request)
        assert "STREAM_CAPTURE_INVALIDATED" in pair.gpu._graphs.why_not
    pair.same_for(request)
    assert (len(pair.gpu._graphs), pair.gpu._graphs.why_not) == (1, "")
    assert caplog.text.count("No CUDA graph") == 1
    pair.same_for(request)
    assert standin.calls("cuGraphLaunch") == 1
    del pair.gpu.backend.device.capture  # it refers to the device


def test_a_capture_that_the_kernels_refuse_costs_no_result(pair_of, cuda_kernels, monkeypatch):
    pair = pair_of()
    request = pair.request()
    device = pair.gpu.backend.device
    capture = device.capture

    def with_a_kernel_that_fails(enqueue):
        with monkeypatch.context() as patch:
            patch.setitem(vars(cuda_kernels), "bc_cuda_guided_solver_step", lambda *_: -3)
            return capture(enqueue)

    monkeypatch.setattr(device, "capture", with_a_kernel_that_fails)
    pair.same_for(request)
    assert "blockcache's kernels failed: bc_cuda_guided_solver_step" in pair.gpu._graphs.why_not
    monkeypatch.undo()


def test_engines_that_cannot_be_captured_are_named(pair_of):
    pair = pair_of()
    pair.library.refuses = "is_stream_capturable"
    pair.same()
    assert "these cannot be captured: " in pair.gpu._graphs.why_not
    assert "trunk_00" in pair.gpu._graphs.why_not


# -- what the library says -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("create_execution_context", "refuses an execution context: create_execution_context was"),
        ("set_input_shape", "refuses the shape of '.*': set_input_shape was told to fail"),
        ("set_tensor_address", "refuses the address of '.*': set_tensor_address was told to fail"),
        ("set_device_memory", "refuses .* bytes of activation memory: set_device_memory was told"),
        ("execute_async_v3", "tensorrt_rtx failed in segment 'prompt': execute_async_v3 was told"),
    ],
)
def test_what_the_library_refuses_is_quoted(pair_of, function, said):
    pair = pair_of()
    pair.library.refuses = function
    with pytest.raises(EngineError, match=said):
        pair.gpu.denoise(**pair.request())


def test_scratch_is_what_the_shapes_need_where_that_is_more_than_the_profiles(pair_of):
    pair = pair_of()
    pair.library.more_scratch = 4096
    for _ in range(2):
        pair.same()


def test_a_failure_quotes_what_was_said_before(opened):
    library, bundle = opened()
    backend = TrtBackend()
    segment = bundle.segments[0]
    backend.load(bundle, segment)
    library.say("an earlier warning", 2)
    library.say("only information", 3)
    assert backend.library.quoted() == "an earlier warning"
    assert backend.library.quoted([("E", " now ")]) == "now"


# -- opening ---------------------------------------------------------------------------------------


def test_a_plan_that_is_none_is_refused_by_name(opened):
    _, bundle = opened()
    backend = TrtBackend(verify=False)
    name = bundle.segments[0].name
    path = bundle.folder / "engines/sm80" / f"{name}.plan"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(EngineError, match=rf"segment {name!r} in .*it says: this is no plan"):
        backend.load(bundle, bundle.segments[0])


def test_stripped_engines_get_their_weights(opened, pair_of):
    _, bundle = opened(weights="stripped")
    pair = pair_of(bundle=bundle)
    for _ in range(2):
        pair.same()


def test_weights_that_do_not_fit_are_refused_by_name(opened):
    library, bundle = opened(weights="stripped")
    backend = TrtBackend()
    backend.load(bundle, bundle.segments[0])
    library.refuses = "refit_from_file"
    with pytest.raises(EngineError, match=r"to fit the engine of .*refit_from_file was told"):
        backend.load(bundle, bundle.segments[1])


def test_a_size_outside_all_profiles_is_refused(pair_of):
    pair = pair_of()
    with pytest.raises(EngineError, match=r"got \[12, .*--max-batch, or --resolution"):
        pair.gpu.denoise(**pair.request(6))


def test_engines_for_nothing_that_is_here_say_how_to_build(opened, tensorrt):
    _, bundle = opened()
    assert tensorrt("tensorrt 11").module.name == "tensorrt"
    with pytest.raises(EnginesMissingError, match=r"Build them: .* --target sm80"):
        Session.open(bundle, backend=TrtBackend(library="tensorrt"))


def test_errors_of_a_target_by_name(opened):
    _, bundle = opened(target="sm89")
    with pytest.raises(EnginesMissingError, match="'sm80'"):
        Session.open(bundle, backend=TrtBackend(target="sm80"))
    assert Session.open(bundle, backend=TrtBackend(target="sm89")).steps


# -- the cache of kernels --------------------------------------------------------------------------


def caches_of(bundle):
    return list((bundle.folder / "engines/sm80").glob("runtime-*.cache"))


def test_kernels_of_the_first_run_are_kept_under_the_drivers_version(opened, standin, pair_of):
    standin.have(version=13010)
    library, bundle = opened()
    assert library.module.name == "tensorrt_rtx"
    pair_of(bundle=bundle).same()
    (cache,) = caches_of(bundle)
    assert cache.name.startswith("runtime-8.0-1.7.")
    assert cache.name.endswith("-cuda13.1.cache")
    content = cache.read_bytes()
    assert content
    pair_of(bundle=bundle, seed=2).same()
    assert len(cache.read_bytes()) >= len(content)
    standin.have(version=13020)
    pair_of(bundle=bundle).same()
    assert len(caches_of(bundle)) == 2


def test_a_cache_that_is_rejected_is_replaced(opened, pair_of):
    library, bundle = opened()
    pair_of(bundle=bundle).same()
    (cache,) = caches_of(bundle)
    cache.write_bytes(b"of another version" * 1000)
    library.rejects_caches = True
    pair_of(bundle=bundle).same()
    assert cache.read_bytes().startswith(b"kernel ")


def test_a_bundle_that_cannot_be_written_to_goes_without(opened, pair_of, monkeypatch):
    from blockcache.runtime.engines import trt

    def full(path, content):
        raise OSError("disk full")

    monkeypatch.setattr(trt, "write_bytes", full)
    _, bundle = opened()
    pair_of(bundle=bundle).same()
    assert caches_of(bundle) == []


# -- drivers and GPUs that the library does not run with -------------------------------------------


@pytest.fixture
def wheel_for(monkeypatch):
    """``wheel_for(13)``: the library's wheel is the one for CUDA 13."""

    def pretend(major):
        def version(name):
            if name.endswith(f"_cu{major}"):
                return "1.7"
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "version", version)

    return pretend


OLD = (
    r"Expected a driver for CUDA 13\.0 or later \(release 580 or later\), which tensorrt_rtx "
    r"1\.7\.1\.116 needs, found one for CUDA 12\.4\. Update the driver, or install the library "
    r"for CUDA 12: pip install tensorrt-rtx-cu12"
)


def test_a_driver_that_is_too_old_is_named(opened, standin, wheel_for, caplog):
    _, bundle = opened()
    standin.have(version=12040)
    wheel_for(13)
    with pytest.raises(EngineError, match=OLD):
        make_backend("trt")
    with caplog.at_level(logging.WARNING, "blockcache"):
        assert isinstance(make_backend("auto", bundle=bundle), OrtBackend)
    assert caplog.messages[0].startswith("Backend 'auto' takes the CPU. Expected a driver")
    wheel_for(12)
    assert isinstance(make_backend("auto", bundle=bundle), TrtBackend)
    standin.have(version=13000)
    wheel_for(13)
    assert isinstance(make_backend("auto", bundle=bundle, device=1), TrtBackend)


NO_H100 = (
    r"Expected a GPU of compute capability 7\.5, .*12\.1, got 9\.0: tensorrt_rtx .* does not run "
    r"on it\. Take the data-centre TensorRT .*--target current\), or .*backend 'ort-cuda'"
)


def test_a_gpu_that_the_library_does_not_run_on_is_named_with_the_ways_out(opened, standin, caplog):
    _, bundle = opened()
    standin.capability(9, 0)
    with pytest.raises(EngineError, match=NO_H100):
        make_backend("trt")
    with caplog.at_level(logging.WARNING, "blockcache"):
        assert isinstance(make_backend("auto", bundle=bundle), OrtBackend)
    assert "got 9.0" in caplog.text


def test_later_gpus_and_the_data_centre_library_are_not_refused(tensorrt, standin):
    tensorrt()
    standin.capability(13, 0)
    assert TrtBackend().device.capability == "13.0"
    standin.capability(9, 0)
    tensorrt("tensorrt 11")
    assert TrtBackend(library="tensorrt").device.capability == "9.0"


# -- times -----------------------------------------------------------------------------------------


def test_segments_are_timed_by_the_device(opened):
    library, bundle = opened()
    library.slow_ms = 2.0
    times = time_segments(bundle, TrtBackend(), repeats=2)
    assert list(times.values()) == pytest.approx([2.0] * len(times))


# -- ONNX Runtime on the GPU -----------------------------------------------------------------------


class OnGpu:
    """ONNX Runtime's session with a provider that runs on the stand-in."""

    def __init__(self, standin, real, path, options, providers):
        self._standin, self._providers = standin, [name for name, _ in providers]
        self._stream = int(providers[-1][1]["user_compute_stream"])
        options.intra_op_num_threads = 1
        self._session = real(path, options, providers=["CPUExecutionProvider"])

    def get_providers(self):
        return self._providers

    def io_binding(self):
        return OnGpuBinding(self._session.io_binding())

    def run_with_iobinding(self, binding, options):
        session, inner = self._session, binding.inner
        code = self._standin.put(self._stream, lambda: session.run_with_iobinding(inner))
        if code:
            raise RuntimeError(f"launch failed: {code}")


class OnGpuBinding:
    def __init__(self, inner):
        self.inner = inner

    def bind_input(self, name, place, index, element, shape, pointer):
        assert place == "cuda"
        self.inner.bind_input(name, "cpu", 0, element, shape, pointer)

    def bind_output(self, name, place, index, element, shape, pointer):
        assert place == "cuda"
        self.inner.bind_output(name, "cpu", 0, element, shape, pointer)


@pytest.fixture
def onnxruntime_gpu(standin, monkeypatch):
    """ONNX Runtime as onnxruntime-gpu has it; what was registered as a shared arena."""
    registered = []
    monkeypatch.setattr(
        ort, "create_and_register_allocator_v2", lambda *given: registered.append(given)
    )
    monkeypatch.setattr(ort, "get_available_providers", lambda: [ort_cuda.TENSORRT, ort_cuda.CUDA])
    ort_cuda._register_arena.cache_clear()

    real = ort.InferenceSession

    def opened(path, options, providers):
        if providers == ["CPUExecutionProvider"]:
            return real(path, options, providers=providers)
        return OnGpu(standin, real, path, options, providers)

    monkeypatch.setattr(ort, "InferenceSession", opened)
    yield registered
    ort_cuda._register_arena.cache_clear()


@pytest.mark.parametrize("name", ["ort-cuda", "ort-tensorrt"])
def test_onnxruntime_on_the_gpu(onnxruntime_gpu, bundle_of, name):
    bundle = bundle_of()
    sessions = [
        Session.open(bundle, preset="ddim-4", backend=name, device=1),
        Session.open(bundle, preset="ddim-4", backend=OrtBackend(threads=1)),
    ]
    second = Session.open(bundle, preset="ddim-4", backend=name, device=1)
    assert len(onnxruntime_gpu) == 1, "one arena a device"
    assert onnxruntime_gpu[0][0] == ort_cuda.CUDA
    assert second.backend.name != sessions[0].backend.name, "tied to a stream"
    assert sessions[0].backend.name.startswith(f"onnxruntime-{name[4:]} ")
    prompt = np.random.default_rng(0).standard_normal((1, 7, 32), np.float32)
    request = [sessions[1].noise([3]), prompt, -prompt]
    for _ in range(2):
        found = [session.denoise(*request).latents for session in sessions]
        np.testing.assert_array_equal(*found)
    assert (bundle.folder / "engines/onnxruntime-8.0").is_dir() is (name == "ort-tensorrt")


def test_onnxruntime_on_the_gpu_names_what_it_cannot_load_or_bind(
    onnxruntime_gpu, bundle_of, monkeypatch
):
    bundle, backend = bundle_of(), OrtCudaBackend(tensorrt=True)
    (bundle.folder / "engines").write_bytes(b"no folder")  # nothing is kept then
    segment = next(s for s in bundle.segments if s.name == "trunk_00")
    engine = backend.load(bundle, segment)
    tensors = {
        spec.name: backend.device.tensor(backend.device.allocate(64), 0, (1,), "int64")
        for spec in (*segment.inputs, *segment.outputs)
    }
    monkeypatch.setattr(OnGpuBinding, "bind_input", planted)
    with pytest.raises(EngineError, match=r"cannot bind '.*' of segment 'trunk_00': planted\. Com"):
        engine.bind(tensors)
    monkeypatch.setattr(ort, "InferenceSession", planted)
    with pytest.raises(EngineError, match=r"cannot load segment 'trunk_00' on the GPU: planted\. "):
        backend.load(bundle, segment)


def planted(*arguments, **options):
    raise RuntimeError("planted")


def test_onnxruntime_without_a_gpu_provider_names_the_extra(standin):
    with pytest.raises(MissingExtraError, match="onnxruntime-gpu"):
        OrtCudaBackend()
