"""Binding and addresses of TensorRT engines, with fakes that have no name the wheels lack."""

from __future__ import annotations

import contextlib
import gc
from types import SimpleNamespace

import pytest

from blockcache.runtime.bundles.manifest import FileEntry
from blockcache.runtime.devices.cuda_stream import Scratch
from blockcache.runtime.devices.tensor import Tensor
from blockcache.runtime.engines.tensorrt_library import Messages, TensorRT
from blockcache.runtime.engines.trt import RuntimeCache, TrtEngine, refit
from blockcache.runtime.errors import EngineError
from blockcache.runtime.plan import Dim, Segment, TensorSpec


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

    def update_device_memory_size_for_shapes(self):
        return 900  # less than the profile's

    def set_device_memory(self, pointer, size):
        self.memory = (pointer, size)

    def execute_async_v3(self, stream):
        self.runs.append(stream)
        return self.refuses != "run"

    def is_stream_capturable(self, stream):
        return self.refuses != "capture"


class FakeRuntimeCache:
    def __init__(self):
        self.content = b""

    def deserialize(self, content):
        self.content = bytes(content)
        return True

    def serialize(self):
        return self.content


class FakeRuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = cache = strategy = None

    def __init__(self, module):
        self.module = module

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        return self.module.recorded("IRuntimeCache", FakeRuntimeCache())

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True


class FakeEngine:
    """Two profiles: batch 1 to 8 at 16 x 16, batch 1 to 2 at 32 x 32."""

    num_optimization_profiles = 2

    def __init__(self, module, refuses=""):
        self.module, self.refuses, self.contexts, self.given = module, refuses, [], []

    def get_tensor_profile_shape(self, name, index):
        batch, size = ((8, 16), (2, 32))[index]
        return [(1, 4, size, size), (2, 4, size, size), (batch, 4, size, size)]

    def get_device_memory_size_for_profile_v2(self, index):
        return (1000, 5000)[index]

    def create_runtime_config(self):
        self.config = FakeRuntimeConfig(self.module)
        return self.module.recorded("IRuntimeConfig", self.config)

    def create_execution_context(self, given):
        self.given.append(given)
        self.contexts.append(FakeContext(self.refuses))
        return self.module.recorded("IExecutionContext", self.contexts[-1])


def image(name):
    return TensorSpec(
        name, "bfloat16", tuple(Dim.parse(d) for d in ("batch", 4, "height", "width"))
    )


SEGMENT = Segment("trunk_00", "trunk", "trunk_00.onnx", (image("sample"),), (image("out"),))


@pytest.fixture
def device():
    pointers = iter(range(1 << 20, 1 << 30, 1 << 20))
    scratch = Scratch(lambda count: SimpleNamespace(pointer=next(pointers)))
    stream = SimpleNamespace(handle=77, context=contextlib.nullcontext(), scratch=scratch)
    return SimpleNamespace(stream=stream, scratch=scratch)


def tensors(device, size=16, batch=2, base=256):
    owner = SimpleNamespace(stream=device.stream)
    shape = (batch, 4, size, size)
    return {
        "sample": Tensor(base, shape, "bfloat16", owner),
        "out": Tensor(2 * base, shape, "bfloat16", owner),
        "unrelated": Tensor(3 * base, shape, "bfloat16", owner),
    }


@pytest.fixture
def opened(tensorrt_module, tmp_path):
    """``opened(refuses="")``: (TrtEngine, FakeEngine) with the names of each library's wheel."""

    def make(refuses=""):
        fake = FakeEngine(tensorrt_module, refuses)
        library = TensorRT(
            tensorrt_module.name, tensorrt_module, SimpleNamespace(messages=Messages())
        )
        engine = tensorrt_module.recorded("ICudaEngine", fake)
        cache = RuntimeCache(tmp_path / "a.cache")
        return TrtEngine(SEGMENT, library, engine, None, cache), fake

    return make


def test_addresses_are_set_once_and_launching_only_launches(device, opened):
    engine, fake = opened()
    launch = engine.bind(tensors(device))
    (context,) = fake.contexts
    assert context.addresses == {"sample": 256, "out": 512}
    assert context.shapes == {"sample": (2, 4, 16, 16)}
    assert context.profile == 0
    for _ in range(3):
        launch()
    assert context.runs == [77, 77, 77]
    assert context.addresses == {"sample": 256, "out": 512}


def test_activation_memory_comes_from_outside(device, opened, tensorrt_module):
    engine, fake = opened()
    launch = engine.bind(tensors(device))
    managed = tensorrt_module.ExecutionContextAllocationStrategy.USER_MANAGED
    if tensorrt_module.name == "tensorrt":
        assert fake.given == [managed]
    else:  # a configuration holds it, and two more that matter
        assert fake.config.strategy == managed
        eager = tensorrt_module.DynamicShapesKernelSpecializationStrategy.EAGER
        assert fake.config.dynamic_shapes_kernel_specialization_strategy == eager
        assert fake.config.cache is not None
    assert fake.contexts[0].memory == (1 << 20, 1000)
    launch()


def test_buffers_in_turn_have_contexts_of_their_own(device, opened):
    engine, fake = opened()
    first, second = engine.bind(tensors(device)), engine.bind(tensors(device, base=4096))
    first()
    second()
    assert [c.addresses["sample"] for c in fake.contexts] == [256, 4096]


def test_contexts_share_the_largest_scratch(device, opened):
    engine, fake = opened()
    kept = [engine.bind(tensors(device, size=size)) for size in (16, 32, 16)]
    assert [c.profile for c in fake.contexts] == [0, 1, 0]
    assert {c.memory for c in fake.contexts} == {(2 << 20, 5000)}
    assert (device.scratch.bytes, device.scratch.generation) == (5000, 2)
    assert len(device.scratch.contexts) == len(kept)
    del kept
    gc.collect()
    assert len(device.scratch.contexts) == 0


def test_a_shape_outside_all_profiles_names_the_options(device, opened):
    engine, _ = opened()
    with pytest.raises(EngineError, match=r"\[9, 4, 16, 16\].*--max-batch"):
        engine.bind(tensors(device, batch=9))


@pytest.mark.parametrize("refuses", ["shape", "address"])
def test_what_the_library_refuses_names_the_segment(device, opened, refuses):
    engine, _ = opened(refuses)
    with pytest.raises(EngineError, match=r"'trunk_00'.*refuses the " + refuses):
        engine.bind(tensors(device))


def test_a_failed_launch_names_the_segment(device, opened):
    engine, _ = opened("run")
    with pytest.raises(EngineError, match="trunk_00"):
        engine.bind(tensors(device))()


def test_only_the_rtx_library_can_refuse_to_be_captured(device, opened, tensorrt_module):
    engine, _ = opened("capture")
    launch = engine.bind(tensors(device))
    assert launch.capturable()  # not run yet: in no graph
    launch()
    assert launch.capturable() is (tensorrt_module.name == "tensorrt")


def test_the_runtime_cache_is_kept_beside_the_engines(tmp_path, tensorrt_module_of):
    path, module = tmp_path / "runtime.cache", tensorrt_module_of("tensorrt_rtx")
    config = FakeRuntimeConfig(module)
    cache = RuntimeCache(path)
    cache.save()  # nothing attached: nothing to write
    cache.attach(config)
    config.cache._fake("serialize").content = b"kernels"
    cache.save()
    assert path.read_bytes() == b"kernels"
    later = FakeRuntimeConfig(module)
    RuntimeCache(path).attach(later)
    assert later.cache.serialize() == b"kernels"
    assert list(tmp_path.iterdir()) == [path]


# -- weights of another compile --------------------------------------------------------------------


class FakeParserRefitter:
    def __init__(self, accepts, seen):
        self.accepts, self.seen = accepts, seen

    def refit_from_file(self, path):
        self.seen.append(path)
        return self.accepts


class FakeRefitter:
    def __init__(self, seen):
        self.seen = seen

    def refit_cuda_engine(self):
        self.seen.append("refitted")
        return True


def refitted(module, weights, built_from, accepts=True):
    """Refit an engine of a bundle whose weights hash to "now"; what was done, and the log."""
    seen = []
    module.Refitter = lambda engine, logger: module.recorded("Refitter", FakeRefitter(seen))
    module.OnnxParserRefitter = lambda refitter, logger: module.recorded(
        "OnnxParserRefitter", FakeParserRefitter(accepts, seen)
    )
    bundle = SimpleNamespace(
        weights_of=lambda segment: FileEntry(1, "now"),
        segment_path=lambda segment: f"bundle/{segment.file}",
        folder="bundle",
    )
    entry = SimpleNamespace(weights_file_sha256=built_from)
    engines = SimpleNamespace(engines={"trunk_00": entry}, weights=weights, target="sm80")
    library = TensorRT(module.name, module, SimpleNamespace(messages=Messages()))
    done = refit(library, bundle, engines, SEGMENT, object(), [("E", "wrong shape")])
    assert done is bool(seen)
    return seen


def test_stripped_and_outdated_engines_are_refitted(tensorrt_module):
    path = "bundle/trunk_00.onnx"
    assert refitted(tensorrt_module, "stripped", "now") == [path, "refitted"]
    assert refitted(tensorrt_module, "refittable", "then") == [path, "refitted"]
    assert refitted(tensorrt_module, "refittable", "now") == []
    assert refitted(tensorrt_module, "included", "now") == []
    with pytest.raises(EngineError, match=r"'trunk_00'.*wrong shape.*blockcache build bundle"):
        refitted(tensorrt_module, "stripped", "now", accepts=False)
