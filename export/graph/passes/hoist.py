"""Pass: what does not depend on the sample leaves the denoising loop.

Loop-invariant code motion across steps. Every value is classed by the inputs it depends on:

=============  =====================================  ===========================================
class          depends on                             is evaluated
=============  =====================================  ===========================================
``time``       timestep                               offline, for all steps: a table in the preset
``prompt``     conditions                             once per image
``condition``  timestep and conditions                once per image, for all steps in one batch
``loop``       sample, block outputs, alignment       at each step
=============  =====================================  ===========================================

Layout operations and multiplications by a scalar that stand last before the loop stay inside it:
they cost nothing there, the tensors that cross are smaller and plainer, and engines recognise
attention by exactly these operations.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

import onnx_ir as ir

Class: TypeAlias = Literal["constant", "time", "prompt", "condition", "loop"]
HOISTED: tuple[Class, ...] = ("time", "prompt", "condition")

BOUNDARY_PREFIX: dict[Class, str] = {
    "time": "time_row",
    "prompt": "prompt",
    "condition": "condition_row",
}
"""How boundary tensors of each class are named; all have the batch as their first axis.

``time_row_0`` depends on an image's step alone, ``condition_row_0`` also on its conditions."""

_LAYOUT = {"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Split", "Slice", "Cast"}


def classify(graph: ir.Graph, conditions: Iterable[str]) -> dict[ir.Node, Class]:
    """The class of every node of a graph with inputs sample, timestep, conditions and tables."""
    names = set(conditions)
    of_value: dict[ir.Value, Class] = {
        given: "time" if given.name == "timestep" else "prompt" if given.name in names else "loop"
        for given in graph.inputs
    }
    classes: dict[ir.Node, Class] = {}
    for node in graph:
        joined: Class = "constant"
        for value in node.inputs:
            if value is not None:
                joined = _join(joined, of_value.get(value, "constant"))
        classes[node] = joined
        of_value.update(dict.fromkeys(node.outputs, joined))
    _keep_trailing_layout(graph, classes)
    return classes


def _join(a: Class, b: Class) -> Class:
    """The class of a value computed from values of classes a and b."""
    if a == b or b == "constant":
        return a
    if a == "constant":
        return b
    return "loop" if "loop" in (a, b) else "condition"


def _keep_trailing_layout(graph: ir.Graph, classes: dict[ir.Node, Class]) -> None:
    """Move layout operations whose every consumer is in the loop into the loop."""
    for node in reversed(list(graph)):
        if classes[node] not in HOISTED or not (_is_layout(node) or _scales_by_scalar(node)):
            continue
        users = [user for value in node.outputs for user, _ in value.uses()]
        produced = any(value.producer() is not None for value in node.inputs if value is not None)
        if users and produced and all(classes[user] == "loop" for user in users):
            classes[node] = "loop"


def _is_layout(node: ir.Node) -> bool:
    return node.op_type in _LAYOUT


def _scales_by_scalar(node: ir.Node) -> bool:
    if node.op_type != "Mul":
        return False
    return any(
        value is not None and value.const_value is not None and value.const_value.size == 1
        for value in node.inputs
    )
