"""Pass: every block's residual Add becomes ``x + scale * C + shift`` (section 3.4).

On a diffusers U-Net each spatial transformer's module path owns exactly one top-level Add, whose
inputs are (C_i, x). So does each ResBlock's, x being what its ``conv_shortcut`` gives, if any.
``scale`` and ``shift`` become graph inputs, float32 [1, C_k, 1, 1], so that the step's row of the
alignment table is all that changes between steps. With two outputs (history) a third input brings
the output computed before the last one: ``y = x + scale * C_last + before * C_before + shift``.

In half-precision graphs the sum is formed in float32 and rounded once: engines fuse it into one
kernel either way, and a scale of 1.003 survives.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from blockcache.runtime.errors import ExportError
from blockcache.runtime.plan import block_output_name, coefficient_names, previous_output_name

_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class AlignedBlock:
    """Where block k stands in the graph after the pass."""

    branch: ir.Value  # C_k
    residual: ir.Value  # x
    sum: tuple[ir.Node, ...]  # x + scale * C_k + shift


def align(graph: ir.Graph, block_paths: Sequence[str], outputs: int) -> list[AlignedBlock]:
    """Rewrite the residual Add of every block, in execution order; ``outputs`` is 1 or 2."""
    blocks = []
    for k, (add, branch) in enumerate(_residual_adds(graph, block_paths)):
        branch.name = block_output_name(k)
        (residual,) = (v for v in add.inputs if v is not None and v is not branch)
        blocks.append(AlignedBlock(branch, residual, _rewrite(graph, add, branch, k, outputs)))
    return blocks


def _residual_adds(graph: ir.Graph, block_paths: Sequence[str]) -> list[tuple[ir.Node, ir.Value]]:
    """Per block, the residual Add and its input C_i."""
    found: dict[str, list[tuple[ir.Node, ir.Value]]] = {path: [] for path in block_paths}
    for node in graph:
        scopes = _scopes(node)
        # The last scope is the operation's own; the one before it is the owning module.
        path = scopes[-2].removeprefix("unet.") if len(scopes) >= 2 else ""
        if node.op_type != "Add" or path not in found:
            continue
        inside = [value for value in node.inputs if value is not None and _is_inside(value, path)]
        # A ResBlock also adds its time projection, but uses the sum itself.
        users = [user for user, _ in node.outputs[0].uses()]
        if len(inside) == 1 and not all(f"unet.{path}" in _scopes(user) for user in users):
            found[path].append((node, inside[0]))
    for path, adds in found.items():
        if len(adds) != 1:
            raise ExportError(
                f"Expected one residual Add owned by {path}, found {len(adds)}. The installed "
                f"diffusers may compute this module in a new way; please report its version."
            )
    return [found[path][0] for path in block_paths]


def _scopes(node: ir.Node) -> list[str]:
    text = node.metadata_props.get(_SCOPES)
    scopes: list[str] = ast.literal_eval(text) if text else []
    return scopes


def _is_inside(value: ir.Value, path: str) -> bool:
    """Whether a value is computed by the residual branch of the module at ``path``."""
    producer = value.producer()
    scopes = [] if producer is None else _scopes(producer)
    return f"unet.{path}" in scopes and f"unet.{path}.conv_shortcut" not in scopes


def _rewrite(
    graph: ir.Graph, add: ir.Node, branch: ir.Value, k: int, outputs: int
) -> tuple[ir.Node, ...]:
    """Replace ``add`` by the aligned sum; returns the nodes of the sum."""
    (residual,) = (value for value in add.inputs if value is not branch and value is not None)
    output, dtype = add.outputs[0], branch.dtype
    assert dtype is not None
    assert branch.shape is not None
    nodes: list[ir.Node] = []

    def emit(op_type: str, *inputs: ir.Value, to: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        attributes = [ir.AttrInt64("to", to.value)] if op_type == "Cast" else []
        value = ir.Value(name=f"align_{k}_{len(nodes)}", shape=branch.shape, type=ir.TensorType(to))
        nodes.append(ir.Node("", op_type, inputs, attributes, outputs=[value]))
        return value

    def single(value: ir.Value) -> ir.Value:
        return value if dtype == ir.DataType.FLOAT else emit("Cast", value)

    channels = branch.shape.numpy()[1]
    coefficients = [
        _add_input(graph, name, (1, channels, 1, 1), ir.DataType.FLOAT)
        for name in coefficient_names(k, outputs)
    ]
    total = emit("Mul", single(branch), coefficients[0])
    if outputs == 2:
        before = _add_input(graph, previous_output_name(k), branch.shape, dtype)
        total = emit("Add", total, emit("Mul", single(before), coefficients[1]))
    total = emit("Add", total, coefficients[-1])
    total = emit("Add", total, single(residual))
    if dtype != ir.DataType.FLOAT:
        total = emit("Cast", total, to=dtype)
    graph.insert_before(add, nodes)
    ir.convenience.replace_all_uses_with(output, total)
    graph.remove(add, safe=True)
    return tuple(nodes)


def _add_input(
    graph: ir.Graph, name: str, shape: ir.Shape | Sequence[int], dtype: ir.DataType
) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(list(shape)), type=ir.TensorType(dtype))
    graph.inputs.append(value)
    return value
