"""Pass: plainer attention. The exporter transposes K through three dimensions; one op will do.

``Reshape [B, h, L, d] -> [B*h, L, d]; Transpose (0, 2, 1); Reshape -> [B, h, d, L]`` is
``Transpose (0, 1, 3, 2)``: two operations fewer per attention, and no size left to compute.
"""

from __future__ import annotations

import onnx_ir as ir


def simplify(graph: ir.Graph) -> int:
    """Apply the rule everywhere; returns how often it applied."""
    count = 0
    for last in list(graph):
        chain = _transpose_chain(last)
        if chain is None:
            continue
        first, middle = chain
        source = first.inputs[0]
        assert source is not None
        perm = ir.AttrInt64s("perm", [0, 1, 3, 2])
        direct = ir.Node("", "Transpose", [source], [perm], name=middle.name)
        direct.outputs[0].name = last.outputs[0].name
        direct.outputs[0].type = last.outputs[0].type
        direct.outputs[0].shape = last.outputs[0].shape
        direct.metadata_props.update(middle.metadata_props)
        graph.insert_before(last, direct)
        ir.convenience.replace_all_uses_with(last.outputs[0], direct.outputs[0])
        for node in (last, middle, first):
            if not node.outputs[0].uses():
                graph.remove(node, safe=True)
        count += 1
    return count


def _transpose_chain(last: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """(first, middle) where ``last`` ends the pattern of the module docstring."""
    middle = _only_producer(last, "Reshape", "Transpose")
    first = _only_producer(middle, "Transpose", "Reshape") if middle is not None else None
    if first is None or middle is None:
        return None
    if list(middle.attributes["perm"].as_ints()) != [0, 2, 1]:
        return None
    source, flat, result = (
        _dims(value) for value in (first.inputs[0], first.outputs[0], last.outputs[0])
    )
    if len(source) != 4 or len(flat) != 3 or result != (source[0], source[1], source[3], source[2]):
        return None
    return (first, middle) if flat == (source[0] * source[1], source[2], source[3]) else None


def _only_producer(node: ir.Node, op_type: str, expected: str) -> ir.Node | None:
    """The producer of the node's first input, if both have the expected types."""
    value = node.inputs[0] if node.op_type == op_type and node.inputs else None
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == expected else None


def _dims(value: ir.Value | None) -> tuple[int, ...]:
    if value is None or value.shape is None or not value.shape.is_static():
        return ()
    return value.shape.numpy()
