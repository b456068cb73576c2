"""Resize in float32 between casts: older TensorRT has no Resize for bfloat16."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir


def with_float32_resize(onnx: Path) -> bytes:
    """A segment's graph with every half-precision Resize between two casts; weights stay on disk.

    The file itself is left alone: the bytes go to the parser together with its path.
    """
    model = ir.load(onnx)
    for node in list(model.graph):
        source, result = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "Resize" or source is None or source.dtype == ir.DataType.FLOAT:
            continue
        dtype = source.dtype or result.dtype or ir.DataType.BFLOAT16
        up = _cast(source, ir.DataType.FLOAT, f"{result.name}_wide")
        node.replace_input_with(0, up.outputs[0])
        model.graph.insert_before(node, [up])
        down = _cast(result, dtype, f"{result.name}_back")
        ir.convenience.replace_all_uses_with(result, down.outputs[0], replace_graph_outputs=True)
        down.replace_input_with(0, result)
        if down.outputs[0].is_graph_output():  # a boundary tensor keeps its name
            down.outputs[0].name, result.name = result.name, f"{result.name}_wide_out"
        result.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.insert_after(node, [down])
    return bytes(ir.to_proto(model).SerializeToString())


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    output = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
    return ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype.value)], outputs=[output])
