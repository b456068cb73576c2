"""The CUDA device by itself: contexts, threads, captures, frees, times, errors."""

from __future__ import annotations

import functools
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from blockcache.runtime.devices import cuda_driver
from blockcache.runtime.devices.cuda import CudaDevice
from blockcache.runtime.devices.cuda_driver import (
    call,
    capture_lock,
    device_capability,
    device_count,
    device_label,
    driver,
)
from blockcache.runtime.devices.interop import host_array
from blockcache.runtime.errors import EngineError, MissingExtraError

pytestmark = pytest.mark.driver

VALUES = np.arange(64, dtype=np.float32)


@pytest.fixture
def device():
    return CudaDevice()


def filled(device, values=VALUES):
    tensor = device.tensor(device.allocate(values.nbytes), 0, values.shape, "float32")
    device.upload(tensor, values)
    return tensor


def in_a_thread(function):
    """Run where no context is current."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def current():
    return int(call("cuCtxGetCurrent"))


# -- contexts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_every_function_works_in_any_thread_and_leaves_it_as_it_was(index):
    device = CudaDevice(index=index)

    def use():
        before = current()
        tensor = filled(device)
        copy = filled(device, np.zeros_like(VALUES))
        device.copy_from(copy, tensor.pointer)
        loaded = device.capture(functools.partial(device.copy_from, copy, tensor.pointer))
        with device.session_lock():
            loaded()
        device.synchronize()
        np.testing.assert_array_equal(device.download(copy), VALUES)
        np.testing.assert_array_equal(host_array(device.view(copy)), VALUES)
        assert len(device.times_ms([loaded])) == 1
        del tensor, copy, loaded
        gc.collect()
        return before, current()

    assert in_a_thread(use) == (0, 0)
    other = CudaDevice(index=1 - index)
    with other.context:
        before, after = use()
    assert before == after != 0


def test_memory_of_another_device_is_read_in_its_context(device):
    second = CudaDevice(index=1)
    lent = second.view(filled(second))
    assert lent.__dlpack_device__()[1] == 1
    with device.context:
        np.testing.assert_array_equal(host_array(lent), VALUES)


def test_a_session_lock_is_given_back_where_the_context_cannot_be_made_current(device, standin):
    standin.fail("cuCtxPushCurrent", 201)
    with pytest.raises(EngineError, match="cuCtxPushCurrent: CUDA_ERROR_INVALID_CONTEXT"):
        device.session_lock().__enter__()
    in_a_thread(lambda: device.session_lock().__enter__().__exit__())  # else this waits for ever


# -- captures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "illegal",
    [
        lambda device: device.synchronize(),
        lambda device: device.allocate(64),
        lambda device: call("cuCtxSynchronize"),
        lambda device: device.download(filled(device)),
    ],
    ids=["synchronise", "allocate", "wait for the device", "download"],
)
def test_a_planted_illegal_call_fails_the_capture_and_nothing_else(device, illegal):
    with pytest.raises(EngineError, match="STREAM_CAPTURE"):
        device.capture(lambda: illegal(device))
    tensor = filled(device)
    replay = device.capture(lambda: device.copy_from(tensor, tensor.pointer))
    with device.session_lock():
        replay()
    np.testing.assert_array_equal(device.download(tensor), VALUES)


def test_a_call_that_fails_quietly_inside_a_capture_is_seen_at_its_end(device, standin):
    with pytest.raises(EngineError, match="cuStreamEndCapture: CUDA_ERROR_STREAM_CAPTURE_INVALI"):
        device.capture(lambda: standin.library.cuCtxSynchronize())


def test_the_callers_own_error_ends_the_capture(device):
    with pytest.raises(KeyError):
        device.capture(lambda: {}["absent"])
    device.synchronize()


@pytest.mark.parametrize("function", ["cuGraphInstantiateWithFlags", "cuGraphUpload"])
def test_a_graph_that_cannot_be_made_leaves_nothing(device, standin, function):
    standin.fail(function, 2)
    with pytest.raises(EngineError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        device.capture(lambda: None)


def test_frees_inside_a_capture_wait_for_its_end(device, standin):
    """The collector runs when it likes: also there."""
    kept = [filled(device), device.capture(lambda: None), CudaDevice()]
    kept.append(kept)  # a cycle: it goes with the collector

    def collect():
        gc.collect()
        assert standin.alive()["blocks"] == 1
        assert standin.alive()["executable graphs"] == 1
        assert standin.alive()["streams"] == 2

    del kept
    replay = device.capture(collect)
    assert standin.alive() == {"streams": 1, "executable graphs": 1}
    with device.session_lock():
        replay()


def test_what_waits_for_the_device_waits_for_a_capture_first(device):
    """An edit by a callback in one thread, while a graph is captured in another."""
    second, entered = CudaDevice(), threading.Event()
    latents, model_input = (filled(second, np.ones((1, 4, 2, 2), np.float32)) for _ in range(2))
    scale = second.model_input(np.ones(2, np.float32), latents, model_input)

    def edit():
        with second.session_lock():
            entered.set()
            scale(0)

    def enqueue():
        pool.submit(edit)
        assert entered.wait(60)
        time.sleep(0.05)  # long enough for it to break the capture, if it could

    with ThreadPoolExecutor(1) as pool:
        device.capture(enqueue)
    second.synchronize()


def test_one_capture_at_a_time_and_none_while_something_loads(device):
    done = []
    with ThreadPoolExecutor(1) as pool:
        with capture_lock:
            capturing = pool.submit(lambda: (device.capture(lambda: None), done.append("captured")))
            time.sleep(0.05)
            done.append("loaded")
        capturing.result()
    assert done == ["loaded", "captured"]


@pytest.mark.parametrize("handle", [0, 1])
def test_the_legacy_default_stream_runs_and_says_why_it_is_not_captured(handle):
    device = CudaDevice(handle)
    np.testing.assert_array_equal(device.download(filled(device)), VALUES)
    with pytest.raises(EngineError, match=rf"legacy default stream \(handle {handle}\). Leave"):
        device.capture(lambda: None)


# -- times -----------------------------------------------------------------------------------------


def test_times_are_the_devices_not_the_hosts(device, standin):
    """The host takes 2 ms for each launch, the device 5 ms: it never waits after the first."""

    def launch():
        standin.host_works(2.0)
        standin.delay(device.stream, 5.0)

    assert device.times_ms([launch] * 4) == pytest.approx([7.0, 5.0, 5.0, 5.0])


def test_events_are_destroyed_where_a_launch_fails(device):
    with pytest.raises(EngineError, match="planted"):
        device.times_ms([lambda: None, planted])


def planted():
    raise EngineError("planted")


# -- errors ----------------------------------------------------------------------------------------


def test_errors_name_the_function_and_the_code(device, standin):
    standin.fail("cuMemAlloc", 2)
    with pytest.raises(EngineError, match=r"^cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY: said by the st"):
        device.allocate(64)


def test_devices_are_described(standin):
    assert (device_count(), device_label(), device_label(1)) == (
        2,
        "Stand-in GPU 0",
        "Stand-in GPU 1",
    )
    assert device_capability(1) == "8.0"
    with pytest.raises(EngineError, match="device of 0 to 1, got -1"):
        device_capability(-1)
    standin.have(devices=0)
    assert device_count() == 0
    with pytest.raises(EngineError, match=r"the driver finds none. Run on a machine with an NVID"):
        CudaDevice()
    standin.fail("cuDeviceGetCount", 999)
    assert device_count() == 0


@pytest.fixture
def anew():
    """The driver is initialised anew."""
    driver.cache_clear()
    yield
    driver.cache_clear()


def test_a_driver_that_does_not_start_says_what_to_do(standin, anew):
    standin.fail("cuInit", 101)
    with pytest.raises(EngineError, match=r"cuInit: CUDA_ERROR_INVALID_DEVICE.*\. Run on a mach"):
        CudaDevice()
    assert CudaDevice().index == 0


def test_a_driver_without_a_function_says_which(standin):
    with pytest.raises(EngineError, match=r"cuMemGetInfo: .*cuMemGetInfo"):
        call("cuMemGetInfo")


def test_without_cuda_bindings_the_extra_is_named(anew, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(cuda_driver.importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match="cuda-bindings"):
        CudaDevice()
    assert device_count() == 0


def test_a_free_that_fails_is_nobodys_error(device, standin):
    """Finalizers run where nobody could take it; at exit the driver may be gone."""
    cuda_driver.free(device.context, "cuMemFree", 12345)
    assert standin.wrong() == "memory was freed that is not alive\n"


# -- the stand-in itself ---------------------------------------------------------------------------


def test_the_stand_in_sees_what_must_not_be(device, standin):
    tensor = filled(device)
    pointer, device_memory = tensor.pointer, tensor.owner
    assert standin.alive() == {"blocks": 1, "streams": 1}
    del tensor, device_memory
    assert standin.alive() == {"streams": 1}
    kept = device.allocate(256)
    device.copy_from(device.tensor(kept, 0, (4,), "float32"), pointer)
    with pytest.raises(EngineError, match="ILLEGAL_ADDRESS"):
        device.synchronize()
    assert standin.wrong() == "memory was used after it was freed\n"
    standin.library.standin_reset()
    with device.context, pytest.raises(EngineError, match="INVALID_VALUE"):
        call("cuMemFree", pointer)
    assert standin.wrong() == "memory was freed that is not alive\n"
    with pytest.raises(EngineError, match="INVALID_CONTEXT"):
        in_a_thread(lambda: call("cuMemAlloc", 64))
    with CudaDevice(index=1).context, pytest.raises(EngineError, match="INVALID_HANDLE"):
        call("cuStreamSynchronize", device.stream)
