"""Prime-coded sizes: they factorise in one way, and Reshape is all that may hold them."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockcache.runtime import ExportError
from blockcache.runtime.plan import AXES, Dim

ir = pytest.importorskip("onnx_ir")
from blockcache.export.graph.passes.symbolic import _PRIMES, SizeCode, generalize  # noqa: E402

CODE = SizeCode(13, 17, 19, 23, 4)
B, H, W, T = 13, 17 * 4, 19 * 4, 23


def coded(dim, code=CODE):
    """The number that stands for ``dim`` in a coded graph."""
    spatial = {"height", "width"}
    product = dim.coefficient
    for axis in dim.axes:
        product *= getattr(code, axis) * (code.downsampling if axis in spatial else 1)
    return product


monomials = st.builds(
    lambda axes, power, odd: Dim(
        Fraction(odd * 2**power, 4 ** sum(axis in ("height", "width") for axis in axes)),
        tuple(sorted(axes)),
    ),
    st.lists(st.sampled_from(AXES), max_size=4),
    st.integers(0, 12),
    st.sampled_from([1, 3, 5, 7, 9, 11, 15, 77, 29 * 31]),
)


@given(monomials)
def test_a_monomial_is_read_back_from_its_coded_size(dim):
    size = coded(dim)
    assert size.denominator == 1
    assert CODE.dim(int(size)) == dim
    assert CODE.is_coded(int(size)) == bool(dim.axes)


@pytest.mark.parametrize(
    ("size", "text"),
    [(320, "320"), (B, "batch"), (H, "height"), (H // 4 * (W // 4), "height*width/16"),
     (B * 8, "8*batch"), (T * 2, "2*tokens"), (B * H * W, "batch*height*width")],
)  # fmt: skip
def test_sizes_read_as_one_would_write_them(size, text):
    assert str(CODE.dim(size)) == text


@given(st.lists(st.integers(0, 20_000), max_size=40))
def test_the_primes_chosen_divide_no_parameter(sizes):
    blocked = {prime for prime in _PRIMES if any(size and size % prime == 0 for size in sizes)}
    if len(_PRIMES) - len(blocked) < 4:
        with pytest.raises(ExportError, match="Expected four primes that divide no parameter"):
            SizeCode.avoiding(sizes, 8)
        return
    code = SizeCode.avoiding(sizes, 8)
    chosen = [code.batch, code.height, code.width, code.tokens]
    assert len(set(chosen)) == 4
    assert not any(size and size % prime == 0 for size in sizes for prime in chosen)


def test_taken_primes_are_skipped():
    assert SizeCode.avoiding([13 * 4, 19, 320], 8) == SizeCode(17, 23, 29, 31, 8)


def test_a_model_that_takes_all_primes_is_refused():
    with pytest.raises(ExportError) as caught:
        SizeCode.avoiding([math.prod(_PRIMES[:-3])], 8)
    text = str(caught.value)
    assert "Expected four primes that divide no parameter dimension of the model" in text
    assert "only [83, 89, 97] of" in text


LONGER = SizeCode.avoiding([320, 768], 4, one_more=True)


def test_one_token_more_is_marked_by_a_prime_of_its_own():
    assert SizeCode(13, 17, 23, 37, 4, 19) == LONGER
    assert LONGER.is_coded(LONGER.tokens + 1)
    assert not CODE.has_one_more(CODE.tokens + 1)
    with pytest.raises(ExportError, match="Expected four primes"):
        SizeCode.avoiding([19 * 31 * 37], 4, one_more=True)  # halves of 38, 62, 74: all are taken


# -- generalize ------------------------------------------------------------------------------------


def value(name, *shape, dtype=None):
    kind = ir.TensorType(dtype or ir.DataType.FLOAT)
    return ir.Value(name=name, shape=ir.Shape(list(shape)), type=kind)


def constant(name, numbers):
    tensor = ir.tensor(np.array(numbers, np.int64), name=name)
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype),
                    shape=ir.Shape(tensor.shape))  # fmt: skip


def graph_of(op_type, inputs, output, numbers, extra=()):
    """One node ``op_type`` with a constant second input."""
    shape = constant("target", numbers)
    node = ir.Node("", op_type, [inputs[0], shape, *extra], outputs=[output])
    return ir.Graph(
        list(inputs), [output], nodes=[node], initializers=[shape], opset_imports={"": 22}, name="g"
    )


def reshape(source, target):
    """Generalise one Reshape from shape to shape; returns the graph."""
    graph = graph_of("Reshape", [value("x", *source)], value("y", *target), target)
    generalize(graph, CODE)
    return graph


def targets(graph):
    (node,) = (node for node in graph if node.op_type == "Reshape")
    const = node.inputs[1].const_value
    return None if const is None else const.numpy().tolist()


def test_an_equal_dimension_is_copied_and_one_left_over_is_inferred():
    assert targets(reshape((B, 64, H, W), (B, 64, H * W))) == [0, 64, -1]
    assert targets(reshape((B, H * W, 64), (B, H * W, 8, 8))) == [0, 0, 8, 8]


def test_an_uncoded_dimension_stays_a_number():
    assert targets(reshape((4, 6), (8, 3))) == [8, 3]


def test_one_token_more_is_inferred_where_it_is_no_copy():
    more = LONGER.tokens + 1
    source, target = (13, 4, more, 8), (13 * 4, more, 8)
    graph = graph_of("Reshape", [value("x", *source)], value("y", *target), target)
    generalize(graph, LONGER)
    short = np.arange(3 * 4 * 6 * 8, dtype=np.float32).reshape(3, 4, 6, 8)
    np.testing.assert_array_equal(run(graph, short), short.reshape(12, 6, 8))


def test_two_sums_in_a_reshape_are_refused_by_the_node():
    more = LONGER.tokens + 1
    target = (more, more, 13)
    graph = graph_of("Reshape", [value("x", 13, more, more)], value("y", *target), target)
    generalize(graph, LONGER)  # the second is a copy
    graph = graph_of("Reshape", [value("x", 13, more * more)], value("y", *target), target)
    with pytest.raises(ExportError, match="Reshape 'y' needs two sizes of tokens \\+ 1"):
        generalize(graph, LONGER)


@pytest.mark.parametrize(("parts", "passes"), [((23, 1), False), ((23, 23), True), ((4, 1), True)])
def test_a_join_to_a_size_that_cannot_be_read_is_refused_by_the_node(parts, passes):
    """Its sum would be taken for a number of its own, right for one prompt length only."""
    inputs = [value(f"x{i}", B, size) for i, size in enumerate(parts)]
    output = value("y", B, sum(parts))
    node = ir.Node("", "Concat", inputs, [ir.AttrInt64("axis", 1)], outputs=[output])
    graph = ir.Graph(inputs, [output], nodes=[node], opset_imports={"": 22}, name="g")
    if passes:
        generalize(graph, CODE)
    else:
        with pytest.raises(ExportError, match=r"Concat 'y' joins sizes \[23, 1\], of which some"):
            generalize(graph, CODE)


def run(graph, source):
    onnx = pytest.importorskip("onnx")
    evaluator = pytest.importorskip("onnx.reference")
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(model)
    return evaluator.ReferenceEvaluator(model).run(None, {"x": source})[0]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_dimension_further_on_is_computed_from_an_input(batch):
    graph = reshape((B, 8, H, W), (B * H, 8, W))
    assert targets(graph) is None
    made = run(graph, np.zeros((batch, 8, 12, 20), np.float32))
    assert made.shape == (batch * 12, 8, 20)
    assert [str(size) for size in graph.outputs[0].shape] == ["batch*height", "8", "width"]


def test_a_fraction_of_an_axis_is_computed_too():
    graph = reshape((B, 8, H, W), (2 * B, H // 4, 16 * W))
    made = run(graph, np.zeros((3, 8, 12, 20), np.float32))
    assert made.shape == (6, 3, 320)


def test_a_size_that_no_input_has_is_refused_by_the_node():
    with pytest.raises(ExportError) as caught:
        reshape((B * T, H), (H, B, T))
    text = str(caught.value)
    assert "Reshape 'y' needs batch, but no input of its segment has the axis 'batch'" in text


def test_an_expand_to_its_own_shape_is_dropped():
    middle, output = value("middle", B, 4), value("y", B, 4)
    graph = graph_of("Expand", [value("x", B, 4)], middle, [B, 4])
    graph.append(ir.Node("", "Relu", [middle], outputs=[output]))
    graph.outputs[0] = output
    generalize(graph, CODE)
    assert [(node.op_type, node.inputs[0].name) for node in graph] == [("Relu", "x")]
    assert not graph.initializers


def test_a_real_expand_to_a_coded_shape_is_refused_by_the_node():
    graph = graph_of("Expand", [value("x", 1, 4)], value("y", B, 4), [B, 4])
    with pytest.raises(ExportError) as caught:
        generalize(graph, CODE)
    assert str(caught.value) == (
        "Expand 'y' takes [13, 4], which depends on the input's size; only Reshape and Expand may. "
        "Please report the model's config."
    )


@pytest.mark.parametrize("op_type", ["Tile", "Slice", "Gather"])
def test_a_coded_constant_elsewhere_is_refused_by_the_node(op_type):
    graph = graph_of(op_type, [value("x", B, 4)], value("cut", B, 4), [H * 2])
    with pytest.raises(ExportError, match=rf"{op_type} 'cut' takes \[136\], which depends on"):
        generalize(graph, CODE)


def test_plain_constants_pass():
    graph = graph_of("Tile", [value("x", B, 4)], value("y", B, 8), [1, 2])
    generalize(graph, CODE)
    assert [node.op_type for node in graph] == ["Tile"]


def test_inputs_and_outputs_get_symbolic_shapes():
    graph = reshape((B, 8, H, W), (B, 8, H * W))
    assert [str(size) for size in graph.inputs[0].shape] == ["batch", "8", "height", "width"]
    assert [str(size) for size in graph.outputs[0].shape] == ["batch", "8", "height*width"]


def test_a_value_without_a_static_shape_is_refused_by_name():
    graph = graph_of("Reshape", [ir.Value(name="x")], value("y", B, 8), [B, 8])
    with pytest.raises(ExportError, match=r"Expected a static shape on every .* 'x' has none"):
        generalize(graph, CODE)
