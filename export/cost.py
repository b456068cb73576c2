"""FLOPs of a graph, counted on its shapes: the cost model of schedules without measured engines.

Only the operations that carry the arithmetic are counted: Conv, MatMul, Gemm. A multiply-add
counts as two.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import onnx_ir as ir

from blockcache.export.passes.symbolic import SizeCode
from blockcache.runtime.plan import Sizes


@dataclass(frozen=True)
class Flops:
    """A polynomial in the sizes: sum of coefficient * product of axes."""

    terms: Mapping[tuple[str, ...], Fraction]

    def at(self, sizes: Sizes) -> int:
        """The count at concrete sizes."""
        return int(
            sum(
                coefficient * math.prod(sizes[axis] for axis in axes)
                for axes, coefficient in self.terms.items()
            )
        )


def graph_flops(graph: ir.Graph, code: SizeCode) -> Flops:
    """Count a prime-coded graph (before ``generalize``)."""
    terms: dict[tuple[str, ...], Fraction] = defaultdict(Fraction)
    for node in graph:
        count = _node_flops(node)
        if count:
            dim = code.dim(count)
            terms[dim.axes] += dim.coefficient
    return Flops(dict(terms))


def _node_flops(node: ir.Node) -> int:
    if node.op_type not in ("Conv", "MatMul", "Gemm"):
        return 0
    output = math.prod(_shape(node.outputs[0]))
    if node.op_type == "Conv":
        # Weight [C_out, C_in / groups, kernel...]: one dot product per output element.
        return 2 * output * math.prod(_shape(node.inputs[1])[1:])
    left = _shape(node.inputs[0])
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transA") == 1
    return 2 * output * left[0 if transposed else -1]


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    assert value is not None
    assert value.shape is not None
    return value.shape.numpy()
