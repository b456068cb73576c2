"""One segment to one engine: ONNX parser, strongly typed network, profiles, formats, plan.

The only place that drives a TensorRT builder. What differs between the libraries and their versions
is asked of ``TensorRT`` (runtime/engines/tensorrt_library.py).
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from filelock import FileLock

from blockcache.export.engines.bfloat16_resize import with_float32_resize
from blockcache.export.engines.log import Layer, inspected_layers, logged_layers, logged_scratch
from blockcache.export.engines.targets import ANY, CURRENT
from blockcache.runtime.engines.files import ShapeProfile
from blockcache.runtime.engines.tensorrt_library import TensorRT, load_library
from blockcache.runtime.errors import EngineError, ExportError
from blockcache.runtime.files import write_bytes
from blockcache.runtime.plan import Segment, TensorSpec

LINEAR, HWC8 = "linear", "hwc8"
_HALF = ("bfloat16", "float16")
_LINEAR_NAMES = ("sample", "model_output")  # read and written by the solver kernel, in NCHW


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that one engine is made from."""

    segment: Segment
    onnx: Path
    library: str
    capabilities: tuple[str, ...]
    profiles: tuple[ShapeProfile, ...]
    flags: tuple[str, ...]  # builder flags by name
    level: int  # builder optimisation level, 0..5
    threads: int


@dataclass(frozen=True)
class BuiltEngine:
    """A plan on disk and what the builder said about it."""

    seconds: float
    formats: dict[str, str]  # boundary tensor -> "linear" or "hwc8"
    layers: tuple[Layer, ...]
    scratch_bytes: int
    peak_rss_bytes: int  # most memory that the building process held so far


def boundary_format(spec: TensorSpec) -> str:
    """The memory layout of a tensor between engines.

    Engines compute images channels-last; a linear boundary costs each side a transpose. With
    channels in multiples of 8 the layout "hwc8" has no padding: it is NHWC, of the same size.
    """
    image = len(spec.dims) == 4 and bool(spec.dims[0].axes)
    channels = spec.dims[1] if image else None
    if spec.name in _LINEAR_NAMES or spec.dtype not in _HALF or channels is None or channels.axes:
        return LINEAR
    return HWC8 if channels.coefficient % 8 == 0 else LINEAR


def input_shape(spec: TensorSpec, profiles: Sequence[ShapeProfile]) -> tuple[int, ...]:
    """The network input's shape: -1 where the profiles leave a dimension open."""
    shapes = {spec.shape(sizes) for p in profiles for sizes in (p.minimum, p.optimum, p.maximum)}
    columns = zip(*shapes, strict=True)
    return tuple(column[0] if len(set(column)) == 1 else -1 for column in columns)


def build_engine(recipe: Recipe, target: Path) -> BuiltEngine:
    """Build a segment's engine into ``target``, which is written whole or not at all.

    Raises:
        ExportError: the parser does not understand a node; the message names it.
        EngineError: the builder failed.
    """
    library = load_library(recipe.library)
    begin = time.perf_counter()
    with library.log() as log:
        builder = library.module.Builder(library.logger)
        builder.max_threads = recipe.threads
        network = builder.create_network(library.network_flags)
        parser = _parse(library, network, recipe, log)
        formats = _set_inputs_and_formats(library, network, recipe)
        config = _configure(library, builder, network, recipe)
        cache = _load_timing_cache(library, config, target.parent)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise _build_error(library, recipe, library.quoted(log))
        _store_timing_cache(cache, config)
        write_bytes(target, memoryview(plan))
        layers = logged_layers([message for _, message in log])
        if not layers and not library.is_rtx:
            layers = inspected_layers(library, plan)
        scratch = logged_scratch([message for _, message in log])
        del parser, config, network, builder, plan
    seconds = time.perf_counter() - begin
    return BuiltEngine(seconds, formats, tuple(layers), scratch, _peak_rss_bytes())


def _parse(library: TensorRT, network: Any, recipe: Recipe, log: list[tuple[str, str]]) -> Any:
    parser = library.module.OnnxParser(network, library.logger)
    if library.resizes_bfloat16:
        parsed = parser.parse_from_file(str(recipe.onnx))
    else:  # the path tells the parser where the weights lie
        parsed = parser.parse(with_float32_resize(recipe.onnx), str(recipe.onnx))
    if parsed:
        return parser
    problems = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        problems.append(f"{error.node_operator()} node {error.node_name()!r}: {error.desc()}")
    raise ExportError(
        f"Expected segment {recipe.segment.name!r} ({recipe.onnx.name}) to parse, {library.name} "
        f"{library.version} refuses {'; '.join(problems[:3]) or library.quoted(log)}. Try a newer "
        f"{library.name}, another precision, or compile with --no-hoist; "
        f"'polygraphy inspect capability {recipe.onnx}' shows what is supported."
    )


def _set_inputs_and_formats(library: TensorRT, network: Any, recipe: Recipe) -> dict[str, str]:
    """Fix the dimensions that no profile varies, and set the layouts of boundary tensors."""
    specs = {s.name: s for s in (*recipe.segment.inputs, *recipe.segment.outputs)}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        tensor.shape = input_shape(specs[tensor.name], recipe.profiles)
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    formats = {}
    for tensor in (*inputs, *outputs):
        formats[tensor.name] = boundary_format(specs[tensor.name])
        layout = library.module.TensorFormat
        chosen = layout.HWC8 if formats[tensor.name] == HWC8 else layout.LINEAR
        tensor.allowed_formats = 1 << int(chosen)
    return formats


def _configure(library: TensorRT, builder: Any, network: Any, recipe: Recipe) -> Any:
    trt = library.module
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = recipe.level
    for flag in recipe.flags:
        config.set_flag(library.flag(flag))
    if library.capabilities and recipe.capabilities != (ANY,):
        config.num_compute_capabilities = len(recipe.capabilities)
        for index, name in enumerate(recipe.capabilities):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, name), index):
                device = " (no device?)" if name == CURRENT else ""
                raise EngineError(f"{library.name} {library.version} refuses {name}{device}.")
    specs = {spec.name: spec for spec in recipe.segment.inputs}
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    if not any(-1 in tuple(tensor.shape) for tensor in inputs):
        return config
    for extent in recipe.profiles:
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            shape = specs[tensor.name].shape
            if -1 in tuple(tensor.shape):
                sizes = (extent.minimum, extent.optimum, extent.maximum)
                profile.set_shape(tensor.name, *(shape(s) for s in sizes))
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(
                f"{library.name} refuses the profile ({extent}) of {recipe.segment.name!r}."
            )
    return config


def _load_timing_cache(library: TensorRT, config: Any, folder: Path) -> Path | None:
    """Give the builder the timings of earlier builds; None where the library keeps none."""
    if not library.has_timing_cache:
        return None
    path = folder / f"timing-{library.version}.cache"
    content = path.read_bytes() if path.is_file() else b""
    config.set_timing_cache(config.create_timing_cache(content), False)
    return path


def _store_timing_cache(path: Path | None, config: Any) -> None:
    """Merge this build's timings into the file, which other builds may have changed since."""
    if path is None:
        return
    with FileLock(f"{path}.lock"):
        timings = config.get_timing_cache()
        if path.is_file():
            timings.combine(config.create_timing_cache(path.read_bytes()), False)
        write_bytes(path, memoryview(timings.serialize()))


def _peak_rss_bytes() -> int:
    """Of this program alone: getrusage would count what the parent held when it started us."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) * 1024 if found else 0


def _build_error(library: TensorRT, recipe: Recipe, said: str) -> EngineError:
    """What the builder said about a segment, which nodes it spoke of, and what to try."""
    driver = "REFIT" in recipe.flags or "STRIP_PLAN" in recipe.flags
    hint = (
        "Refittable and stripped engines need a CUDA driver on the building machine: build there, "
        "or with weights='included'."
        if driver
        else "Try another precision or --level, or static shapes."
    )
    nodes = ", ".join(named_nodes(recipe.onnx, said)) or "not named"
    return EngineError(
        f"Expected an engine of segment {recipe.segment.name!r} ({recipe.onnx.name}) from "
        f"{library.name} {library.version} for {'+'.join(recipe.capabilities)}, the builder said: "
        f"{said}. ONNX nodes: {nodes}. {hint}"
    )


def named_nodes(onnx: Path, text: str) -> list[str]:
    """The nodes of a graph whose names occur in ``text``, as "Conv 'node_conv2d_3'"."""
    words = {word.strip(".:") for word in re.findall(r"[\w./:-]+", text.replace("...", " "))}
    return [f"{node.op_type} {node.name!r}" for node in ir.load(onnx).graph if node.name in words]
