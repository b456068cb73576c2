"""What a graph's operations compute and move: the basis of every cost that nobody has measured.

Arithmetic is counted where it is: Conv, MatMul, Gemm; a multiply-add counts as two. Memory traffic
depends on who runs the graph. ``Fusion.COMPILER`` counts as an engine compiler would schedule it:
attention is one kernel that keeps its scores on chip, element-wise and layout operations ride along
with a neighbour, and one that joins two activations reads the second. ``Fusion.NONE`` counts every
operation's inputs and outputs, as a library that runs node by node moves them.
"""

from __future__ import annotations

import enum
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import onnx_ir as ir

from blockcache.export.graph.passes.symbolic import SizeCode
from blockcache.runtime.plan import Sizes


@dataclass(frozen=True)
class Flops:
    """A polynomial in the sizes: sum of coefficient * product of axes."""

    terms: Mapping[tuple[str, ...], Fraction]

    def at(self, sizes: Sizes) -> int:
        """The count at concrete sizes."""
        return int(
            sum(
                coefficient * math.prod(sizes.along(axis) for axis in axes)
                for axes, coefficient in self.terms.items()
            )
        )


def graph_flops(graph: ir.Graph, code: SizeCode) -> Flops:
    """Count a prime-coded graph (before ``generalize``).

    A size of tokens + 1 counts as the traced one: only a once-an-image segment may have it.
    """
    terms: dict[tuple[str, ...], Fraction] = defaultdict(Fraction)
    for node in graph:
        count = _node_flops(node)
        if count:
            dim = code.dim(count)
            terms[dim.axes] += dim.coefficient
    return Flops(dict(terms))


class Fusion(enum.Enum):
    """How much of a graph becomes one launch."""

    COMPILER = "compiler"
    NONE = "none"


@dataclass(frozen=True)
class Work:
    """Everything one run of a graph does, one row a launch."""

    flops: np.ndarray  # float64 [launches]
    bytes: np.ndarray  # float64 [launches], read and written, weights included


def graph_work(graph: ir.Graph, fusion: Fusion, item_bytes: int) -> Work:
    """The launches of a graph with static shapes (``passes.concrete``).

    Args:
        graph: one segment.
        fusion: who runs it.
        item_bytes: size of a floating-point number as the engine holds it: a bundle exported in
            float32 is costed as the bfloat16 engines that would be built from the same model.
    """
    attentions = _attentions(graph) if fusion is Fusion.COMPILER else {}
    inside = {node for parts in attentions.values() for node in parts}
    flops: list[float] = []
    moved: list[float] = []
    for node in graph:
        parts = attentions.get(node, [])
        if node in inside or (fusion is Fusion.NONE and node.op_type in _FREE):
            continue
        rides = fusion is Fusion.COMPILER and node.op_type not in _LAUNCHED
        if rides:
            if flops:  # behind a launch of this graph: one more activation for that kernel
                moved[-1] += sum(_bytes(v, item_bytes) for v in _activations(node)[1:])
            continue
        flops.append(float(_node_flops(node) + sum(_node_flops(part) for part in parts)))
        moved.append(float(sum(_bytes(v, item_bytes) for v in _touched(node, parts))))
    return Work(np.array(flops), np.array(moved))


_LAUNCHED = {
    *("Conv", "MatMul", "Gemm", "Resize", "Concat", "Softmax"),
    *("InstanceNormalization", "GroupNormalization", "LayerNormalization"),
}
"""What a compiler gives a kernel of its own."""

_FREE = {"Reshape", "Unsqueeze", "Squeeze", "Identity"}
"""Views: no library copies for them."""


def _attentions(graph: ir.Graph) -> dict[ir.Node, list[ir.Node]]:
    """Per attention: the MatMul with V, and the nodes between it and the MatMul of Q and K."""
    found = {}
    for softmax in (node for node in graph if node.op_type == "Softmax"):
        parts: list[ir.Node] = [softmax]
        while parts[-1].op_type != "MatMul":
            value = parts[-1].inputs[0]
            producer = value.producer() if value is not None else None
            if producer is None:
                break
            parts.append(producer)
        users = [user for user, _ in softmax.outputs[0].uses()]
        while len(users) == 1 and users[0].op_type != "MatMul":
            parts.append(users[0])
            users = [user for user, _ in users[0].outputs[0].uses()]
        if len(users) == 1 and any(part.op_type == "MatMul" for part in parts):
            found[users[0]] = parts
    return found


def _touched(node: ir.Node, inside: list[ir.Node]) -> list[ir.Value]:
    """What a launch reads and writes: the nodes' inputs but what they hand each other."""
    between = {value for part in inside for value in part.outputs}
    read = [value for each in (*inside, node) for value in each.inputs if value is not None]
    return [value for value in read if value not in between] + list(node.outputs)


def _activations(node: ir.Node) -> list[ir.Value]:
    return [v for v in node.inputs if v is not None and v.const_value is None]


def _bytes(value: ir.Value, item_bytes: int) -> int:
    floating = value.dtype is None or value.dtype.is_floating_point()
    return math.prod(_shape(value)) * (item_bytes if floating else 8)


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
