"""Tensors and streams of other libraries: DLPack and CUDA array interface, without a device."""

from __future__ import annotations

import ctypes
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockcache.runtime.devices import cuda_driver, dlpack
from blockcache.runtime.devices.cuda_driver import stream_handle
from blockcache.runtime.devices.device_view import DeviceView
from blockcache.runtime.devices.host import HostDevice
from blockcache.runtime.devices.interop import host_array, place
from blockcache.runtime.devices.tensor import Tensor, decode, encode
from blockcache.runtime.errors import EngineError, InputError


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64"])
def test_bytes_come_back_as_numbers(dtype):
    values = np.array([[1.5, -2.0, 3.0]], np.float32)
    expected = values.astype(np.int64) if dtype == "int64" else values
    back = decode(encode(values, dtype).reshape(-1), dtype)
    np.testing.assert_array_equal(back, expected.reshape(-1))


def test_streams_are_numbers_or_speak_the_protocol():
    class Stream:
        def __cuda_stream__(self):
            return (0, 1234)

    assert stream_handle(7) == 7
    assert stream_handle(Stream()) == 1234
    assert stream_handle(SimpleNamespace(cuda_stream=99)) == 99
    with pytest.raises(EngineError, match="__cuda_stream__"):
        stream_handle("0")


# -- in: host tensors ------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    step=st.integers(1, 3),
    data=st.data(),
    dtype=st.sampled_from(["float32", "float16", "float64", "int64", "uint8", "bool"]),
)
def test_any_layout_is_read_as_numpy_reads_it(shape, step, data, dtype):
    whole = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    axes = data.draw(st.permutations(range(len(shape))))
    values = whole.transpose(axes)
    values = values[::step] if values.ndim else values
    lent = dlpack.borrow(values)
    assert (lent.shape, lent.dtype) == (values.shape, dtype)
    np.testing.assert_array_equal(dlpack.host_view(lent), values)
    if values.size:
        assert lent.contiguous == values.flags.c_contiguous


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_tensors_are_taken_in_their_precision(dtype):
    torch = pytest.importorskip("torch")
    values = torch.arange(6).reshape(2, 3).to(getattr(torch, dtype)).T
    taken = host_array(values)
    assert (type(taken), taken.dtype) == (np.ndarray, np.float32)
    np.testing.assert_array_equal(taken, values.float().numpy())
    values.zero_()
    assert taken.max() == 5, "a copy: the caller may go on"


def test_other_values_pass():
    array = np.zeros(3, np.float16)
    assert host_array(None) is None
    assert host_array(array) is array
    assert host_array([1, 2]) == [1, 2]
    torch = pytest.importorskip("torch")
    assert host_array(torch.tensor([1, 2])).dtype == np.int64


def test_what_cannot_be_read_says_what_to_do():
    torch = pytest.importorskip("torch")
    with pytest.raises(InputError, match="Convert it to float32 first, without gradients"):
        host_array(torch.zeros(2, requires_grad=True))
    with pytest.raises(InputError, match="DLPack type 5 of 64 bits"):
        host_array(torch.zeros(2, dtype=torch.complex64))


# -- in: device tensors ----------------------------------------------------------------------------


class OnDevice:
    """Host memory that claims to lie on a GPU; remembers which stream was asked for."""

    def __init__(self, values, device=dlpack.CUDA):
        self.values, self.device, self.streams = values, device, []

    def __dlpack_device__(self):
        return self.device, 0

    def __dlpack__(self, stream=None):
        self.streams.append(stream)
        return self.values.__dlpack__()


@pytest.fixture
def copies(monkeypatch):
    """Copies from the device are copies of host memory; (bytes, stream) of each."""
    made = []

    def copy(host, pointer, stream):
        made.append((host.nbytes, stream))
        ctypes.memmove(host.ctypes.data, pointer, host.nbytes)

    monkeypatch.setattr(cuda_driver, "copy_to_host", copy)
    return made


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_device_tensor_waits_for_its_library(copies, dtype):
    torch = pytest.importorskip("torch")
    values = OnDevice(torch.arange(6).reshape(2, 3).to(getattr(torch, dtype)))
    np.testing.assert_array_equal(host_array(values), np.arange(6.0).reshape(2, 3))
    assert values.streams == [dlpack.LEGACY_STREAM]
    assert copies == [(24 if dtype == "float32" else 12, dlpack.LEGACY_STREAM)]


def test_a_strided_device_tensor_is_refused(copies):
    with pytest.raises(InputError, match="contiguous"):
        host_array(OnDevice(np.zeros((4, 3), np.float32).T))
    interface = {"shape": (2,), "typestr": "<f4", "data": (256, False), "strides": (8,)}
    with pytest.raises(InputError, match="contiguous"):
        host_array(SimpleNamespace(__cuda_array_interface__=interface))
    assert copies == []


def test_a_device_of_another_kind_is_refused(copies):
    with pytest.raises(InputError, match="DLPack device 7"):
        host_array(OnDevice(np.zeros(3, np.float32), device=7))


@pytest.mark.parametrize(("stream", "used"), [(None, 1), (1, 1), (77, 77)])
def test_a_cuda_array_is_copied_on_its_stream(copies, stream, used):
    values = np.arange(3, dtype=np.float16)
    interface = {
        "shape": (3,), "typestr": "<f2", "data": (values.ctypes.data, False), "strides": None,
        "stream": stream,
    }  # fmt: skip
    taken = host_array(SimpleNamespace(__cuda_array_interface__=interface))
    np.testing.assert_array_equal(taken, [0.0, 1.0, 2.0])
    assert copies == [(6, used)]


# -- out -------------------------------------------------------------------------------------------


def test_a_result_is_seen_in_place():
    view = DeviceView(Tensor(4096, (1, 4, 2, 2), "float32", None), 77, 3)
    interface = view.__cuda_array_interface__
    assert interface["data"] == (4096, False)
    assert (interface["shape"], interface["typestr"]) == ((1, 4, 2, 2), "<f4")
    assert interface["stream"] == 77
    assert view.__dlpack_device__() == (dlpack.CUDA, 3)
    lent = dlpack.borrow(view)
    assert (lent.pointer, lent.shape, lent.device) == (4096, (1, 4, 2, 2), dlpack.CUDA)
    assert lent.contiguous
    with pytest.raises(BufferError, match="without a copy"):
        view.__dlpack__(copy=True)


class Owner:
    pass


def lender(values, owner):
    """An object that lends host memory as ``DeviceView`` lends a GPU's."""

    def lend(**_):
        return dlpack.lend(values.ctypes.data, values.shape, "float32", (dlpack.CPU, 0), owner())

    return SimpleNamespace(__dlpack__=lend, __dlpack_device__=lambda: (dlpack.CPU, 0))


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_memory_lives_as_long_as_a_consumer_uses_it(library):
    read = np.from_dlpack if library == "numpy" else pytest.importorskip(library).from_dlpack
    values, owner = np.arange(6, dtype=np.float32).reshape(2, 3), Owner()
    alive = weakref.ref(owner)
    taken = read(lender(values, alive))
    del owner
    gc.collect()
    values[0, 0] = 9.0
    assert alive() is not None
    assert float(taken[0, 0]) == 9.0, "in place, not a copy"
    del taken
    gc.collect()
    assert alive() is None


def test_a_capsule_that_nobody_takes_is_given_back():
    owner = Owner()
    alive = weakref.ref(owner)
    capsule = dlpack.lend(4096, (2, 3), "float32", (dlpack.CUDA, 0), owner)
    del owner
    gc.collect()
    assert alive() is not None
    del capsule
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_floats_of_any_width_are_lent(dtype):
    view = DeviceView(Tensor(4096, (1, 4, 2, 2), dtype, None), 77, 0)
    assert dlpack.borrow(view).dtype == dtype
    named = getattr(view, "__cuda_array_interface__", {"typestr": "none"})["typestr"]
    assert named == {"float32": "<f4", "float16": "<f2", "bfloat16": "none"}[dtype]


# -- a sample that is put in place -----------------------------------------------------------------


class Gpu(HostDevice):
    """Host memory that passes for a GPU's."""

    name = "cuda"


def on_gpu(values, dtype="float32"):
    """Host memory, lent as that of a GPU."""
    tensor = Tensor(values.ctypes.data, values.shape, dtype, values)
    return DeviceView(tensor, 0, 0)


def target_on(device, shape=(2, 3)):
    return device.tensor(device.allocate(24), 0, shape, "float32")


def test_a_tensor_on_the_gpu_does_not_leave_it(monkeypatch):
    device, values = Gpu(), np.arange(6, dtype=np.float32).reshape(2, 3)
    monkeypatch.setattr(device, "upload", None)
    target = target_on(device)
    assert place(device, "sample", target, on_gpu(values)) is True
    assert np.array_equal(target.array, values)


def test_a_tensor_on_the_host_is_uploaded():
    for device in (Gpu(), HostDevice()):
        target = target_on(device)
        assert place(device, "sample", target, np.ones((2, 3), np.float32)) is False
        assert target.array.all()


def test_a_tensor_on_the_gpu_is_not_converted_in_silence():
    device, values = Gpu(), np.zeros((2, 3), np.float16)
    with pytest.raises(InputError) as caught:
        place(device, "sample", target_on(device), on_gpu(values, "float16"))
    assert str(caught.value) == (
        "sample: expected float32 [2, 3], got float16 [2, 3]. Convert it to float32 first; a batch "
        "of another size is another request."
    )
