"""Engines of TensorRT and TensorRT-RTX, with their tensors' addresses set once.

Engines are opened once a process and shared; what belongs to a session are execution contexts.
These are small: their activation memory is one allocation that all contexts of a device share,
since they run one after the other on its stream. A segment that touches a block's outputs in turn
has one context for each combination of buffers.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.devices.cuda import CudaDevice
from blockcache.runtime.devices.cuda_driver import capture_lock, driver_version
from blockcache.runtime.devices.cuda_stream import CudaStream
from blockcache.runtime.devices.tensor import Tensor
from blockcache.runtime.engines.engine import Launch
from blockcache.runtime.engines.files import (
    EngineSet,
    built_targets,
    check_engines,
    engines_folder,
    read_engines,
    read_plan,
)
from blockcache.runtime.engines.tensorrt_library import TensorRT, load_library
from blockcache.runtime.errors import ConfigError, EngineError, EnginesMissingError
from blockcache.runtime.files import write_bytes
from blockcache.runtime.plan import Segment


def fitting_target(bundle: Bundle, library: TensorRT, capability: str) -> str:
    """The first built target for this library and GPU.

    Raises:
        EnginesMissingError: there is none; the message says what was built and how to build.
    """
    found = {name: read_engines(bundle, name) for name in built_targets(bundle)}
    for name, engines in found.items():
        if engines.library == library.name and capability in engines.capabilities:
            return name
    built = {name: f"{e.library} for {'+'.join(e.capabilities)}" for name, e in found.items()}
    raise EnginesMissingError(
        f"Expected {library.name} engines for compute capability {capability} in "
        f"{bundle.folder}, found {built or 'none'}. Build them: blockcache build {bundle.folder} "
        f"--target sm{capability.replace('.', '')}"
    )


class TrtBackend:
    """TensorRT on a CUDA device."""

    loads_at_once = 1
    """One at a time: TensorRT lets threads deserialise side by side, but does not promise that they
    may refit. Also, a process has one log, so an error could quote another segment's messages."""

    def __init__(
        self,
        *,
        target: str = "",
        library: str = "auto",
        stream: Any = None,
        device: int | None = None,
        graphs: str = "auto",
        verify: bool = True,
    ) -> None:
        """Choose a library and a device.

        Args:
            target: a folder of the bundle's engines; default the first that fits.
            library: tensorrt_rtx, tensorrt or auto.
            stream: the caller's CUDA stream (a number or an object with ``__cuda_stream__``).
            device: index of the CUDA device; default the stream's, else the current one.
            graphs: auto, check (compare addresses before each replay) or off.
            verify: check the sha256 of every plan.

        Raises:
            MissingExtraError: TensorRT or cuda-bindings is not installed.
            EngineError: there is no GPU, or the library runs neither on it nor with its driver.
        """
        self.device = CudaDevice(stream, device)
        self.library = load_library(library)
        problem = self.library.problem(self.device.capability, driver_version())
        if problem:
            raise EngineError(problem)
        self.graphs = graphs
        self._target, self._verify = target, verify
        self._sets: dict[Path, EngineSet] = {}
        self._caches: dict[Path, RuntimeCache] = {}

    @property
    def engine(self) -> str:
        """Library and version."""
        return f"{self.library.name} {self.library.version}"

    @property
    def name(self) -> str:
        """Equal names load interchangeable engines."""
        return f"trt-{self.library.name}-{self._target}-cuda:{self.device.index}"

    def load(self, bundle: Bundle, segment: Segment) -> TrtEngine:
        """Open a segment's engine.

        Raises:
            BundleError: engines that are missing, altered, stale, or for another GPU or library.
            EngineError: TensorRT refuses the plan.
        """
        return self._load(bundle, bundle, segment)

    def load_refitted(self, plans: Bundle, bundle: Bundle, segment: Segment) -> TrtEngine:
        """Open a segment's engine of ``plans`` anew, and give it the weights of ``bundle``.

        Raises:
            ConfigError: the engines were built with their weights for good.
            BundleError, EngineError: as ``load``.
        """
        engines = self._engines(plans)
        if engines.weights == "included":
            raise ConfigError(
                f"Expected engines that take other weights, those for {engines.target!r} in "
                f"{plans.folder} were built with theirs for good. Build again: blockcache build "
                f"{plans.folder} --target {engines.target} --weights refittable"
            )
        return self._load(plans, bundle, segment)

    def _load(self, plans: Bundle, bundle: Bundle, segment: Segment) -> TrtEngine:
        """The engine of ``plans`` with the weights of ``bundle``."""
        engines = self._engines(plans)
        own = next(s for s in (*plans.segments, *plans.manifest.parts) if s.name == segment.name)
        plan = read_plan(plans, engines, own, verify=self._verify)
        folder = engines_folder(plans, engines.target)
        with self.device.context, capture_lock, self.library.log() as log:
            runtime = self.library.module.Runtime(self.library.logger)
            engine = runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise EngineError(
                    f"Expected {self.library.name} {self.library.version} to open the engine "
                    f"of segment {segment.name!r} in {folder}, it says: "
                    f"{self.library.quoted(log)}. Build again for this GPU: blockcache build "
                    f"{bundle.folder} --target sm{self.device.capability.replace('.', '')}"
                )
            refit(self.library, bundle, engines, segment, engine, log)
        if folder not in self._caches:
            driver = ".".join(map(str, driver_version()))
            made_by = f"{self.device.capability}-{self.library.version}-cuda{driver}"
            self._caches[folder] = RuntimeCache(folder / f"runtime-{made_by}.cache")
        return TrtEngine(segment, self.library, engine, runtime, self._caches[folder])

    def settled(self) -> None:
        """Keep what was compiled at first run for the next process."""
        for cache in self._caches.values():
            cache.save()

    def _engines(self, bundle: Bundle) -> EngineSet:
        if bundle.folder not in self._sets:
            library, capability = self.library, self.device.capability
            target = self._target or fitting_target(bundle, library, capability)
            engines = read_engines(bundle, target)
            check_engines(bundle, engines, library.name, library.version, capability)
            self._sets[bundle.folder] = engines
        return self._sets[bundle.folder]


def refit(
    library: TensorRT,
    bundle: Bundle,
    engines: EngineSet,
    segment: Segment,
    engine: Any,
    log: list[tuple[str, str]],
) -> bool:
    """Give the bundle's weights to a plan that has none, or an earlier compile's; True if done.

    Raises:
        EngineError: the library refuses the weights.
    """
    current = engines.engines[segment.name].weights_file_sha256 == bundle.weights_of(segment).sha256
    if engines.weights == "included" or (engines.weights == "refittable" and current):
        return False
    refitter = library.module.Refitter(engine, library.logger)
    parser = library.module.OnnxParserRefitter(refitter, library.logger)
    path = str(bundle.segment_path(segment))
    if not parser.refit_from_file(path) or not refitter.refit_cuda_engine():
        raise EngineError(
            f"Expected the weights of {path} to fit the engine of segment {segment.name!r}, "
            f"{library.name} says: {library.quoted(log)}. Build again: blockcache build "
            f"{bundle.folder} --target {engines.target}"
        )
    return True


class RuntimeCache:
    """Kernels that TensorRT-RTX compiled at first run, kept beside the engines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cache: Any = None
        self._lock = threading.Lock()
        self._bytes = 0

    def attach(self, config: Any) -> None:
        """Let contexts made with ``config`` read and fill the cache."""
        with self._lock:
            if self._cache is None:
                self._cache = config.create_runtime_cache()
                if self._path.is_file():
                    content = self._path.read_bytes()
                    accepted = self._cache.deserialize(content)  # else the cache is empty
                    self._bytes = len(content) if accepted else 0  # a rejected file is replaced
            config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the cache if it grew; a bundle that cannot be written to goes without."""
        with self._lock:
            if self._cache is None:
                return
            content = bytes(memoryview(self._cache.serialize()))
            if len(content) <= self._bytes:
                return
            try:
                write_bytes(self._path, content)
            except OSError:
                return
            self._bytes = len(content)


class TrtEngine:
    """One opened engine."""

    def __init__(
        self, segment: Segment, library: TensorRT, engine: Any, runtime: Any, cache: RuntimeCache
    ) -> None:
        self._segment, self._library, self._engine = segment, library, engine
        self._runtime = runtime  # the engine needs it alive
        self._cache = cache

    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        """A context with every address set; the tensors' memory says on which stream."""
        specs = (*self._segment.inputs, *self._segment.outputs)
        bound = {spec.name: tensors[spec.name] for spec in specs}
        stream: CudaStream = next(iter(bound.values())).owner.stream
        profile = self._profile(bound)
        with stream.context, capture_lock:
            context = self._bound_context(bound, profile, stream.handle)
            launch = BoundContext(self._segment.name, self._library, context, stream.handle, bound)
            size = self._engine.get_device_memory_size_for_profile_v2(profile)
            stream.scratch.use(max(size, context.update_device_memory_size_for_shapes()), launch)
        return launch

    def _bound_context(self, bound: Mapping[str, Tensor], profile: int, stream: int) -> Any:
        """A context with every shape and address set."""
        with self._library.log() as log:
            context = self._context()
            self._require(context is not None, "an execution context", log)
            done = context.set_optimization_profile_async(profile, stream)
            self._require(done, f"profile {profile}", log)
            for spec in self._segment.inputs:
                if not context.set_input_shape(spec.name, bound[spec.name].shape):
                    self._require(False, f"the shape of {spec.name!r}", log)
            for name, tensor in bound.items():
                self._require(
                    context.set_tensor_address(name, tensor.pointer),
                    f"the address of {name!r}",
                    log,
                )
        return context

    def _profile(self, tensors: Mapping[str, Tensor]) -> int:
        """The first profile that holds the shapes of all inputs."""
        for index in range(self._engine.num_optimization_profiles):
            if all(self._holds(index, s.name, tensors[s.name].shape) for s in self._segment.inputs):
                return index
        first = self._segment.inputs[0].name
        extents = [
            self._engine.get_tensor_profile_shape(first, index)
            for index in range(self._engine.num_optimization_profiles)
        ]
        raise EngineError(
            f"Segment {self._segment.name!r}: expected {first!r} within "
            f"{[(list(low), list(high)) for low, _, high in extents]}, got "
            f"{list(tensors[first].shape)}. Build engines for that size: blockcache build with "
            f"--max-batch, or --resolution for another size of image."
        )

    def _holds(self, profile: int, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape(name, profile)
        return all(a <= n <= b for a, n, b in zip(tuple(low), shape, tuple(high), strict=True))

    def _context(self) -> Any:
        """A context whose activation memory is given from outside."""
        module = self._library.module
        strategy = module.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._library.is_rtx:
            return self._engine.create_execution_context(strategy)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # The default compiles kernels for a new shape in the background and runs slower ones until
        # then: a graph captured meanwhile would hold those for good.
        config.dynamic_shapes_kernel_specialization_strategy = (
            module.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        self._cache.attach(config)
        return self._engine.create_execution_context(config)

    def _require(self, done: Any, what: str, log: list[tuple[str, str]]) -> None:
        if not done:
            raise EngineError(
                f"Segment {self._segment.name!r}: {self._library.name} refuses {what}: "
                f"{self._library.quoted(log)}."
            )


class BoundContext:
    """An execution context whose addresses are set: calling it launches the segment."""

    def __init__(
        self,
        name: str,
        library: TensorRT,
        context: Any,
        stream: int,
        tensors: Mapping[str, Tensor],
    ) -> None:
        self.name, self._library = name, library
        self._context, self._execute, self._stream = context, context.execute_async_v3, stream
        self._tensors = tensors  # keeps their memory alive
        self._ran = False

    def __call__(self) -> None:
        """Launch on the stream the context was bound to."""
        self._ran = True
        if not self._execute(self._stream):
            raise EngineError(
                f"{self._library.name} failed in segment {self.name!r}: {self._library.quoted()}."
            )

    def set_memory(self, pointer: int, count: int) -> None:
        """Where the activations go; EngineError where the library does not take it."""
        with self._library.log() as log:
            self._context.set_device_memory(pointer, count)  # returns nothing
        if any(letter in "EF" for letter, _ in log):
            raise EngineError(
                f"Segment {self.name!r}: {self._library.name} refuses {count} bytes of activation "
                f"memory: {self._library.quoted(log)}."
            )

    def capturable(self) -> bool:
        """Whether a CUDA graph can hold the launch; only TensorRT-RTX can say no.

        A context that has not run is in no graph, and may still have its kernels to compile.
        """
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or not self._ran or bool(ask(self._stream))
