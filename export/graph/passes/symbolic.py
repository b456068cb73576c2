"""Pass: prime-coded sizes become symbolic dimensions.

The U-Net is exported once with static shapes in which batch, height, width and tokens are
distinct primes (height and width times the downsampling factor). Every size in that graph
factorises in one way only, so its factors say what it stands for: with batch 13 and width
``8 * 19``, a dimension of 494 = 13 * 38 is ``batch * width/4``. That makes the export as quick
and as simple as a static one (no symbolic shape arithmetic in the graph), and the result as
general as a dynamic one.

``generalize`` rewrites the places where such sizes stand as constants:

1. Reshape: a dimension equal to the input's at that place becomes 0 (copy), one left over becomes
   -1 (infer), any further one is computed from the shape of a graph input.
2. Expand to the shape that the input has already: dropped.
3. A coded constant anywhere else: ExportError, naming the node.

One size is a sum: a U-Net that pools its prompt lays one token beside it. Where a model does that,
the prime of tokens is chosen so that tokens + 1 is twice another prime, which marks it. Any other
join along a coded axis is an ExportError: its sum would read as a number of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import onnx_ir as ir

from blockcache.runtime.errors import ExportError
from blockcache.runtime.plan import Dim

_PRIMES = (13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)


@dataclass(frozen=True)
class SizeCode:
    """Which prime stands for which axis in an exported graph."""

    batch: int
    height: int  # the latent height is height * downsampling
    width: int
    tokens: int
    downsampling: int
    one_more: int = 0  # the prime that is half of tokens + 1, where the model has such a size

    @classmethod
    def avoiding(
        cls, sizes: Iterable[int], downsampling: int, *, one_more: bool = False
    ) -> SizeCode:
        """Primes that divide none of ``sizes`` (every parameter dimension of the model).

        Args:
            sizes: the model's own.
            downsampling: of height and width.
            one_more: whether the model lays one token beside its prompt.
        """
        taken = {prime for size in sizes for prime in _PRIMES if size and size % prime == 0}
        free = [prime for prime in _PRIMES if prime not in taken]
        last = [p for p in free if not one_more or (p + 1) // 2 in free]
        if len(free) < 4 + one_more or not last:
            raise ExportError(
                "Expected four primes that divide no parameter dimension of the model; "
                f"only {free} of {_PRIMES} do."
            )
        if not one_more:
            batch, height, width, tokens = free[:4]
            return cls(batch, height, width, tokens, downsampling)
        tokens, half = last[0], (last[0] + 1) // 2
        batch, height, width = [prime for prime in free if prime not in (tokens, half)][:3]
        return cls(batch, height, width, tokens, downsampling, half)

    def dim(self, size: int) -> Dim:
        """What ``size`` stands for.

        Examples:
            >>> str(SizeCode(13, 17, 19, 23, 8).dim(13 * 2 * 17 * 4 * 19))
            'batch*height*width/8'
        """
        axes: list[str] = []
        rest = size
        for axis in ("batch", "height", "width", "tokens"):
            prime = getattr(self, axis)
            while rest and rest % prime == 0:
                rest //= prime
                axes.append(axis)
        scaled = sum(axis in ("height", "width") for axis in axes)
        return Dim(Fraction(rest, self.downsampling**scaled), tuple(sorted(axes)))

    def is_coded(self, size: int) -> bool:
        """Whether ``size`` depends on an axis."""
        return size > 0 and (bool(self.dim(size).axes) or self.has_one_more(size))

    def has_one_more(self, size: int) -> bool:
        """Whether ``size`` is a multiple of tokens + 1."""
        return bool(self.one_more) and size % self.one_more == 0

    def dims(self, shape: Sequence[int]) -> tuple[Dim, ...]:
        """The symbolic form of a static shape."""
        return tuple(self.dim(size) for size in shape)


def generalize(graph: ir.Graph, code: SizeCode) -> None:
    """Make a prime-coded graph valid for every batch, height, width and prompt length."""
    builder = _ShapeBuilder(graph, code)
    for node in list(graph):
        if node.op_type == "Reshape":
            builder.generalize_reshape(node)
        elif node.op_type == "Expand" and _static(node.inputs[0]) == _static(node.outputs[0]):
            source = node.inputs[0]
            assert source is not None
            ir.convenience.replace_all_uses_with(
                node.outputs[0], source, replace_graph_outputs=True
            )
            graph.remove(node, safe=True)
        else:
            _refuse_coded_constants(node, code)
            _refuse_unread_sums(node, code)
    _drop_unused_initializers(graph)
    _write_symbolic_shapes(graph, code)


@dataclass(frozen=True)
class _Anchor:
    """A dimension of a graph input that equals ``scale`` times one axis."""

    value: ir.Value
    place: int
    scale: Fraction


class _ShapeBuilder:
    """Rewrites Reshape targets of one graph; shares the constants it makes."""

    def __init__(self, graph: ir.Graph, code: SizeCode) -> None:
        self.graph = graph
        self.code = code
        self.anchors: dict[str, _Anchor] = {}
        for value in graph.inputs:
            for place, dim in enumerate(code.dims(_static(value))):
                if len(dim.axes) == 1:
                    self.anchors.setdefault(dim.axes[0], _Anchor(value, place, dim.coefficient))

    def generalize_reshape(self, node: ir.Node) -> None:
        """Rule 1 of the module docstring."""
        source, target = _static(node.inputs[0]), _static(node.outputs[0])
        entries: list[int | Dim] = []
        for place, size in enumerate(target):
            if not self.code.is_coded(size):
                entries.append(size)
            elif place < len(source) and source[place] == size:
                entries.append(0)
            else:
                entries.append(self.code.dim(size))
        unknown = [place for place, entry in enumerate(entries) if isinstance(entry, Dim)]
        if unknown:
            sums = [place for place in unknown if self.code.has_one_more(target[place])]
            entries[(sums or unknown)[-1]] = -1
        node.replace_input_with(1, self._shape(node, entries))
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)

    def _shape(self, node: ir.Node, entries: Sequence[int | Dim]) -> ir.Value:
        """A shape vector: a constant where it can be, else computed from the graph's inputs."""
        constants = [entry for entry in entries if not isinstance(entry, Dim)]
        if len(constants) == len(entries):
            return self._constant(constants)
        nodes: list[ir.Node] = []
        parts = [
            self._size(node, entry, nodes) if isinstance(entry, Dim) else self._constant([entry])
            for entry in entries
        ]
        shape = self._emit(nodes, "Concat", parts, axis=0)
        for made in nodes:
            made.outputs[0].name = f"{node.outputs[0].name}_{made.outputs[0].name}"
        self.graph.insert_before(node, nodes)
        return shape

    def _size(self, node: ir.Node, dim: Dim, nodes: list[ir.Node]) -> ir.Value:
        """``dim`` as an int64 tensor [1], computed by ``nodes``."""
        scale = dim.coefficient
        product: ir.Value | None = None
        for axis in dim.axes:
            if axis not in self.anchors:
                raise ExportError(
                    f"Reshape {node.outputs[0].name!r} needs {dim}, but no input of its segment "
                    f"has the axis {axis!r}. Please report the model's config."
                )
            anchor = self.anchors[axis]
            scale /= anchor.scale
            size = self._emit(
                nodes, "Shape", [anchor.value], start=anchor.place, end=anchor.place + 1
            )
            product = size if product is None else self._emit(nodes, "Mul", [product, size])
        if product is None:
            raise ExportError(
                f"Reshape {node.outputs[0].name!r} needs two sizes of tokens + 1, of which a "
                f"Reshape infers one. Please report the model's config."
            )
        for op_type, number in (("Mul", scale.numerator), ("Div", scale.denominator)):
            if number != 1:
                product = self._emit(nodes, op_type, [product, self._constant([number])])
        return product

    @staticmethod
    def _emit(
        nodes: list[ir.Node], op_type: str, inputs: Sequence[ir.Value], **attributes: int
    ) -> ir.Value:
        value = ir.Value(name=f"shape_{len(nodes)}", type=ir.TensorType(ir.DataType.INT64))
        attrs = [ir.AttrInt64(key, number) for key, number in attributes.items()]
        nodes.append(ir.Node("", op_type, inputs, attrs, outputs=[value]))
        return value

    def _constant(self, numbers: Sequence[int]) -> ir.Value:
        """An int64 initializer, one for equal contents."""
        name = "dims_" + "_".join(str(number).replace("-", "m") for number in numbers)
        if name not in self.graph.initializers:
            tensor = ir.tensor(np.array(numbers, np.int64), name=name)
            self.graph.register_initializer(
                ir.Value(
                    name=name,
                    const_value=tensor,
                    type=ir.TensorType(tensor.dtype),
                    shape=ir.Shape([len(numbers)]),
                )
            )
        return self.graph.initializers[name]


def _static(value: ir.Value | None) -> tuple[int, ...]:
    """The static shape of a value; ExportError where the exporter left none."""
    if value is None or value.shape is None or not value.shape.is_static():
        raise ExportError(
            f"Expected a static shape on every value of the exported graph; "
            f"{value.name if value else 'a missing input'!r} has none."
        )
    return value.shape.numpy()


def _refuse_coded_constants(node: ir.Node, code: SizeCode) -> None:
    """Rule 3 of the module docstring."""
    for value in node.inputs:
        tensor = value.const_value if value is not None else None
        if tensor is None or tensor.dtype != ir.DataType.INT64 or tensor.size > 16:
            continue
        if any(code.is_coded(int(number)) for number in tensor.numpy().flatten()):
            raise ExportError(
                f"{node.op_type} {node.outputs[0].name!r} takes {tensor.numpy().tolist()}, which "
                f"depends on the input's size; only Reshape and Expand may. Please report the "
                f"model's config."
            )


def _refuse_unread_sums(node: ir.Node, code: SizeCode) -> None:
    """Raise ExportError where a coded size is joined with others to one that is not coded."""
    if node.op_type != "Concat":
        return
    axis = node.attributes.get_int("axis")
    assert axis is not None
    parts = [_static(value)[axis] for value in node.inputs]
    if any(map(code.is_coded, parts)) and not code.is_coded(sum(parts)):
        raise ExportError(
            f"Concat {node.outputs[0].name!r} joins sizes {parts}, of which some depend on the "
            f"input's size; only one token more than the prompt is understood. Please report the "
            f"model's config."
        )


def _drop_unused_initializers(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]


def _write_symbolic_shapes(graph: ir.Graph, code: SizeCode) -> None:
    """Symbolic shapes on inputs and outputs; none inside, where every engine infers its own."""
    for node in graph:
        for value in node.outputs:
            if value not in graph.outputs:
                value.shape = None
    for value in (*graph.inputs, *graph.outputs):
        dims = code.dims(_static(value))
        value.shape = ir.Shape([str(dim) if dim.axes else int(dim.coefficient) for dim in dims])
