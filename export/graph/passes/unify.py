"""Pass: one type per Concat.

SDXL joins half-precision text embeddings to float32 time embeddings; torch promotes on the fly,
ONNX does not, and TensorRT refuses the node.
"""

from __future__ import annotations

import onnx_ir as ir


def unify(graph: ir.Graph) -> int:
    """Cast the inputs of every mixed Concat to its widest type; returns how many it cast."""
    count = 0
    for node in list(graph):
        if node.op_type != "Concat":
            continue
        types = [value.dtype for value in node.inputs if value is not None]
        if len(set(types)) < 2 or None in types or ir.DataType.FLOAT not in types:
            continue
        for place, value in enumerate(node.inputs):
            if value is None or value.dtype == ir.DataType.FLOAT:
                continue
            cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", ir.DataType.FLOAT.value)])
            wide = cast.outputs[0]
            wide.name, wide.shape = f"{value.name}_wide_{node.outputs[0].name}", value.shape
            wide.type = ir.TensorType(ir.DataType.FLOAT)
            graph.insert_before(node, cast)
            node.replace_input_with(place, wide)
            count += 1
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return count
