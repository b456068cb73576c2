"""Work counted on graphs: hand-made ones by hand, exported ones against the exporter's count."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

from onnx import TensorProto, helper

from blockcache.export.graph.passes.concrete import concrete_graph
from blockcache.export.graph.work import Fusion, graph_work
from blockcache.runtime.plan import Sizes

SIZES = Sizes(batch=2, height=16, width=24, tokens=7)
KINDS = ["sd", "sdxl", "two-layers", "one-level", "class-conditioned"]


def saved(tmp_path, nodes, inputs, outputs, weights=None):
    """A graph in a file; shapes are of numbers and symbols."""
    sides = [
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in side.items()]
        for side in (inputs, outputs)
    ]
    constants = [
        helper.make_tensor(name, kind, array.shape, array.flatten().tolist())
        for name, array in (weights or {}).items()
        for kind in [TensorProto.INT64 if array.dtype == np.int64 else TensorProto.FLOAT]
    ]
    graph = helper.make_graph(nodes, "made", *sides, constants)
    path = tmp_path / "made.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)])
    path.write_bytes(model.SerializeToString())
    return path


def work_of(path, fusion=Fusion.COMPILER, sizes=SIZES, item_bytes=2):
    return graph_work(concrete_graph(path, sizes), fusion, item_bytes)


def test_an_activation_behind_a_convolution_is_no_launch_of_its_own(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["y"], ["s"]),
        helper.make_node("Mul", ["y", "s"], ["silu"]),
    ]
    path = saved(
        tmp_path,
        nodes,
        {"x": ["batch", 4, "height", "width"]},
        {"silu": ["batch", 8, "height", "width"]},
        {"w": np.zeros((8, 4, 3, 3), np.float32)},
    )
    pixels = 2 * 16 * 24
    work = work_of(path)
    assert work.flops.tolist() == [2 * pixels * 8 * 4 * 9]
    # Input, weight and output; the Mul joins two activations and reads one of them again.
    assert work.bytes.tolist() == [2 * (pixels * (4 + 8 + 8) + 8 * 4 * 9)]
    plain = work_of(path, Fusion.NONE, item_bytes=4)
    assert plain.flops.tolist() == [2 * pixels * 8 * 4 * 9, 0, 0]
    assert plain.bytes.tolist() == [
        4 * (pixels * (4 + 8) + 8 * 4 * 9), 4 * pixels * 16, 4 * pixels * 24,
    ]  # fmt: skip


def attention(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["q", "k"], ["scores"]),
        helper.make_node("Mul", ["scores", "scale"], ["scaled"]),
        helper.make_node("Softmax", ["scaled"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["out"]),
    ]
    inputs = {"q": ["batch", "height", 32], "k": ["batch", 32, "tokens"]}
    inputs["v"] = ["batch", "tokens", 32]
    scale = {"scale": np.zeros((), np.float32)}
    return saved(tmp_path, nodes, inputs, {"out": ["batch", "height", 32]}, scale)


def test_attention_is_one_launch_whose_scores_stay_on_chip(tmp_path):
    work = work_of(attention(tmp_path))
    assert work.flops.tolist() == [2 * 2 * (2 * 16 * 7 * 32)]
    q = out = 2 * 16 * 32
    k = v = 2 * 7 * 32
    assert work.bytes.tolist() == [2 * (q + k + v + out + 1)]


def test_attention_node_by_node_moves_its_scores(tmp_path):
    path = attention(tmp_path)
    work = work_of(path, Fusion.NONE)
    assert len(work.flops) == 4
    assert work.flops.sum() == work_of(path).flops.sum()
    scores = 2 * 16 * 7
    assert work.bytes.sum() - work_of(path).bytes.sum() == 2 * 6 * scores


def test_a_shape_computed_from_the_input_is_folded(tmp_path):
    nodes = [
        helper.make_node("Shape", ["x"], ["h"], start=2, end=3),
        helper.make_node("Shape", ["x"], ["w"], start=3, end=4),
        helper.make_node("Mul", ["h", "w"], ["area"]),
        helper.make_node("Div", ["area", "two"], ["half"]),
        helper.make_node("Concat", ["minus", "half"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
    ]
    path = saved(
        tmp_path,
        nodes,
        {"x": ["batch", 4, "height/2", "width"]},
        {"y": ["8*batch", "height*width/4"]},
        {"two": np.array([2]), "minus": np.array([-1])},
    )
    graph = concrete_graph(path, SIZES)
    assert [node.op_type for node in graph] == ["Reshape"]
    assert graph.outputs[0].shape.numpy() == (16, 8 * 24 // 2)


@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_a_bundle_equal_the_exporters_count(compiled, kind):
    _, bundle = compiled(kind)
    for segment in bundle.segments:
        path = bundle.segment_path(segment)
        for fusion in Fusion:
            work = work_of(path, fusion, bundle.model.sizes)
            assert work.flops.sum() == segment.flops, (segment.name, fusion)
            assert (work.bytes > 0).all()


def test_every_attention_of_a_bundle_is_recognised(compiled):
    """Two a transformer; what is left of Softmax would be launches of their own."""
    _, bundle = compiled("sd")
    (whole,) = (s for s in bundle.segments if s.role == "whole")
    graph = concrete_graph(bundle.segment_path(whole), bundle.model.sizes)
    softmaxes = [node for node in graph if node.op_type == "Softmax"]
    matmuls = [node for node in graph if node.op_type in ("MatMul", "Gemm", "Conv")]
    work = graph_work(graph, Fusion.COMPILER, 2)
    assert len(softmaxes) == 2 * len(bundle.model.blocks)
    assert np.count_nonzero(work.flops) == len(matmuls) - len(softmaxes)
