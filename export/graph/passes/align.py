"""Pass: what may be reused is aligned where it is read (section 3.4).

Every block's residual Add becomes ``x + scale * C + shift``; what a cut of the up path hands on, T,
becomes ``scale * T + shift`` in front of the concatenation behind the cut. The U-Net's own output
is aligned behind its last convolution.

On a diffusers U-Net each spatial transformer's module path owns exactly one top-level Add, whose
inputs are (C_i, x). So does each ResBlock's, x being what its ``conv_shortcut`` gives, if any.
``scale`` and ``shift`` become graph inputs, float32 [batch, C_k, 1, 1], so that the step's row of
the alignment table is all that changes between steps, and that images at different steps share a
launch. With two outputs (history) a third input brings the output computed before the last one:
``y = x + scale * C_last + before * C_before + shift``.

In half-precision graphs the sum is formed in float32 and rounded once: engines fuse it into one
kernel either way, and a scale of 1.003 survives.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from blockcache.runtime.errors import ExportError
from blockcache.runtime.plan import (
    WHOLE,
    block_output_name,
    coefficient_names,
    previous_output_name,
)

_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class AlignedBlock:
    """Where block k stands in the graph after the pass."""

    branch: ir.Value  # C_k
    residual: ir.Value  # x
    sum: tuple[ir.Node, ...]  # x + scale * C_k + shift


@dataclass(frozen=True)
class AlignedCut:
    """Where a branch ends in the graph after the pass."""

    output: ir.Value  # T
    sum: tuple[ir.Node, ...]  # scale * T + shift; none where T is read as it is


def align(graph: ir.Graph, block_paths: Sequence[str], outputs: int) -> list[AlignedBlock]:
    """Rewrite the residual Add of every block, in execution order; ``outputs`` is 1 or 2."""
    blocks = []
    for k, (add, branch) in enumerate(_residual_adds(graph, block_paths)):
        branch.name = block_output_name(k)
        (residual,) = (v for v in add.inputs if v is not None and v is not branch)
        blocks.append(AlignedBlock(branch, residual, _rewrite(graph, add, branch, k, outputs)))
    return blocks


def align_cuts(
    graph: ir.Graph, depths: Sequence[int], first: int, outputs: int
) -> list[AlignedCut]:
    """Align what each cut hands on; ``outputs`` is 1 or 2.

    Args:
        graph: of the whole U-Net.
        depths: of the cuts; 0 is the last concatenation of the up path, ``WHOLE`` the output.
        first: the index of the first cut among all that may be reused, behind the blocks.
        outputs: how many computed outputs a reuse combines.

    Raises:
        ExportError: the graph has no such concatenation.
    """
    joins = [
        node
        for node in graph
        if node.op_type == "Concat" and re.fullmatch(r"up_blocks\.\d+", _owner(node))
    ][::-1]
    cuts = []
    for k, depth in enumerate(depths, start=first):
        if depth == WHOLE:
            cuts.append(_align_output(graph, k, outputs))
            continue
        if depth >= len(joins):
            raise ExportError(
                f"Expected a concatenation for every skip of this U-Net, found {len(joins)} and "
                f"none for cut {depth}. The installed diffusers may compute its up path in a new "
                f"way; please report its version."
            )
        join = joins[depth]
        output = join.inputs[0]
        assert output is not None
        output.name = block_output_name(k)
        aligned = _Emitter(graph, join, k, output)
        total = aligned.combined(output, outputs)
        join.replace_input_with(0, aligned.finished(total))
        cuts.append(AlignedCut(output, tuple(aligned.nodes)))
    return cuts


def _align_output(graph: ir.Graph, k: int, outputs: int) -> AlignedCut:
    """The model output becomes the aligned one of what the last convolution computes."""
    output = graph.outputs[0]
    name, last = output.name, output.producer()
    assert last is not None
    aligned = _Emitter(graph, last, k, output, behind=True)
    finished = aligned.finished(aligned.combined(output, outputs))
    graph.outputs[0] = finished
    output.name, finished.name = block_output_name(k), name
    return AlignedCut(output, tuple(aligned.nodes))


def _owner(node: ir.Node) -> str:
    """The path of the module that a node is an operation of; "" where nothing tells."""
    scopes = _scopes(node)
    # The last scope is the operation's own; the one before it is the owning module.
    return scopes[-2].removeprefix("unet.") if len(scopes) >= 2 else ""


def _residual_adds(graph: ir.Graph, block_paths: Sequence[str]) -> list[tuple[ir.Node, ir.Value]]:
    """Per block, the residual Add and its input C_i."""
    found: dict[str, list[tuple[ir.Node, ir.Value]]] = {path: [] for path in block_paths}
    for node in graph:
        path = _owner(node)
        if node.op_type != "Add" or path not in found:
            continue
        inside = [value for value in node.inputs if value is not None and _is_inside(value, path)]
        # A ResBlock also adds its time projection, but uses the sum itself.
        users = [user for user, _ in node.outputs[0].uses()]
        if len(inside) == 1 and not all(_scope(path) in _scopes(user) for user in users):
            found[path].append((node, inside[0]))
    for path, adds in found.items():
        if len(adds) != 1:
            raise ExportError(
                f"Expected one residual Add owned by {path}, found {len(adds)}. The installed "
                f"diffusers may compute this module in a new way; please report its version."
            )
    return [found[path][0] for path in block_paths]


def _scope(path: str) -> str:
    """The scope of a module in the traced graph."""
    return path if path.startswith("controlnet.") else f"unet.{path}"


def _scopes(node: ir.Node) -> list[str]:
    text = node.metadata_props.get(_SCOPES)
    scopes: list[str] = ast.literal_eval(text) if text else []
    return scopes


def _is_inside(value: ir.Value, path: str) -> bool:
    """Whether a value is computed by the residual branch of the module at ``path``."""
    producer = value.producer()
    scopes = [] if producer is None else _scopes(producer)
    return _scope(path) in scopes and f"{_scope(path)}.conv_shortcut" not in scopes


def _rewrite(
    graph: ir.Graph, add: ir.Node, branch: ir.Value, k: int, outputs: int
) -> tuple[ir.Node, ...]:
    """Replace ``add`` by the aligned sum; returns the nodes of the sum."""
    (residual,) = (value for value in add.inputs if value is not branch and value is not None)
    aligned = _Emitter(graph, add, k, branch)
    total = aligned.emit("Add", aligned.combined(branch, outputs), aligned.single(residual))
    ir.convenience.replace_all_uses_with(add.outputs[0], aligned.finished(total))
    graph.remove(add, safe=True)
    return tuple(aligned.nodes)


class _Emitter:
    """Writes the arithmetic of one alignment in front of a node or behind it, in float32."""

    def __init__(
        self, graph: ir.Graph, anchor: ir.Node, k: int, like: ir.Value, *, behind: bool = False
    ) -> None:
        assert like.dtype is not None
        assert like.shape is not None
        self.nodes: list[ir.Node] = []
        self._graph, self._anchor, self._k, self._behind = graph, anchor, k, behind
        self._dtype, self._shape = like.dtype, like.shape

    def emit(
        self, op_type: str, *inputs: ir.Value, to: ir.DataType = ir.DataType.FLOAT
    ) -> ir.Value:
        """One operation."""
        attributes = [ir.AttrInt64("to", to.value)] if op_type == "Cast" else []
        name = f"align_{self._k}_{len(self.nodes)}"
        value = ir.Value(name=name, shape=self._shape, type=ir.TensorType(to))
        node = ir.Node("", op_type, inputs, attributes, outputs=[value])
        if self._behind:
            self._graph.insert_after(self._anchor, [node])
            self._anchor = node
        else:
            self._graph.insert_before(self._anchor, [node])
        self.nodes.append(node)
        return value

    def single(self, value: ir.Value) -> ir.Value:
        """A value in float32."""
        return value if self._dtype == ir.DataType.FLOAT else self.emit("Cast", value)

    def combined(self, output: ir.Value, outputs: int) -> ir.Value:
        """``scale * C_last (+ before * C_before) + shift``, with the coefficients as inputs."""
        shape = (*self._shape.numpy()[:2], 1, 1)
        coefficients = [
            _add_input(self._graph, name, shape, ir.DataType.FLOAT)
            for name in coefficient_names(self._k, outputs)
        ]
        total = self.emit("Mul", self.single(output), coefficients[0])
        if outputs == 2:
            name = previous_output_name(self._k)
            before = _add_input(self._graph, name, self._shape, self._dtype)
            weighted = self.emit("Mul", self.single(before), coefficients[1])
            total = self.emit("Add", total, weighted)
        return self.emit("Add", total, coefficients[-1])

    def finished(self, total: ir.Value) -> ir.Value:
        """The result in the graph's own precision."""
        if self._dtype == ir.DataType.FLOAT:
            return total
        return self.emit("Cast", total, to=self._dtype)


def _add_input(
    graph: ir.Graph, name: str, shape: ir.Shape | Sequence[int], dtype: ir.DataType
) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(list(shape)), type=ir.TensorType(dtype))
    graph.inputs.append(value)
    return value
