"""Pass: symbolic sizes become numbers. The inverse of ``symbolic``, to count work on a bundle.

With concrete inputs every shape vector of the graph is a constant; they are folded, and ONNX's own
shape inference does the rest. Weights stay on disk.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from blockcache.runtime.errors import ExportError
from blockcache.runtime.plan import Dim, Sizes


def concrete_graph(onnx: Path, sizes: Sizes) -> ir.Graph:
    """The graph of a segment's file with a static shape on every value.

    Args:
        onnx: one of a bundle's ``segments/*.onnx``.
        sizes: the engine's batch, latent height and width, prompt length.

    Raises:
        ConfigError: a size that the model's downsampling does not divide.
        ExportError: a value whose shape cannot be inferred; names the node.
    """
    model = ir.load(onnx)
    for value in model.graph.inputs:
        assert value.shape is not None
        value.shape = ir.Shape([_size(dim, sizes) for dim in value.shape])
    _fold_shapes(model.graph)
    _replace_group_norms(model.graph)
    graph = ShapeInferencePass()(model).model.graph
    for node in graph:
        for value in node.outputs:
            if value.shape is None or not value.shape.is_static():
                raise ExportError(
                    f"Expected a static shape on {value.name!r} of {node.op_type} in {onnx} at "
                    f"{sizes}, got {value.shape}. Please report the model's config."
                )
    return graph


def _size(dim: int | ir.SymbolicDim, sizes: Sizes) -> int:
    return dim if isinstance(dim, int) else Dim.parse(dim.value or "").value(sizes)


def _replace_group_norms(graph: ir.Graph) -> None:
    """ONNX infers no shape behind GroupNormalization; this one has the same inputs and work."""
    for node in graph:
        if node.op_type == "GroupNormalization":
            node.op_type = "InstanceNormalization"
            for name in ("num_groups", "stash_type"):
                node.attributes.pop(name, None)


def _fold_shapes(graph: ir.Graph) -> None:
    """Evaluate the shape vectors that ``symbolic`` computes of Shape, Mul, Div and Concat."""
    for node in list(graph):
        numbers = _shape_vector(node)
        if numbers is None:
            continue
        output = node.outputs[0]
        folded = ir.Value(
            name=f"{output.name}_folded",
            const_value=ir.tensor(numbers, name=f"{output.name}_folded"),
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape(numbers.shape),
        )
        graph.register_initializer(folded)
        ir.convenience.replace_all_uses_with(output, folded)
        graph.remove(node, safe=True)


def _shape_vector(node: ir.Node) -> np.ndarray | None:
    """int64 [n] where the node computes a shape from sizes that are known, else None."""
    if node.op_type == "Shape":
        source = node.inputs[0]
        if source is None or source.shape is None:
            return None
        start, end = (node.attributes.get_int(name) for name in ("start", "end"))
        return np.array(source.shape.numpy()[start:end], np.int64)
    if node.op_type not in ("Mul", "Div", "Concat"):
        return None
    constants = [value.const_value if value is not None else None for value in node.inputs]
    if any(c is None or c.dtype != ir.DataType.INT64 for c in constants):
        return None
    parts = [constant.numpy() for constant in constants if constant is not None]
    if node.op_type == "Concat":
        return np.concatenate(parts)
    result: np.ndarray = parts[0] * parts[1] if node.op_type == "Mul" else parts[0] // parts[1]
    return result
