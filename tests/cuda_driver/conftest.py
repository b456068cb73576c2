"""A GPU made of stand-ins: a CUDA driver, TensorRT, blockcache's CUDA kernels, all on the host.

The driver is ``driver.cpp``. TensorRT has the names of its wheels, and its engines run a segment in
ONNX Runtime, as a function that is put on the stream, at the addresses that were set. The kernels
are those of the host library. So latents are those of the CPU backend, bit for bit.

These tests have a process of their own, which ``tests/runtime/test_gpu_path.py`` starts: there the
driver is loaded in place of NVIDIA's.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import hashlib
import itertools
import json
import os
import shutil
import sys
from enum import IntEnum

import numpy as np
import pytest

LIBRARY = os.environ.get("BLOCKCACHE_TEST_DRIVER", "")
ILLEGAL = 0xAA  # what activation memory is filled with at every launch
KINDS = ("blocks", "streams", "events", "graphs", "executable graphs")


class StandIn:
    """The driver, and functions of this process that it runs."""

    def __init__(self):
        self.library = ctypes.CDLL(LIBRARY, ctypes.RTLD_GLOBAL)  # found by its name from here on
        self.library.standin_wrong.restype = ctypes.c_char_p
        self.library.standin_calls.restype = ctypes.c_long
        self.library.standin_delay.argtypes = ctypes.c_void_p, ctypes.c_double
        self.library.standin_host_works.argtypes = (ctypes.c_double,)
        self._functions, self._numbers, self.failures = {}, itertools.count(1), []
        self._entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._run)

    def put(self, stream, function):
        """Let ``function`` run on a stream, as a kernel would; the driver's code."""
        number = next(self._numbers)
        self._functions[number] = function
        return self.library.cuLaunchHostFunc(
            ctypes.c_void_p(stream), self._entry, ctypes.c_void_p(number)
        )

    def _run(self, number):
        try:
            self._functions[number]()
        except BaseException as error:  # nobody above could take it
            self.failures.append(repr(error))

    def delay(self, stream, ms):
        """A kernel that takes ``ms`` of the device's time."""
        return self.library.standin_delay(stream, ms)

    def host_works(self, ms):
        """The host is busy for so long, by its clock in the driver."""
        self.library.standin_host_works(ms)

    def have(self, devices=2, version=13000):
        """GPUs in the machine, and the CUDA version of its driver."""
        self.library.standin_have(devices, version)

    def capability(self, major, minor):
        """The compute capability of every GPU."""
        self.library.standin_capability(major, minor)

    def fail(self, function, code):
        """The next call of a function of the driver returns a code."""
        self.library.standin_fail(function.encode(), code)

    def calls(self, function):
        """How often a function was called in this test."""
        return self.library.standin_calls(function.encode())

    def alive(self):
        """What was made and not freed, by kind."""
        counts = (ctypes.c_int64 * len(KINDS))()
        self.library.standin_alive(counts)
        return {kind: count for kind, count in zip(KINDS, counts, strict=True) if count}

    def wrong(self):
        """What was done that must not be, since the last time."""
        return self.library.standin_wrong().decode()

    def end_test(self):
        """Forget what this test did."""
        self._functions.clear()
        self.failures.clear()
        self.library.standin_reset()


@pytest.fixture(scope="session")
def _loaded():
    gc.freeze()  # every test collects; what is imported by now is not to be looked through again
    return StandIn() if LIBRARY else None


@pytest.fixture(autouse=True)
def standin(_loaded, request):
    """The driver; after each test nothing may be alive, and nothing may have gone wrong.

    Without it a test that is marked ``gpu`` as well runs on a real one, and this is None.
    """
    if _loaded is None:
        from blockcache.runtime.devices.cuda_driver import device_count

        if request.node.get_closest_marker("gpu") is None or not device_count():
            pytest.skip("runs in a process of its own: tests/runtime/test_gpu_path.py")
        yield None
        return
    yield _loaded
    request.node.funcargs.clear()  # pytest keeps what fixtures have made
    gc.collect()
    alive, wrong, failures = _loaded.alive(), _loaded.wrong(), list(_loaded.failures)
    _loaded.end_test()
    assert (alive, wrong, failures) == ({}, "", [])


# -- kernels ---------------------------------------------------------------------------------------


class Kernels:
    """``bc_cuda_NAME(..., stream)`` puts ``bc_host_NAME(...)`` on the stream."""

    def __init__(self, standin, host):
        self._standin, self._host = standin, host
        self.bc_error_string = host.bc_error_string

    def bc_cuda_relative_change_workspace_bytes(self, samples, _elements):
        return 16 * samples

    def bc_cuda_relative_change(self, *arguments):
        *rest, workspace, size, stream = arguments
        assert workspace
        assert size == self.bc_cuda_relative_change_workspace_bytes(rest[5], rest[6])
        return self._put(stream, self._host.bc_host_relative_change, rest)

    def __getattr__(self, name):
        host = getattr(self._host, name.replace("bc_cuda_", "bc_host_"))
        return lambda *arguments: self._put(arguments[-1], host, arguments[:-1])

    def _put(self, stream, host, arguments):
        kept = [  # a launch copies its parameters
            type(a).from_buffer_copy(a) if isinstance(a, ctypes.Structure) else a for a in arguments
        ]

        def run():
            assert host(*kept) == 0

        return self._standin.put(stream, run)


@pytest.fixture(autouse=True)
def cuda_kernels(standin, monkeypatch):
    """Stands in for the CUDA library."""
    from blockcache import kernels

    if standin is None:
        return kernels.cuda_library()
    library = Kernels(standin, kernels.host_library())
    monkeypatch.setattr(kernels, "cuda_library", lambda: library)
    return library


# -- TensorRT --------------------------------------------------------------------------------------


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    """The base class of loggers."""

    Severity = Severity

    def __init__(self):
        pass


def fake_of(recorded):
    """The fake behind an object that is limited to its class's names."""
    return object.__getattribute__(recorded, "_recorded")[2]


class Library:
    """What a TensorRT module does; ``module`` is to be imported in its place."""

    def __init__(self, standin, module):
        self.standin, self.module, self.logger = standin, module, None
        self.slow_ms = 0.0  # that each engine takes of the device's time
        self.more_scratch = 0  # bytes that shapes need beyond the profile
        self.refuses = ""  # a function of contexts that fails
        self.rejects_caches = False
        module.ILogger, module.Runtime = ILogger, self._runtime
        module.Refitter = lambda engine, logger: module.recorded("Refitter", Refitter(engine))
        module.OnnxParserRefitter = lambda refitter, logger: module.recorded(
            "OnnxParserRefitter", ParserRefitter(refitter, self)
        )

    def _runtime(self, logger):
        self.logger = logger
        return self.module.recorded("Runtime", Runtime(self))

    def say(self, message, severity=Severity.ERROR):
        """Log."""
        self.logger.log(severity, message)

    def refuse(self, function):
        """Whether a function fails; it says so in the log."""
        if self.refuses == function:
            self.say(f"{function} was told to fail")
        return self.refuses == function


class Runtime:
    def __init__(self, library):
        self.library = library

    def deserialize_cuda_engine(self, plan):
        try:
            content = json.loads(plan)
        except ValueError:
            self.library.say("this is no plan")
            return None
        return self.library.module.recorded("ICudaEngine", Engine(self.library, content))


class Engine:
    """A segment in ONNX Runtime; a plan without weights has none until it is refitted."""

    def __init__(self, library, plan):
        self.library, self.plan, self.session = library, plan, None
        self.num_optimization_profiles = len(plan["profiles"])
        self.path = plan["onnx"] if plan["has_weights"] else ""
        if self.path:
            self.open()

    def open(self):
        from blockcache.runtime.engines.ort import OrtBackend

        self.session = OrtBackend(threads=1).open_session(None, self.path)

    def get_tensor_profile_shape(self, name, index):
        return [tuple(shape) for shape in self.plan["profiles"][index][name]]

    def get_device_memory_size_for_profile_v2(self, index):
        return self.plan["scratch"] * (index + 1)

    def create_runtime_config(self):
        return self.library.module.recorded("IRuntimeConfig", RuntimeConfig(self.library))

    def create_execution_context(self, given):
        context = ctypes.c_void_p()
        self.library.standin.library.cuCtxGetCurrent(ctypes.byref(context))
        if not context.value:
            self.library.say("no CUDA context is current")
        if not context.value or self.library.refuse("create_execution_context"):
            return None
        made = ExecutionContext(self, given)
        return self.library.module.recorded("IExecutionContext", made)


class RuntimeCache:
    def __init__(self, library):
        self.library, self.content = library, b""

    def deserialize(self, content):
        if self.library.rejects_caches:
            return False
        self.content = bytes(content)
        return True

    def serialize(self):
        return self.content


class RuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = cache = strategy = None

    def __init__(self, library):
        self.library = library

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        return self.library.module.recorded("IRuntimeCache", RuntimeCache(self.library))

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True


class ExecutionContext:
    """It keeps nothing alive: addresses are numbers, as in the real one."""

    def __init__(self, engine, given):
        self.engine, self.library = engine, engine.library
        self.cache = getattr(fake_of(given), "cache", None) if hasattr(given, "_recorded") else None
        self.profile, self.shapes, self.addresses, self.memory = 0, {}, {}, (0, 0)
        self.has_run = False

    def set_optimization_profile_async(self, index, stream):
        self.profile = index
        return self.library.standin.put(stream, lambda: None) == 0

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)
        return not self.library.refuse("set_input_shape")

    def set_tensor_address(self, name, pointer):
        self.addresses[name] = pointer
        return not self.library.refuse("set_tensor_address")

    def _needed(self):
        return self.engine.get_device_memory_size_for_profile_v2(self.profile)

    def update_device_memory_size_for_shapes(self):
        return self._needed() + self.library.more_scratch

    def set_device_memory(self, pointer, size):
        if self.library.refuse("set_device_memory"):
            return
        if size < self._needed() + self.library.more_scratch:
            self.library.say(f"{size} bytes are too few for activations")
            return
        self.memory = pointer, size

    def is_stream_capturable(self, stream):
        return self.library.refuse("is_stream_capturable") is False

    def execute_async_v3(self, stream):
        if self.library.refuse("execute_async_v3"):
            return False
        if not self.memory[0]:
            self.library.say("no activation memory was set")
            return False
        if not self.has_run and not self._compile():
            return False
        self.has_run = True
        done = self.library.standin.put(stream, self._launch()) == 0
        if done and self.library.slow_ms:
            self.library.standin.delay(stream, self.library.slow_ms)
        if not done:
            self.library.say("the launch failed")
        return done

    def _compile(self):
        """Kernels of the first run take device memory, which a capture cannot have."""
        driver, pointer = self.library.standin.library, ctypes.c_void_p()
        if driver.cuMemAlloc(ctypes.byref(pointer), ctypes.c_size_t(64)):
            self.library.say("kernels cannot be loaded in a capture")
            return False
        if self.cache is not None:
            fake_of(self.cache).content += b"kernel "
        return driver.cuMemFree(pointer) == 0

    def _launch(self):
        """What runs on the device, with the addresses of now: what a graph holds."""
        (scratch, size), addresses, session = self.memory, dict(self.addresses), self.engine.session
        inputs = [(i.name, DTYPES[i.type], self.shapes[i.name]) for i in session.get_inputs()]
        outputs = [output.name for output in session.get_outputs()]

        def run():
            ctypes.memset(scratch, ILLEGAL, size)
            made = session.run(outputs, {n: seen(addresses[n], d, s) for n, d, s in inputs})
            for name, values in zip(outputs, made, strict=True):
                ctypes.memmove(addresses[name], values.ctypes.data, values.nbytes)

        return run


DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


def seen(address, dtype, shape):
    """Memory of the device as an array."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = (ctypes.c_uint8 * count).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape)


class Refitter:
    def __init__(self, engine):
        self.engine = fake_of(engine)

    def refit_cuda_engine(self):
        self.engine.open()
        return True


class ParserRefitter:
    def __init__(self, refitter, library):
        self.engine, self.library = fake_of(refitter).engine, library

    def refit_from_file(self, path):
        if self.library.refuse("refit_from_file"):
            return False
        self.engine.path = path
        return True


@pytest.fixture
def tensorrt(standin, tensorrt_module_of, monkeypatch):
    """``tensorrt(title)`` puts a stand-in where a library of that title would be imported."""
    from blockcache.runtime.engines.tensorrt_library import LIBRARIES, load_library

    for name in LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)  # not installed

    def install(title="tensorrt_rtx"):
        library = Library(standin, tensorrt_module_of(title))
        monkeypatch.setitem(sys.modules, library.module.name, library.module)
        load_library.cache_clear()
        return library

    yield install
    load_library.cache_clear()


# -- PyTorch ---------------------------------------------------------------------------------------


@pytest.fixture
def place_of(standin):
    """``place_of(stream=None)``: where PyTorch works, the stand-in's host or a real GPU."""
    torch = pytest.importorskip("torch")
    from blockcache.runtime.devices.cuda import CudaDevice
    from blockcache.runtime.devices.tensor import NUMPY_DTYPES
    from blockcache.tools.bench.torch_backend import CudaPlace, from_bits

    if standin is None:
        return CudaPlace

    class StandInPlace:
        """PyTorch on the CPU, at the addresses of the stand-in and late, as its stream is."""

        def __init__(self, stream=None):
            self.device, self.torch_device = CudaDevice(stream), torch.device("cpu")

        def view(self, tensor):
            values = seen(tensor.pointer, NUMPY_DTYPES[tensor.dtype], tensor.shape)
            return from_bits(torch.from_numpy(values), tensor.dtype)

        def run(self, work):
            codes = standin.put(self.device.stream, work), standin.delay(self.device.stream, 1.0)
            if any(codes):
                raise RuntimeError(f"the stand-in refused a launch: {codes}")

    return StandInPlace


# -- bundles ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def bundles(request):
    """Folders of compiled bundles by how many outputs an alignment combines."""
    given = os.environ.get("BLOCKCACHE_TEST_BUNDLES")
    if given:
        return json.loads(given)
    compiled = request.getfixturevalue("compiled")
    return {str(outputs): str(compiled("sd", outputs)[1].folder) for outputs in (1, 2)}


@pytest.fixture
def bundle_of(bundles, tmp_path):
    """``bundle_of(outputs)`` or of a pipeline's kind: a bundle of its own."""
    from blockcache.runtime.bundles.bundle import Bundle

    def copy(outputs=1):
        folder = tmp_path / f"bundle-{outputs}"
        return Bundle.open(shutil.copytree(bundles[str(outputs)], folder), verify=False)

    return copy


@pytest.fixture
def engines_for():
    """``engines_for(bundle, library, ...)`` writes what a build would have written."""
    return write_fake_engines


def write_fake_engines(
    bundle, library, target="sm80", weights="included", most=10, size=16, chunks=1
):
    from blockcache.runtime.engines.files import (
        EngineEntry,
        EngineSet,
        ShapeProfile,
        engines_folder,
        write_engines,
    )

    profiles = tuple(
        ShapeProfile(
            *(dataclasses.replace(each, batch=batch) for batch in (1, 2)),
            dataclasses.replace(each, batch=most, tokens=chunks * each.tokens),
        )
        for each in (
            dataclasses.replace(bundle.model.sizes, height=side, width=side)
            for side in (size, 2 * size)
        )
    )
    folder, entries = engines_folder(bundle, target), {}
    folder.mkdir(parents=True, exist_ok=True)
    for number, segment in enumerate((*bundle.segments, *bundle.manifest.parts)):
        plan = {
            "onnx": str(bundle.segment_path(segment)),
            "has_weights": weights != "stripped",
            "scratch": 1024 + 256 * number,
            "profiles": [
                {spec.name: [spec.shape(s) for s in shapes(segment, p)] for spec in segment.inputs}
                for p in profiles
            ],
        }
        content = json.dumps(plan).encode()
        (folder / f"{segment.name}.plan").write_bytes(content)
        entries[segment.name] = EngineEntry(
            file=f"{segment.name}.plan",
            key=segment.name,
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            onnx_sha256=bundle.manifest.files[segment.file].sha256,
            weights_file_sha256=bundle.weights_of(segment).sha256,
            seconds=0.0,
            formats={},
            kernels=1,
            scratch_bytes=plan["scratch"],
        )
    engines = EngineSet(
        target=target,
        library=library.module.name,
        version=library.module.__version__,
        capabilities=("8.0",),
        precision=bundle.model.precision,
        weights=weights,
        weights_sha256=bundle.weights.sha256,
        profiles=profiles,
        engines=entries,
    )
    write_engines(bundle, engines)
    return folder


def shapes(segment, profile):
    """Least, usual and greatest sizes; parts run picture by picture, and tiles are smaller."""
    least = profile.minimum
    if segment.role in ("text_encoder", "decoder", "encoder"):
        least = dataclasses.replace(least, batch=1, height=4, width=4)
    return least, profile.optimum, profile.maximum


# -- sessions --------------------------------------------------------------------------------------


def reusing(preset, seed=1):
    """The preset with about half of its recomputes left out, and an alignment of random numbers."""
    rng = np.random.default_rng(seed)
    recompute = rng.random(preset.schedule.recompute.shape) < 0.5
    recompute[0] = True
    tables = tuple(
        np.where(
            recompute[:, k, None, None],
            table,
            table + 0.1 * rng.standard_normal(table.shape, np.float32),
        )
        for k, table in enumerate(preset.alignment.tables)
    )
    return dataclasses.replace(
        preset,
        schedule=dataclasses.replace(preset.schedule, recompute=recompute),
        alignment=dataclasses.replace(preset.alignment, tables=tables),
    )


class Pair:
    """A session on the stand-in GPU and one on the CPU, of one preset."""

    def __init__(self, gpu, cpu, library):
        self.gpu, self.cpu, self.bundle, self.library = gpu, cpu, cpu.bundle, library
        self._rng = np.random.default_rng(0)

    def request(self, images=1, **options):
        """Arguments of ``denoise``, with random prompts."""
        model = self.cpu.bundle.model
        sizes = dataclasses.replace(model.sizes, batch=images)
        (prompt,) = model.conditions
        embeds, negative = (
            self._rng.standard_normal(prompt.shape(sizes), np.float32) for _ in range(2)
        )
        noise = self.cpu.noise(list(range(images)))
        prompts = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
        return {"noise": noise, **prompts, **options}

    def same(self, images=1, **options):
        """Both denoise one request, and agree in every bit; the GPU's result."""
        return self.same_for(self.request(images, **options))

    def same_for(self, request):
        """The same with a request that was made before."""
        ours, theirs = self.gpu.denoise(**request), self.cpu.denoise(**request)
        np.testing.assert_array_equal(ours.latents, theirs.latents)
        np.testing.assert_array_equal(ours.record.ran, theirs.record.ran)
        return ours


@pytest.fixture
def pair_of(tensorrt, bundle_of, engines_for):
    """``pair_of(...)``: a Pair on a bundle of its own, with engines of a TensorRT stand-in."""
    from blockcache.runtime import Session
    from blockcache.runtime.engines.ort import OrtBackend
    from blockcache.runtime.engines.trt import TrtBackend

    def make(
        preset="ddim-4",
        title="tensorrt_rtx",
        outputs=1,
        bundle=None,
        drift=None,
        seed=1,
        solver=None,
        **options,
    ):
        library = None
        if bundle is None:
            library, bundle = tensorrt(title), bundle_of(outputs)
            engines_for(bundle, library)
        chosen = reusing(bundle.preset(preset), seed)
        if solver is not None:
            chosen = dataclasses.replace(chosen, solver=solver.to_json())
        gpu = Session(bundle, chosen, TrtBackend(**{"graphs": "check", **options}), drift)
        return Pair(gpu, Session(bundle, chosen, OrtBackend(threads=1), drift), library)

    return make
