"""The wire reader, held against the onnx package: real segments, made-up graphs, damaged bytes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockcache.runtime import BundleFormatError, TensorSpec
from blockcache.runtime.bundles.onnx_signature import OnnxSignature, WeightsRange, read_signature
from blockcache.runtime.plan import Dim

onnx = pytest.importorskip("onnx")
helper, TensorProto = onnx.helper, onnx.TensorProto

DTYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
}
NAMES = {number: name for name, number in DTYPES.items()}


def read_by_onnx(content):
    """The same signature, by the onnx package."""
    graph = onnx.load_from_string(content).graph

    def specs(values):
        return tuple(
            TensorSpec(
                v.name,
                NAMES[v.type.tensor_type.elem_type],
                tuple(Dim.parse(d.dim_param or d.dim_value) for d in v.type.tensor_type.shape.dim),
            )
            for v in values
        )

    places = [
        (tensor.name, {entry.key: entry.value for entry in tensor.external_data})
        for tensor in graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    ]
    weights = tuple(
        WeightsRange(name, place["location"], int(place["offset"]), int(place["length"]))
        for name, place in places
    )
    return OnnxSignature(specs(graph.input), specs(graph.output), weights)


@pytest.mark.parametrize(
    ("kind", "outputs", "precision"),
    [("sd", 1, "float32"), ("class-conditioned", 2, "float32"), ("sd", 1, "bfloat16")],
)
def test_segments_are_read_as_onnx_reads_them(compiled, kind, outputs, precision):
    _, bundle = compiled(kind, outputs, precision)
    for segment in bundle.segments:
        content = bundle.segment_path(segment).read_bytes()
        found = read_signature(content, segment.file)
        assert found == read_by_onnx(content)
        assert (found.inputs, found.outputs) == (segment.inputs, segment.outputs)
        assert found.weights


dims = st.lists(
    st.one_of(st.integers(1, 2**40), st.sampled_from(["batch", "height/2", "8*batch"])), max_size=5
)
tensors = st.lists(
    st.tuples(st.text(min_size=1, max_size=8), st.sampled_from(sorted(DTYPES)), dims), max_size=4
)


def external(name, shape, dtype=TensorProto.FLOAT, **place):
    """A weight whose content lies in another file."""
    tensor = TensorProto(name=name, data_type=dtype, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def model(inputs=(), outputs=(), initializers=(), nodes=()):
    """The bytes of a model of one graph."""
    values = [
        [helper.make_tensor_value_info(name, DTYPES[dtype], shape) for name, dtype, shape in side]
        for side in (inputs, outputs)
    ]
    graph = helper.make_graph(list(nodes), "g", *values, initializer=list(initializers))
    content: bytes = helper.make_model(graph).SerializeToString()
    return content


@given(tensors, tensors, st.lists(st.tuples(dims, st.integers(0, 2**60)), max_size=3))
def test_made_up_graphs_are_read_as_onnx_reads_them(inputs, outputs, weights):
    initializers = []
    for index, (shape, offset) in enumerate(weights):
        sizes = [size % 1000 for size in shape if isinstance(size, int)]
        length = 4
        for size in sizes:
            length *= size
        initializers.append(
            external(f"w{index}", sizes, location="weights.bin", offset=offset, length=length)
        )
    inline = helper.make_tensor("inline", TensorProto.FLOAT, [2], [1.0, 2.0])
    nodes = [helper.make_node("Add", ["a", "b"], ["c"], alpha=1.5, axes=[1, -1], mode="x")]
    content = model(inputs, outputs, [*initializers, inline], nodes)
    assert read_signature(content, "g.onnx") == read_by_onnx(content)


@pytest.fixture(scope="module")
def segment_bytes(compiled):
    _, bundle = compiled("sd")
    trunk = next(segment for segment in bundle.segments if segment.name == "trunk_01")
    return bundle.segment_path(trunk).read_bytes()


def outcome(content):
    """The signature, or the kind of error; any other error than ours ends the test."""
    try:
        return read_signature(content, "f")
    except BundleFormatError as error:
        return type(error)


@settings(max_examples=150)
@given(st.data())
def test_a_truncated_file_is_refused_or_says_the_same_of_what_is_left(segment_bytes, data):
    """Where the cut falls between two parts of the file, the rest is still a message."""
    length = data.draw(st.integers(0, len(segment_bytes) - 1))
    found = outcome(segment_bytes[:length])
    assert found in (BundleFormatError, read_signature(segment_bytes, "whole"))


@settings(max_examples=300)
@given(st.data())
def test_altered_bytes_never_end_in_a_foreign_error(segment_bytes, data):
    content = bytearray(segment_bytes)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    found = outcome(bytes(content))
    assert found is BundleFormatError or isinstance(found, OnnxSignature)


def refusal(content):
    with pytest.raises(BundleFormatError) as caught:
        read_signature(content, "g.onnx")
    text = str(caught.value)
    start, end = "Expected an ONNX model of blockcache in g.onnx, got one with ", ". Compile again."
    assert text.startswith(start)
    assert text.endswith(end)
    return text.removeprefix(start).removesuffix(end)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "0 graphs, not one"),
        (b"\x0f", "bytes that are no protobuf message"),
        (b"\xff" * 12, "a number that does not end"),
        (b"\x3a\x7f\x00", "an end before its content: the file is truncated"),
        (b"\x3a\x00\x3a\x00", "2 graphs, not one"),
        (b"\x38\x01", "a number where a message belongs"),
        (b"\xca\x01\x00", "the unknown part 25 of a model (a function, or training)"),
    ],
)
def test_bytes_that_are_no_model_say_what_they_are(content, reason):
    assert refusal(content) == reason


WHERE = {"location": "weights.bin", "offset": 0}


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (external("w", [2, 3], **WHERE, length=23), "23 bytes for the weight 'w', whose shape "
         "needs 24"),
        (external("w", [2], **WHERE), "the length '' of the weight 'w'"),
        (external("w", [2], location="f", offset=-1, length=8), "the offset '-1' of the weight "
         "'w'"),
        (external("w", [2], location="f", offset="9" * 30, length=8),
         f"the offset '{'9' * 20}' of the weight 'w'"),
    ],
)  # fmt: skip
def test_a_weight_at_an_impossible_place_is_refused(weight, reason):
    assert refusal(model(initializers=[weight])) == reason


def test_what_would_make_an_engine_library_read_more_is_refused():
    foreign = helper.make_node("EPContext", [], ["x"], domain="com.microsoft")
    assert refusal(model(nodes=[foreign])) == "an operator of the domain 'com.microsoft'"
    branch = helper.make_graph([], "branch", [], [])
    condition = helper.make_node("If", ["c"], ["x"], then_branch=branch, else_branch=branch)
    assert refusal(model(nodes=[condition])) == "a graph in an attribute"


def test_weights_in_attributes_are_seen():
    weight = external("w", [2], location="elsewhere.bin", offset=4, length=8)
    node = helper.make_node("Constant", [], ["x"])
    node.attribute.append(onnx.AttributeProto(name="value", type=4, t=weight))
    found = read_signature(model(nodes=[node]), "g.onnx")
    assert found.weights == (WeightsRange("w", "elsewhere.bin", 4, 8),)


def test_a_boundary_tensor_needs_a_type_and_a_shape():
    value = onnx.ValueInfoProto(name="x")
    graph = onnx.GraphProto(name="g", input=[value])
    content = onnx.ModelProto(graph=graph).SerializeToString()
    assert refusal(content) == "a boundary tensor 'x' without dtype and shape"
    double = helper.make_tensor_value_info("x", TensorProto.DOUBLE, [1])
    content = onnx.ModelProto(graph=onnx.GraphProto(input=[double])).SerializeToString()
    assert refusal(content) == "a boundary tensor 'x' of the element type 11"
    unknown = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])
    content = onnx.ModelProto(graph=onnx.GraphProto(input=[unknown])).SerializeToString()
    assert refusal(content) == "a boundary tensor 'x' of unknown shape"
