"""A segment's ONNX graph, run operator by operator in PyTorch, on any of its devices.

It knows the operators and options that blockcache's own graphs have (opset 22) and refuses others
by name. Sizes and axes are int64 on the host, so that no launch waits for the device: a CUDA graph
can capture the whole of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import onnx
import torch
from torch.nn import functional as F

from blockcache.runtime.errors import EngineError

Attributes: TypeAlias = Mapping[str, Any]
Operator: TypeAlias = Callable[..., "torch.Tensor | Sequence[torch.Tensor]"]
"""(attributes, *inputs) to the output, or to a sequence of several."""

_DTYPES = {  # TensorProto.DataType
    1: torch.float32,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    16: torch.bfloat16,
}


@dataclass(frozen=True)
class _Step:
    """One node, and the values that nobody reads after it."""

    operator: Operator
    inputs: tuple[str, ...]  # "" for an optional one that is left out
    outputs: tuple[str, ...]
    last_read: tuple[str, ...]


class TorchGraph:
    """A graph with its weights on a device; ``run`` is a function of its inputs."""

    def __init__(self, path: Path, device: torch.device) -> None:
        """Load a graph.

        Args:
            path: an ONNX file; its external weights lie beside it.
            device: where the weights go, and where the inputs will be.

        Raises:
            EngineError: an operator or an option that no graph of blockcache has.
        """
        graph = onnx.load(path).graph
        self.inputs = tuple(value.name for value in graph.input)
        self.outputs = tuple(value.name for value in graph.output)
        self._weights = {w.name: _on(device, w) for w in graph.initializer}
        self._steps = _steps(graph.node, {*self._weights, *self.outputs}, path.name)

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs by name; one may be a view of an input."""
        values = {**self._weights, **inputs}
        for step in self._steps:
            made = step.operator(*(values[name] if name else None for name in step.inputs))
            several = (made,) if isinstance(made, torch.Tensor) else made
            values.update(zip(step.outputs, several, strict=True))
            for name in step.last_read:
                del values[name]
        return {name: values[name] for name in self.outputs}


def _on(device: torch.device, weight: onnx.TensorProto) -> torch.Tensor:
    """A weight where it is read: integers are sizes, axes and indices, and stay on the host."""
    dtype = _DTYPES[weight.data_type]
    if dtype == torch.bfloat16:  # numpy has no such type
        bits = torch.frombuffer(bytearray(weight.raw_data), dtype=dtype)
        return bits.reshape(*weight.dims).to(device)
    values = torch.tensor(onnx.numpy_helper.to_array(weight))
    return values.to(device if dtype.is_floating_point else "cpu")


def _steps(nodes: Sequence[onnx.NodeProto], kept: set[str], file: str) -> list[_Step]:
    """The nodes in their order, which is one in which they can run."""
    steps: list[_Step] = []
    seen = {*kept, ""}
    for node in reversed(nodes):
        names = {*node.input, *node.output}
        steps.append(
            _Step(_operator(node, file), (*node.input,), (*node.output,), (*(names - seen),))
        )
        seen |= names
    return steps[::-1]


def _operator(node: onnx.NodeProto, file: str) -> Operator:
    function = OPERATORS.get(node.op_type) if not node.domain else None
    if function is None:
        raise EngineError(
            f"Expected the operators of blockcache's graphs, got {node.domain or 'ONNX'}'s "
            f"{node.op_type!r} in {file} (node {node.name!r}). Add it to OPERATORS."
        )
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    for name, known in _ONLY.get(node.op_type, {}).items():
        if attributes.get(name, known) != known:
            raise EngineError(
                f"Expected {node.op_type} with {name}={known!r}, got {attributes[name]!r} in "
                f"{file} (node {node.name!r}). Extend the operator's function."
            )
    return functools.partial(function, attributes)


# -- operators -------------------------------------------------------------------------------------


def _plain(function: Callable[..., torch.Tensor]) -> Operator:
    """An operator without options."""
    return lambda attributes, *inputs: function(*inputs)


def _integers(values: torch.Tensor) -> list[int]:
    """Sizes or axes, which lie on the host."""
    return [int(value) for value in values.tolist()]


def _conv(
    attributes: Attributes, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    strides, dilations = (tuple(attributes.get(n, (1, 1))) for n in ("strides", "dilations"))
    return F.conv2d(x, weight, bias, strides, (top, left), dilations, attributes.get("group", 1))


def _gemm(
    attributes: Attributes, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None
) -> torch.Tensor:
    return F.linear(a, b if attributes.get("transB") else b.T, c)


def _group_norm(
    attributes: Attributes, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return F.group_norm(x, attributes["num_groups"], scale, bias, attributes.get("epsilon", 1e-5))


def _layer_norm(
    attributes: Attributes, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return F.layer_norm(x, scale.shape, scale, bias, attributes.get("epsilon", 1e-5))


def _resize(
    attributes: Attributes,
    x: torch.Tensor,
    region: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    sizes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Nearest neighbours by whole factors: rows and columns are repeated."""
    if sizes is not None:
        factors = [made // size for made, size in zip(_integers(sizes), x.shape, strict=True)]
    else:
        assert scales is not None
        factors = _integers(scales)
    return F.interpolate(x, scale_factor=[float(factor) for factor in factors[2:]])


def _reshape(attributes: Attributes, x: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    """A size of 0 is that of ``x``, unless zeros are allowed."""
    sizes = _integers(shape)
    if attributes.get("allowzero"):
        return x.reshape(sizes)
    return x.reshape([size or x.shape[axis] for axis, size in enumerate(sizes)])


def _transpose(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return x.permute(*attributes["perm"])


def _unsqueeze(attributes: Attributes, x: torch.Tensor, axes: torch.Tensor) -> torch.Tensor:
    """Axes count in the result."""
    axes_made = _integers(axes)
    for axis in sorted(axis % (x.ndim + len(axes_made)) for axis in axes_made):
        x = x.unsqueeze(axis)
    return x


def _squeeze(
    attributes: Attributes, x: torch.Tensor, axes: torch.Tensor | None = None
) -> torch.Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(_integers(axes)))


def _concat(attributes: Attributes, *inputs: torch.Tensor) -> torch.Tensor:
    return torch.cat(inputs, attributes["axis"])


def _split(
    attributes: Attributes, x: torch.Tensor, sizes: torch.Tensor | None = None
) -> Sequence[torch.Tensor]:
    axis = attributes.get("axis", 0)
    if sizes is not None:
        return x.split(_integers(sizes), axis)
    return x.chunk(attributes["num_outputs"], axis)


def _slice(
    attributes: Attributes,
    x: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    axes: torch.Tensor | None = None,
    steps: torch.Tensor | None = None,
) -> torch.Tensor:
    begin, end = _integers(starts), _integers(ends)
    along = range(len(begin)) if axes is None else _integers(axes)
    by = [1] * len(begin) if steps is None else _integers(steps)
    places = [slice(None)] * x.ndim
    for axis, *bounds in zip(along, begin, end, by, strict=True):
        places[axis] = slice(*slice(*bounds).indices(x.shape[axis]))
    return x[tuple(places)]


def _gather(attributes: Attributes, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    axis = attributes.get("axis", 0) % x.ndim
    chosen = x.index_select(axis, indices.reshape(-1).to(x.device))
    return chosen.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _gather_nd(attributes: Attributes, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    places: torch.Tensor = x[tuple(indices.to(x.device).unbind(-1))]
    return places


def _shape(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    sizes = [*x.shape][attributes.get("start", 0) : attributes.get("end")]
    return torch.tensor(sizes, dtype=torch.int64)


def _expand(attributes: Attributes, x: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    """Both ways: a size of 1 on either side follows the other's."""
    return x.expand(torch.broadcast_shapes(x.shape, _integers(shape)))


def _argmax(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return x.argmax(attributes.get("axis", 0), keepdim=bool(attributes.get("keepdims", 1)))


def _clip(
    attributes: Attributes,
    x: torch.Tensor,
    least: torch.Tensor | None = None,
    most: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.clamp(least, most)


OPERATORS: dict[str, Operator] = {
    "Add": _plain(torch.add),
    "ArgMax": _argmax,
    "Cast": lambda attributes, x: x.to(_DTYPES[attributes["to"]]),
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Cos": _plain(torch.cos),
    "Div": _plain(torch.div),
    "Equal": _plain(torch.eq),
    "Expand": _expand,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Gelu": lambda attributes, x: F.gelu(
        x, approximate=attributes.get("approximate", b"none").decode()
    ),
    "Gemm": _gemm,
    "GroupNormalization": _group_norm,
    "IsNaN": _plain(torch.isnan),
    "LayerNormalization": _layer_norm,
    "MatMul": _plain(torch.matmul),
    "Mul": _plain(torch.mul),
    "Range": lambda attributes, *bounds: torch.arange(*(int(bound) for bound in bounds)),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Sigmoid": _plain(torch.sigmoid),
    "Sin": _plain(torch.sin),
    "Slice": _slice,
    "Softmax": lambda attributes, x: x.softmax(attributes.get("axis", -1)),
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _plain(torch.where),
}

_ONLY: dict[str, Attributes] = {
    "ArgMax": {"select_last_index": 0},
    "Conv": {"auto_pad": b"NOTSET"},
    "GatherND": {"batch_dims": 0},
    "Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0},
    "LayerNormalization": {"axis": -1},
    "Resize": {
        "mode": b"nearest",
        "nearest_mode": b"floor",
        "coordinate_transformation_mode": b"asymmetric",
        "antialias": 0,
    },
}
"""Options that have one value in our graphs, and the value."""
