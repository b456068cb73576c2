"""Binding and addresses of TensorRT engines, against a recorded API: without a device."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from blockcache.runtime.cuda import Scratch, decode, stream_handle
from blockcache.runtime.device import Tensor, encode
from blockcache.runtime.engine_trt import RuntimeCache, TrtEngine
from blockcache.runtime.errors import EngineError, InputError
from blockcache.runtime.interop import DeviceView, host_array
from blockcache.runtime.plan import Dim, Segment, TensorSpec
from blockcache.runtime.tensorrt_library import TensorRT


class FakeContext:
    """An execution context that remembers what it was told."""

    def __init__(self, refuses=""):
        self.refuses, self.shapes, self.addresses, self.runs = refuses, {}, {}, []
        self.profile = self.memory = None

    def set_optimization_profile_async(self, index, stream):
        self.profile = index
        return True

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return self.refuses != "shape"

    def set_tensor_address(self, name, pointer):
        self.addresses[name] = pointer
        return self.refuses != "address"

    def set_device_memory(self, pointer, size):
        self.memory = (pointer, size)

    def execute_async_v3(self, stream):
        self.runs.append(stream)
        return self.refuses != "run"


class FakeEngine:
    """Two profiles: batch 1 to 8 at 16 x 16, batch 1 to 2 at 32 x 32."""

    num_optimization_profiles = 2

    def __init__(self, refuses=""):
        self.refuses, self.contexts, self.strategies = refuses, [], []

    def get_tensor_profile_shape(self, name, index):
        batch, size = ((8, 16), (2, 32))[index]
        return [(1, 4, size, size), (2, 4, size, size), (batch, 4, size, size)]

    def get_device_memory_size_for_profile_v2(self, index):
        return (1000, 5000)[index]

    def create_execution_context(self, strategy):
        self.strategies.append(strategy)
        self.contexts.append(FakeContext(self.refuses))
        return self.contexts[-1]


def library(name="tensorrt"):
    strategy = SimpleNamespace(USER_MANAGED="user managed")
    module = SimpleNamespace(ExecutionContextAllocationStrategy=strategy, __version__="10.9.0")
    return TensorRT(name, module, SimpleNamespace(lines=None))


def image(name):
    return TensorSpec(
        name, "bfloat16", tuple(Dim.parse(d) for d in ("batch", 4, "height", "width"))
    )


SEGMENT = Segment("trunk_00", "trunk", "trunk_00.onnx", (image("sample"),), (image("out"),))


@pytest.fixture
def device():
    pointers = iter(range(1 << 20, 1 << 30, 1 << 20))
    scratch = Scratch(lambda count: SimpleNamespace(pointer=next(pointers)))
    return SimpleNamespace(stream=77, scratch=scratch)


def tensors(device, size=16, batch=2, base=256):
    owner = SimpleNamespace(device=device)
    shape = (batch, 4, size, size)
    return {
        "sample": Tensor(base, shape, "bfloat16", owner),
        "out": Tensor(2 * base, shape, "bfloat16", owner),
        "unrelated": Tensor(3 * base, shape, "bfloat16", owner),
    }


def opened(engine, tmp_path, name="tensorrt"):
    return TrtEngine(SEGMENT, library(name), engine, None, RuntimeCache(tmp_path / "a.cache"))


def test_addresses_are_set_once_and_launching_only_launches(device, tmp_path):
    engine = FakeEngine()
    launch = opened(engine, tmp_path).bind(tensors(device))
    (context,) = engine.contexts
    assert context.addresses == {"sample": 256, "out": 512}
    assert context.shapes == {"sample": (2, 4, 16, 16)}
    assert (context.profile, engine.strategies) == (0, ["user managed"])
    for _ in range(3):
        launch()
    assert context.runs == [77, 77, 77]
    assert context.addresses == {"sample": 256, "out": 512}


def test_buffers_in_turn_have_contexts_of_their_own(device, tmp_path):
    engine = FakeEngine()
    made = opened(engine, tmp_path)
    first, second = made.bind(tensors(device)), made.bind(tensors(device, base=4096))
    first()
    second()
    assert [c.addresses["sample"] for c in engine.contexts] == [256, 4096]


def test_contexts_share_the_largest_scratch(device, tmp_path):
    engine = FakeEngine()
    made = opened(engine, tmp_path)
    made.bind(tensors(device))
    made.bind(tensors(device, size=32))
    made.bind(tensors(device))
    assert [c.profile for c in engine.contexts] == [0, 1, 0]
    assert {c.memory for c in engine.contexts} == {(2 << 20, 5000)}
    assert (device.scratch.bytes, device.scratch.generation) == (5000, 2)


def test_a_shape_outside_all_profiles_names_the_options(device, tmp_path):
    with pytest.raises(EngineError, match=r"\[9, 4, 16, 16\].*--max-batch"):
        opened(FakeEngine(), tmp_path).bind(tensors(device, batch=9))


@pytest.mark.parametrize("refuses", ["shape", "address"])
def test_what_the_library_refuses_names_the_segment(device, tmp_path, refuses):
    with pytest.raises(EngineError, match=r"'trunk_00'.*refuses the " + refuses):
        opened(FakeEngine(refuses), tmp_path).bind(tensors(device))


def test_a_failed_launch_names_the_segment(device, tmp_path):
    launch = opened(FakeEngine("run"), tmp_path).bind(tensors(device))
    with pytest.raises(EngineError, match="trunk_00"):
        launch()


class FakeRuntimeCache:
    def __init__(self):
        self.content = b""

    def deserialize(self, content):
        self.content = bytes(content)
        return True

    def serialize(self):
        return self.content


class FakeConfig:
    def create_runtime_cache(self):
        self.made = FakeRuntimeCache()
        return self.made

    def set_runtime_cache(self, cache):
        self.cache = cache


def test_the_runtime_cache_is_kept_beside_the_engines(tmp_path):
    path, config = tmp_path / "runtime.cache", FakeConfig()
    cache = RuntimeCache(path)
    cache.save()  # nothing attached: nothing to write
    cache.attach(config)
    config.cache.content = b"kernels"
    cache.save()
    assert path.read_bytes() == b"kernels"
    later = FakeConfig()
    RuntimeCache(path).attach(later)
    assert later.cache.content == b"kernels"
    assert list(tmp_path.iterdir()) == [path]


# -- tensors and streams of other libraries --------------------------------------------------------


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


def test_a_dlpack_tensor_is_taken_as_it_is():
    torch = pytest.importorskip("torch")
    values = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    taken = host_array(values)
    assert isinstance(taken, np.ndarray)
    np.testing.assert_array_equal(taken, values.numpy())
    assert host_array(None) is None
    with pytest.raises(InputError, match="Convert it to float32"):
        host_array(values.to(torch.bfloat16))


def test_a_strided_device_tensor_is_refused():
    interface = {"shape": (2,), "typestr": "<f4", "data": (256, False), "strides": (8,)}
    with pytest.raises(InputError, match="contiguous"):
        host_array(SimpleNamespace(__cuda_array_interface__=interface))


def test_a_result_is_seen_in_place():
    view = DeviceView(Tensor(4096, (1, 4, 2, 2), "float32", None), 77)
    interface = view.__cuda_array_interface__
    assert interface["data"] == (4096, False)
    assert (interface["shape"], interface["typestr"]) == ((1, 4, 2, 2), "<f4")
    assert interface["stream"] == 77
