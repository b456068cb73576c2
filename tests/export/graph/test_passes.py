"""Graph passes: small graphs by hand, then the tiny exported model."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from blockcache.runtime import ExportError
from blockcache.runtime.plan import block_output_name, coefficient_names, row_specs

ir = pytest.importorskip("onnx_ir")
from blockcache.export.graph.passes.align import align  # noqa: E402
from blockcache.export.graph.passes.hoist import classify  # noqa: E402
from blockcache.export.graph.passes.simplify import simplify  # noqa: E402
from blockcache.export.graph.passes.split import split  # noqa: E402

FLOAT = ir.DataType.FLOAT
SCOPES = "pkg.torch.onnx.name_scopes"


class Builder:
    """A graph written down node by node; every value has the shape [2, 4, 8, 8] unless given."""

    def __init__(self, *inputs):
        self.inputs = [self.value(name) for name in inputs]
        self.by_name = {value.name: value for value in self.inputs}
        self.nodes, self.constants = [], []

    @staticmethod
    def value(name, shape=(2, 4, 8, 8), dtype=FLOAT):
        return ir.Value(name=name, shape=ir.Shape(list(shape)), type=ir.TensorType(dtype))

    def add(self, name, op_type, *inputs, shape=(2, 4, 8, 8), scope="", dtype=FLOAT, **ints):
        output = self.value(name, shape, dtype)
        attributes = [ir.AttrInt64s(key, number) for key, number in ints.items()]
        node = ir.Node("", op_type, [self.by_name[i] for i in inputs], attributes, outputs=[output])
        node.metadata_props[SCOPES] = repr(["", *(["unet." + scope] if scope else []), name])
        self.nodes.append(node)
        self.by_name[name] = output
        return self

    def constant(self, name, array):
        tensor = ir.tensor(np.asarray(array), name=name)
        self.by_name[name] = ir.Value(
            name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape
        )
        self.constants.append(self.by_name[name])
        return self

    def graph(self, *outputs):
        return ir.Graph(
            self.inputs, [self.by_name[name] for name in outputs], nodes=self.nodes,
            initializers=self.constants, opset_imports={"": 22}, name="g",
        )  # fmt: skip


def classes_of(graph, conditions=("prompt",)):
    return {node.outputs[0].name: kind for node, kind in classify(graph, conditions).items()}


# -- hoist -----------------------------------------------------------------------------------------


def small():
    return Builder("sample", "timestep", "prompt").constant("half", np.float32(0.5))


def test_every_value_is_classed_by_what_it_depends_on():
    graph = (
        small()
        .add("table", "Identity", "half")
        .add("embedding", "Sin", "timestep")
        .add("keys", "Relu", "prompt")
        .add("both", "Concat", "embedding", "keys")
        .add("projected", "Relu", "both")
        .add("x", "Add", "sample", "projected")
        .add("y", "Add", "x", "keys")
        .add("z", "Add", "y", "embedding")
        .add("out", "Add", "z", "table")
        .graph("out")
    )
    assert classes_of(graph) == {
        "table": "constant", "embedding": "time", "keys": "prompt", "both": "condition",
        "projected": "condition", "x": "loop", "y": "loop", "z": "loop", "out": "loop",
    }  # fmt: skip


def test_trailing_layout_and_scalar_scaling_stay_in_the_loop():
    graph = (
        small()
        .add("keys", "Relu", "prompt")
        .add("flipped", "Transpose", "keys", perm=[0, 1, 3, 2])
        .add("scaled", "Mul", "flipped", "half")
        .add("out", "MatMul", "sample", "scaled")
        .graph("out")
    )
    found = classes_of(graph)
    assert found == {"keys": "prompt", "flipped": "loop", "scaled": "loop", "out": "loop"}


def test_layout_between_hoisted_operations_is_hoisted_with_them():
    graph = (
        small()
        .add("keys", "Relu", "prompt")
        .add("flipped", "Transpose", "keys", perm=[0, 1, 3, 2])
        .add("more", "Relu", "flipped")
        .add("out", "Add", "sample", "more")
        .graph("out")
    )
    assert classes_of(graph)["flipped"] == "prompt"


# -- align and split -------------------------------------------------------------------------------

PATHS = ["down.attn", "up.attn"]


def two_blocks(dtype=FLOAT):
    """conv_in, block, skip and scale, block, out; the skip from conv_in crosses both blocks."""
    made = Builder("sample", "timestep", "prompt")
    for value in made.inputs:
        value.type = ir.TensorType(dtype)
    return (
        made
        .add("time", "Sin", "timestep", dtype=dtype)
        .add("keys", "Relu", "prompt", dtype=dtype)
        .add("conv_in", "Relu", "sample", dtype=dtype)
        .add("x0", "Add", "conv_in", "time", dtype=dtype)
        .add("c0_inner", "Mul", "x0", "keys", scope="down.attn.proj", dtype=dtype)
        .add("c0", "Relu", "c0_inner", scope="down.attn", dtype=dtype)
        .add("y0", "Add", "c0", "x0", scope="down.attn", dtype=dtype)
        .add("x1", "Sigmoid", "y0", dtype=dtype)
        .add("c1", "Mul", "x1", "keys", scope="up.attn", dtype=dtype)
        .add("y1", "Add", "c1", "x1", scope="up.attn", dtype=dtype)
        .add("out", "Add", "y1", "conv_in", dtype=dtype)
        .graph("out")
    )  # fmt: skip


def pieces_of(graph, outputs=1):
    blocks = align(graph, PATHS, outputs)
    return {p.name: p for p in split(graph, blocks, classify(graph, ["prompt"]))}


def names(values):
    return [value.name for value in values]


def test_a_small_graph_is_cut_at_its_blocks():
    pieces = pieces_of(two_blocks())
    assert list(pieces) == [
        "time", "prompt", "trunk_00", "block_00", "trunk_01", "block_01", "trunk_02",
    ]  # fmt: skip
    assert [p.role for p in pieces.values()] == [
        "time", "prompt", "trunk", "block", "trunk", "block", "trunk",
    ]  # fmt: skip
    assert [p.block for p in pieces.values()] == [None, None, None, 0, None, 1, None]
    assert names(pieces["block_00"].graph.outputs) == ["block_0"]
    assert names(pieces["trunk_02"].graph.outputs) == ["out"]
    assert sorted(names(pieces["trunk_01"].graph.inputs)) == [
        "block_0", "scale_0", "shift_0", "trunk_0_1",
    ]  # fmt: skip


def test_every_operation_lands_in_one_piece():
    graph = two_blocks()
    align(graph, PATHS, 1)
    whole = Counter(node.op_type for node in graph)
    cut = Counter(
        node.op_type for piece in pieces_of(two_blocks()).values() for node in piece.graph
    )
    assert cut == whole


@pytest.mark.parametrize("outputs", [1, 2])
def test_the_alignment_is_read_by_the_trunk_behind_its_block(outputs):
    pieces = pieces_of(two_blocks(), outputs)
    for k in range(2):
        wanted = {*coefficient_names(k, outputs), block_output_name(k)}
        wanted |= {f"block_{k}_before"} if outputs == 2 else set()
        readers = {p.name for p in pieces.values() if wanted & set(names(p.graph.inputs))}
        assert readers == {f"trunk_{k + 1:02d}"}
        assert wanted <= set(names(pieces[f"trunk_{k + 1:02d}"].graph.inputs))


def evaluate(graph, feeds):
    onnx = pytest.importorskip("onnx.reference")
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    return onnx.ReferenceEvaluator(model).run(None, feeds)


def test_the_pieces_compute_what_the_graph_computes():
    rng = np.random.default_rng(0)
    x = {n: rng.standard_normal((2, 4, 8, 8), np.float32) for n in ("sample", "timestep", "prompt")}
    (expected,) = evaluate(two_blocks(), x)
    values = dict(x)
    for k in range(2):
        scale, shift = coefficient_names(k, 1)
        values[scale] = np.ones((1, 4, 1, 1), np.float32)
        values[shift] = np.zeros((1, 4, 1, 1), np.float32)
    for piece in pieces_of(two_blocks()).values():
        feeds = {name: values[name] for name in names(piece.graph.inputs)}
        values |= zip(names(piece.graph.outputs), evaluate(piece.graph, feeds), strict=True)
    np.testing.assert_allclose(values["out"], expected, rtol=1e-6)


@pytest.mark.parametrize("outputs", [1, 2])
def test_the_aligned_sum_is_scale_times_c_plus_shift(outputs):
    rng = np.random.default_rng(1)
    graph = (
        Builder("sample", "x")
        .add("c", "Relu", "sample", scope="mid")
        .add("y", "Add", "c", "x", scope="mid")
        .add("out", "Identity", "y")
        .graph("out")
    )
    align(graph, ["mid"], outputs)
    feeds = {
        value.name: rng.standard_normal([int(n) for n in value.shape]).astype(np.float32)
        for value in graph.inputs
    }
    expected = feeds["x"] + feeds["scale_0"] * feeds["sample"].clip(0) + feeds["shift_0"]
    if outputs == 2:
        expected += feeds["before_0"] * feeds["block_0_before"]
    np.testing.assert_allclose(evaluate(graph, feeds)[0], expected, rtol=1e-5, atol=1e-6)


def test_half_precision_sums_are_formed_in_float32():
    graph = two_blocks(ir.DataType.FLOAT16)
    for block in align(graph, PATHS, 1):
        for node in block.sum:
            if node.op_type in ("Mul", "Add"):
                assert {value.dtype for value in node.inputs} == {FLOAT}
        assert block.sum[-1].outputs[0].dtype == ir.DataType.FLOAT16


def test_a_block_without_its_residual_add_is_refused_by_path():
    with pytest.raises(ExportError) as caught:
        align(two_blocks(), [*PATHS, "mid.attn"], 1)
    assert str(caught.value).startswith("Expected one residual Add owned by mid.attn, found 0.")


def test_blocks_that_do_not_follow_each_other_are_refused():
    """The second block stands first in the list: no chain in the order given."""
    graph = two_blocks()
    blocks = align(graph, PATHS[::-1], 1)
    with pytest.raises(ExportError, match="the blocks of this U-Net do not lie on one chain"):
        split(graph, blocks, classify(graph, ["prompt"]))


# -- simplify --------------------------------------------------------------------------------------


def transposed(perm=(0, 2, 1), flat=(6, 5, 4), result=(2, 3, 4, 5)):
    made = Builder("k")
    made.inputs[0].shape = ir.Shape([2, 3, 5, 4])
    turned = [flat[i] for i in perm]
    return (
        made.constant("flat", np.array(flat, np.int64))
        .constant("back", np.array(result, np.int64))
        .add("a", "Reshape", "k", "flat", shape=flat)
        .add("b", "Transpose", "a", perm=list(perm), shape=turned)
        .add("c", "Reshape", "b", "back", shape=result)
        .add("out", "Relu", "c", shape=result)
        .graph("out")
    )


def test_a_transpose_through_three_dimensions_becomes_one():
    k = np.arange(120, dtype=np.float32).reshape(2, 3, 5, 4)
    (expected,) = evaluate(transposed(), {"k": k})
    graph = transposed()
    assert simplify(graph) == 1
    assert [node.op_type for node in graph] == ["Transpose", "Relu"]
    np.testing.assert_array_equal(evaluate(graph, {"k": k})[0], expected)
    assert simplify(graph) == 0


@pytest.mark.parametrize(
    "other",
    [{"perm": (1, 2, 0)}, {"flat": (2, 15, 4), "result": (2, 4, 3, 5)}, {"result": (3, 2, 4, 5)}],
)
def test_what_only_looks_alike_is_left_alone(other):
    graph = transposed(**other)
    before = [node.op_type for node in graph]
    assert simplify(graph) == 0
    assert [node.op_type for node in graph] == before


# -- the tiny exported model -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(compiled):
    return compiled("sd")


def test_the_flops_of_the_segments_are_those_of_the_whole(tiny):
    _, bundle = tiny
    whole = next(s.flops for s in bundle.segments if s.role == "whole")
    # The time segment is evaluated once for all rows in the graph, as the whole model does.
    assert sum(s.flops for s in bundle.segments if s.role != "whole") == whole > 0


def test_there_is_one_segment_a_block_in_order(tiny):
    model, bundle = tiny
    blocks = [s for s in bundle.segments if s.role == "block"]
    assert [s.block for s in blocks] == list(range(len(model.blocks)))
    assert [[t.name for t in s.outputs] for s in blocks] == [
        [block_output_name(k)] for k in range(len(model.blocks))
    ]
    channels = [int(s.outputs[0].dims[1].coefficient) for s in blocks]
    assert channels == [block.channels for block in model.blocks]


def test_segments_alternate_trunk_and_block(tiny):
    model, bundle = tiny
    loop = [s.role for s in bundle.segments if s.role in ("trunk", "block")]
    assert loop == ["trunk", *["block", "trunk"] * len(model.blocks)]


def test_a_boundary_tensor_is_written_once_and_before_it_is_read(tiny):
    _, bundle = tiny
    segments = [s for s in bundle.segments if s.role != "whole"]
    written = Counter(t.name for s in segments for t in s.outputs)
    assert set(written.values()) == {1}
    given = {"sample", "timestep", *(c.name for c in bundle.model.conditions)}
    given |= {name for k in range(len(bundle.model.blocks)) for name in coefficient_names(k, 1)}
    known = set(given)
    for segment in segments:
        read = {t.name for t in segment.inputs}
        assert read <= known, segment.name
        known |= {t.name for t in segment.outputs}
    assert given <= {t.name for s in segments for t in s.inputs}


def test_a_tensor_is_described_alike_by_writer_and_readers(tiny):
    _, bundle = tiny
    segments = [s for s in bundle.segments if s.role != "whole"]
    written = {t.name: t for s in segments for t in s.outputs}
    for segment in segments:
        for tensor in segment.inputs:
            producer = written.get(tensor.name, tensor)
            assert tensor == producer


def test_what_a_step_hands_to_segments_has_the_batch_as_its_first_axis(compiled):
    _, bundle = compiled("sdxl", outputs=2, cuts=(0,))
    rows = row_specs(bundle.model, bundle.segments)
    assert {spec.name.split("_")[0] for spec in rows} == {"time", "scale", "before", "shift"}
    assert {str(spec.dims[0]) for spec in rows} == {"batch"}


def test_alignment_inputs_are_read_by_exactly_one_trunk(tiny):
    _, bundle = tiny
    for k in range(len(bundle.model.blocks)):
        for name in (*coefficient_names(k, 1), block_output_name(k)):
            readers = [s.role for s in bundle.segments if name in {t.name for t in s.inputs}]
            assert readers == ["trunk"], name


def test_nothing_that_depends_on_the_prompt_alone_runs_in_the_loop(tiny):
    _, bundle = tiny
    for segment in bundle.segments:
        if segment.role in ("trunk", "block"):
            assert not {"encoder_hidden_states", "timestep"} & {t.name for t in segment.inputs}


def test_weights_lie_once_in_the_shared_file(tiny):
    model, bundle = tiny
    parameters = sum(tensor.numel() * 4 for tensor in model.unet.parameters())
    size = bundle.weights.bytes
    assert parameters * 0.98 <= size <= parameters * 1.1  # small ones stay inside the graphs
    graphs = sum(path.stat().st_size for path in bundle.folder.glob("segments/*/*.onnx"))
    assert graphs < parameters * 0.5
