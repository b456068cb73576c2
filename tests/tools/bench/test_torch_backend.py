"""PyTorch as an engine library: every segment and part as ONNX Runtime runs it."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import onnx  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402

from blockcache.runtime import EngineError  # noqa: E402
from blockcache.runtime.engines.choice import require_members  # noqa: E402
from blockcache.runtime.engines.ort import OrtBackend  # noqa: E402
from blockcache.tools.bench import onnx_in_torch  # noqa: E402
from blockcache.tools.bench.onnx_in_torch import OPERATORS, TorchGraph  # noqa: E402
from blockcache.tools.bench.torch_backend import HostPlace, TorchBackend  # noqa: E402
from blockcache.tools.check.bound import bound_segment  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def demo_bundle(tmp_path_factory):
    """The shipped model, no search."""
    from blockcache.export import CompileOptions, PresetOptions, compile_model
    from blockcache.tools.sources.models import load_source

    options = CompileOptions(presets=(PresetOptions.parse("ddim:4"),))
    folder = tmp_path_factory.mktemp("demo") / "bundle"
    return compile_model(load_source("demo"), folder, options).bundle


@pytest.fixture(params=["sd", "sdxl", "class-conditioned", "demo", "pipeline"])
def bundle(request):
    if request.param == "demo":
        return request.getfixturevalue("demo_bundle")
    if request.param == "pipeline":
        return request.getfixturevalue("pipeline_bundle")("sdxl")
    return request.getfixturevalue("compiled")(request.param, 2 if request.param == "sdxl" else 1)[
        1
    ]


def test_every_segment_and_part_is_within_1e_5_of_onnxruntime(bundle):
    sizes = dataclasses.replace(bundle.model.sizes, batch=2)
    engines = TorchBackend(HostPlace()), OrtBackend(threads=1)
    for segment in (*bundle.segments, *bundle.manifest.parts):
        rng = np.random.default_rng(0)
        inputs = {
            spec.name: rng.integers(0, 5, spec.shape(sizes))
            if spec.dtype == "int64"
            else rng.standard_normal(spec.shape(sizes), np.float32)
            for spec in segment.inputs
        }
        made = []
        for backend in engines:
            tensors, launch = bound_segment(backend, bundle, segment, sizes)
            for name, values in inputs.items():
                backend.device.upload(tensors[name], values)
            launch()
            made.append({o.name: backend.device.download(tensors[o.name]) for o in segment.outputs})
        for name, expected in made[1].items():
            error = np.abs(made[0][name] - expected).max() / max(np.abs(expected).max(), 1e-30)
            assert error <= 1e-5, (segment.name, name, error)


def test_a_bfloat16_segment_runs_within_its_rounding(compiled):
    """Its weights are read as their bits."""
    made = {}
    for precision in ("float32", "bfloat16"):
        _, bundle = compiled("sd", 1, precision)
        segment = next(each for each in bundle.segments if each.name == "block_00")
        graph, rng = TorchGraph(bundle.segment_path(segment), CPU), np.random.default_rng(0)
        inputs = {
            spec.name: torch.from_numpy(
                rng.standard_normal(spec.shape(bundle.model.sizes), np.float32)
            ).to(getattr(torch, spec.dtype))
            for spec in segment.inputs
        }
        (output,) = graph.run(inputs).values()
        assert output.dtype == getattr(torch, segment.outputs[0].dtype)
        made[precision] = output.float().numpy()
    exact, rounded = made["float32"], made["bfloat16"]
    assert 0 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.02


def test_it_has_all_that_a_backend_must_have():
    require_members(TorchBackend(HostPlace()))


def one_node(folder, op, inputs, weights=(), **attributes):
    """A graph of a single node."""
    node = helper.make_node(op, [*inputs, *(w.name for w in weights)], ["y"], "n", **attributes)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in (*inputs, "y")]
    graph = helper.make_graph([node], "g", values[:-1], values[-1:], list(weights))
    onnx.save(helper.make_model(graph), folder / "one.onnx")
    return TorchGraph(folder / "one.onnx", CPU)


def test_an_unknown_operator_is_named(tmp_path):
    with pytest.raises(EngineError, match=r"got ONNX's 'Erf' in one.onnx \(node 'n'\). Add it to"):
        one_node(tmp_path, "Erf", ["x"])


def test_an_option_that_no_graph_has_is_named(tmp_path):
    with pytest.raises(EngineError, match=r"Resize with mode=b'nearest', got b'cubic' in one.onnx"):
        one_node(tmp_path, "Resize", ["x"], mode="cubic")


def integers(*values):
    return helper.make_tensor("sizes", TensorProto.INT64, [len(values)], values)


@pytest.mark.parametrize(
    ("op", "weights", "attributes", "expected"),
    [
        ("Reshape", [integers(0, 2, -1)], {}, lambda x: x.reshape(2, 2, -1)),
        ("Transpose", [], {"perm": [2, 0, 1]}, lambda x: x.transpose(2, 0, 1)),
        ("Squeeze", [], {}, lambda x: x),
        ("Unsqueeze", [integers(-1, 0)], {}, lambda x: x[None, ..., None]),
        ("Expand", [integers(3, 1, 1, 1)], {}, lambda x: np.broadcast_to(x, (3, 2, 4, 6))),
        ("Gather", [integers(3, 0)], {"axis": 1}, lambda x: x[:, [3, 0]]),
    ],
)
def test_operators_by_numpys_words(tmp_path, op, weights, attributes, expected):
    x = np.arange(48, dtype=np.float32).reshape(2, 4, 6)
    made = one_node(tmp_path, op, ["x"], weights, **attributes).run({"x": torch.from_numpy(x)})
    np.testing.assert_array_equal(made["y"].numpy(), expected(x))


def test_values_that_nobody_reads_any_more_are_let_go(tmp_path, monkeypatch):
    names = ["x", "a", "b", "y"]
    nodes = [helper.make_node("Sin", [read], [made]) for read, made in itertools.pairwise(names)]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("x", "y")]
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:])),
        tmp_path / "g.onnx",
    )
    graph = TorchGraph(tmp_path / "g.onnx", CPU)
    assert [step.last_read for step in graph._steps] == [("x",), ("a",), ("b",)]


def test_no_operator_is_there_for_nothing(compiled, pipeline_bundle):
    """Each stands in a graph of these models."""
    found = set()
    for bundle in (compiled("sd", 1, "bfloat16")[1], pipeline_bundle("sdxl"),
                   compiled("class-conditioned")[1]):  # fmt: skip
        for segment in (*bundle.segments, *bundle.manifest.parts):
            graph = onnx.load(bundle.segment_path(segment), load_external_data=False).graph
            found |= {node.op_type for node in graph.node}
    assert found == set(OPERATORS)
    assert set(onnx_in_torch._ONLY) <= found
