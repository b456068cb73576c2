"""What engines are compared with: float32, and the plain half-precision error as the tolerance.

Both are made from a segment's own graph and run on any CPU. The *reference* is the graph with every
tensor in float32; its weights are the half-precision ones, exactly. The *rounded* graph does the
same arithmetic but rounds the result of every operation to the bundle's precision: what a plain
half-precision evaluation of this segment loses. (Engines of float32 bundles multiply in TF32, which
has the mantissa of float16: their rounded graph rounds to that.) An engine may lose at most twice
as much (``FACTOR``); the tolerance is measured with the same inputs, never guessed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.plan import Segment, Sizes, TensorSpec

FACTOR = 2.0
"""An engine's error over the plain half-precision error: the most that passes."""

_HALF = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class Comparison:
    """One segment, or the whole loop (named "loop"), against the reference."""

    name: str
    error: float  # of the engine: relative L2, the largest over the outputs
    plain_error: float  # of the rounded graph, same inputs

    @property
    def ratio(self) -> float:
        """Error over the plain half-precision error."""
        if self.plain_error:
            return self.error / self.plain_error
        return 0.0 if self.error == 0 else float("inf")

    @property
    def passed(self) -> bool:
        """Whether the engine loses no more than ``FACTOR`` times what rounding loses."""
        return self.ratio <= FACTOR


def relative_error(values: np.ndarray, reference: np.ndarray) -> float:
    """Relative L2 distance, in float64; infinity where a value is not finite."""
    if not np.isfinite(values).all():
        return float("inf")
    difference = np.linalg.norm((values.astype(np.float64) - reference).ravel())
    return float(difference / max(np.linalg.norm(reference.astype(np.float64).ravel()), 1e-30))


def widened_bundle(bundle: Bundle) -> Bundle:
    """The bundle as float32, to run ``widened_graph`` with; nothing on disk changes."""
    segments = tuple(
        dataclasses.replace(
            segment,
            inputs=tuple(_widened(spec) for spec in segment.inputs),
            outputs=tuple(_widened(spec) for spec in segment.outputs),
        )
        for segment in bundle.segments
    )
    conditions = tuple(_widened(spec) for spec in bundle.model.conditions)
    model = dataclasses.replace(bundle.model, precision="float32", conditions=conditions)
    manifest = dataclasses.replace(bundle.manifest, model=model, segments=segments, pipeline=None)
    return dataclasses.replace(bundle, manifest=manifest)


def _widened(spec: TensorSpec) -> TensorSpec:
    half = spec.dtype in ("bfloat16", "float16")
    return dataclasses.replace(spec, dtype="float32") if half else spec


def widened_graph(onnx: Path, *, rounded: bool) -> bytes:
    """A segment's graph in float32, weights inside; ``rounded`` rounds every result to half."""
    model = ir.load(onnx)
    half, given = _half_values(model.graph)
    for value in (*model.graph.initializers.values(), *model.graph.inputs, *half):
        _widen(value)
    for node in list(model.graph):
        if node.op_type == "Cast" and ir.DataType(node.attributes["to"].as_int()) in _HALF:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT.value)
        for value in node.outputs if rounded else ():
            if value in half:
                _round_value(model.graph, node, value, half[value])
    for value, dtype in given.items() if rounded else ():
        _round_value(model.graph, None, value, dtype)
    return bytes(ir.to_proto(model).SerializeToString())


_Dtypes = dict[ir.Value, ir.DataType]


def _half_values(graph: ir.Graph) -> tuple[_Dtypes, _Dtypes]:
    """Results, and inputs, that are rounded, with the type to round to."""

    def rounded(values: Iterable[ir.Value], to: Mapping[ir.DataType, ir.DataType]) -> _Dtypes:
        return {v: to[v.dtype] for v in values if v.dtype is not None and v.dtype in to}

    results = [value for node in graph for value in node.outputs]
    itself = {dtype: dtype for dtype in _HALF}
    if any(v.dtype in _HALF for v in (*results, *graph.inputs, *graph.initializers.values())):
        return rounded(results, itself), rounded(graph.inputs, itself)
    tf32 = {ir.DataType.FLOAT: ir.DataType.FLOAT16}
    return rounded(results, tf32), rounded(graph.inputs, tf32)


def _widen(value: ir.Value) -> None:
    tensor = value.const_value
    if tensor is not None:
        wide = tensor.dtype in _HALF
        content = tensor.numpy().astype(np.float32) if wide else tensor.numpy().copy()
        value.const_value = ir.tensor(content, name=value.name)
    if value.dtype in _HALF:
        value.type = ir.TensorType(ir.DataType.FLOAT)


def _round_value(graph: ir.Graph, node: ir.Node | None, value: ir.Value, half: ir.DataType) -> None:
    """Put two casts behind a result, or behind an input: to half precision and back."""
    down = ir.Node("", "Cast", [value], [ir.AttrInt64("to", half.value)])
    down.outputs[0].name = f"{value.name}_half"
    up = ir.Node("", "Cast", [down.outputs[0]], [ir.AttrInt64("to", ir.DataType.FLOAT.value)])
    result = up.outputs[0]
    result.shape, result.type = value.shape, ir.TensorType(ir.DataType.FLOAT)
    result.name = f"{value.name}_rounded"
    ir.convenience.replace_all_uses_with(value, result, replace_graph_outputs=True)
    down.replace_input_with(0, value)
    if result.is_graph_output():
        result.name, value.name = value.name, f"{value.name}_exact"
    if node is None:
        graph.insert_before(graph[0], [down, up])
    else:
        graph.insert_after(node, [down, up])


def random_inputs(segment: Segment, sizes: Sizes, seed: int = 0) -> dict[str, np.ndarray]:
    """Standard normal float32 inputs by name, as the segment's dtypes hold them; scales near 1."""
    rng = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {}
    for spec in segment.inputs:
        shape = spec.shape(sizes)
        if spec.dtype == "int64":
            made[spec.name] = rng.integers(0, 5, shape)
            continue
        values = rng.standard_normal(shape, np.float32)
        if spec.name.startswith("scale_"):
            values = values * np.float32(0.1) + np.float32(1)
        if spec.dtype == "bfloat16":
            values = values.astype(ml_dtypes.bfloat16).astype(np.float32)
        elif spec.dtype == "float16":
            values = values.astype(np.float16).astype(np.float32)
        made[spec.name] = values
    return made
