"""One builder for every TensorRT: fakes that have no name the libraries' wheels lack."""
# ruff: noqa: N802 (methods of the fakes are named Class_method)

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from blockcache.export.engines import engine as module_under_test
from blockcache.export.engines.engine import Recipe, build_engine
from blockcache.runtime.engines.files import ShapeProfile
from blockcache.runtime.engines.tensorrt_library import Messages, TensorRT, load_library
from blockcache.runtime.errors import ConfigError, EngineError, ExportError
from blockcache.runtime.plan import Dim, Segment, Sizes, TensorSpec

DIMS = tuple(Dim.parse(dim) for dim in ("batch", 8, "height", "width"))
SEGMENT = Segment(
    "trunk_00", "trunk", "trunk_00.onnx",
    (TensorSpec("sample", "bfloat16", DIMS),), (TensorSpec("trunk_0_0", "bfloat16", DIMS),),
)  # fmt: skip
GRAPH = """<ir_version: 9, opset_import: ["" : 22]>
g (bfloat16[N,8,H,W] sample) => (bfloat16[N,8,A,B] trunk_0_0)
<float[4] scales = {1, 1, 2, 2}>
{ trunk_0_0 = Resize <mode = "nearest"> (sample, , scales) }"""


def sizes(batch):
    return Sizes(batch=batch, height=16, width=16, tokens=7)


class Fakes:
    """The objects of one build, and what the adapter told them."""

    def __init__(self, module, says=(), parses=True, plan=b"plan"):
        self.module, self.says, self.parses, self.plan = module, says, parses, plan
        self.flags, self.capabilities, self.profiles = [], {}, []
        self.tensors = {
            name: module.recorded("ITensor", SimpleNamespace(name=name, shape=(-1,)))
            for name in ("sample", "trunk_0_0")
        }
        self.timings = []
        self.logger = SimpleNamespace(messages=Messages())
        self.network_flags = self.parsed = None
        module.Builder = lambda logger: self.made("Builder", max_threads=0)
        module.OnnxParser = lambda network, logger: self.made("OnnxParser", num_errors=1)
        module.Runtime = lambda logger: self.made("Runtime")

    def made(self, kind, **properties):
        members = {
            name.removeprefix(f"{kind}_"): getattr(self, name)
            for name in dir(self)
            if name.startswith(f"{kind}_")
        }
        return self.module.recorded(kind, SimpleNamespace(**properties, **members))

    def Builder_create_network(self, flags):
        self.network_flags = flags
        return self.made("INetworkDefinition", num_inputs=1, num_outputs=1)

    def Builder_create_builder_config(self):
        return self.made("IBuilderConfig")

    def Builder_create_optimization_profile(self):
        return self.made("IOptimizationProfile")

    def Builder_build_serialized_network(self, network, config):
        for line in self.says:
            self.logger.messages.add(*line)
        return self.plan

    def INetworkDefinition_get_input(self, index):
        return self.tensors["sample"]

    def INetworkDefinition_get_output(self, index):
        return self.tensors["trunk_0_0"]

    def OnnxParser_parse_from_file(self, path):
        self.parsed = path
        return self.parses

    def OnnxParser_parse(self, content, path):
        self.parsed = content
        return self.parses

    def OnnxParser_get_error(self, index):
        return self.made("ParserError")

    def ParserError_node_operator(self):
        return "Resize"

    def ParserError_node_name(self):
        return "node_of_resize"

    def ParserError_desc(self):
        return "no such mode"

    def IBuilderConfig_set_flag(self, flag):
        self.flags.append(flag.name)

    def IBuilderConfig_set_compute_capability(self, capability, index):
        self.capabilities[index] = capability.name
        return True

    def IBuilderConfig_add_optimization_profile(self, profile):
        return 0

    def IOptimizationProfile_set_shape(self, name, *shapes):
        self.profiles.append((name, shapes))

    def IBuilderConfig_create_timing_cache(self, content):
        self.timings.append(("made", bytes(content)))
        return self.made("ITimingCache")

    def IBuilderConfig_set_timing_cache(self, cache, ignore_mismatch):
        return True

    def IBuilderConfig_get_timing_cache(self):
        return self.made("ITimingCache")

    def ITimingCache_combine(self, other, ignore_mismatch):
        self.timings.append("combined")
        return True

    def ITimingCache_serialize(self):
        return b"timings"

    def Runtime_deserialize_cuda_engine(self, plan):
        return self.made("ICudaEngine")

    def ICudaEngine_create_engine_inspector(self):
        return self.made("EngineInspector")

    def EngineInspector_get_engine_information(self, layout):
        return json.dumps({"Layers": ["inspected"]})


@pytest.fixture
def build(tensorrt_module, tmp_path, monkeypatch):
    """``build(**fakes)``: (Fakes, BuiltEngine) of one segment with one of the libraries."""
    import onnx

    path = tmp_path / "trunk_00.onnx"
    graph = onnx.parser.parse_model(GRAPH)
    graph.graph.node[0].name = "node_resize"
    onnx.save(graph, path)
    rtx = tensorrt_module.name == "tensorrt_rtx"

    def make(**fakes):
        made = Fakes(tensorrt_module, **fakes)
        library = TensorRT(tensorrt_module.name, tensorrt_module, made.logger)
        monkeypatch.setattr(module_under_test, "load_library", lambda name: library)
        recipe = Recipe(
            segment=SEGMENT, onnx=path, library=library.name,
            capabilities=("SM80",) if rtx else ("CURRENT",),
            profiles=(ShapeProfile(sizes(1), sizes(2), sizes(8)),),
            flags=("REFIT",), level=3, threads=2,
        )  # fmt: skip
        return made, build_engine(recipe, tmp_path / "trunk_00.plan")

    return make


def test_the_same_steps_with_every_library(build, tensorrt_module, tmp_path):
    fakes, built = build()
    assert (tmp_path / "trunk_00.plan").read_bytes() == b"plan"
    assert fakes.tensors["sample"].shape == (-1, 8, 16, 16)
    shapes = tuple((batch, 8, 16, 16) for batch in (1, 2, 8))
    assert fakes.profiles == [("sample", shapes)]
    layout = tensorrt_module.TensorFormat
    assert fakes.tensors["sample"].allowed_formats == 1 << layout.LINEAR
    assert fakes.tensors["trunk_0_0"].allowed_formats == 1 << layout.HWC8
    assert built.formats == {"sample": "linear", "trunk_0_0": "hwc8"}
    assert fakes.flags == ["REFIT"]


def test_networks_are_strongly_typed(build, tensorrt_module):
    fakes, _ = build()
    strong = tensorrt_module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert fakes.network_flags == 1 << strong


def test_what_differs(build, tensorrt_module, tmp_path):
    fakes, built = build()
    rtx = tensorrt_module.name == "tensorrt_rtx"
    assert fakes.capabilities == ({0: "SM80"} if rtx else {})
    # Layers come from the log, or from the engine where the log has none and it can be opened.
    assert [layer.name for layer in built.layers] == ([] if rtx else ["inspected"])
    # 10.x resizes float32 only: the graph is rewritten in memory, the path says where weights are.
    old = tensorrt_module.__version__.startswith("10.")
    assert (b"Cast" in fakes.parsed) if old else (fakes.parsed == str(tmp_path / "trunk_00.onnx"))


def test_timings_are_kept_and_merged_where_the_library_has_them(build, tensorrt_module, tmp_path):
    first, _ = build()
    path = tmp_path / f"timing-{tensorrt_module.__version__}.cache"
    if tensorrt_module.name == "tensorrt_rtx":  # it accepts a cache and ignores it
        assert first.timings == []
        assert not path.exists()
        return
    assert first.timings == [("made", b"")]
    assert path.read_bytes() == b"timings"
    second, _ = build()
    assert second.timings == [("made", b"timings"), ("made", b"timings"), "combined"]


def test_a_parser_failure_names_segment_and_node(build):
    with pytest.raises(ExportError, match=r"'trunk_00'.*Resize node 'node_of_resize'.*Try"):
        build(parses=False)


def test_a_builder_failure_names_segment_and_node(build, tmp_path):
    said = [("E", "No implementation for node {ForeignNode[node_resize...node_of_another_graph]}.")]
    with pytest.raises(EngineError, match=r"'trunk_00'.*nodes: Resize 'node_resize'\. .*driver"):
        build(plan=None, says=said)
    assert not (tmp_path / "trunk_00.plan").exists()


def test_capabilities_by_name_are_the_rtx_librarys(tensorrt_module):
    library = TensorRT(tensorrt_module.name, tensorrt_module, None)
    named = {"SM75", "SM80", "SM86", "SM89", "SM120", "SM121"}
    assert set(library.capabilities) == (named if tensorrt_module.name == "tensorrt_rtx" else set())


def test_flags_that_a_library_lacks_are_refused(tensorrt_module):
    library = TensorRT(tensorrt_module.name, tensorrt_module, None)
    assert library.has_flag("REFIT")
    assert library.has_flag("STRIP_PLAN")
    if library.has_flag("REQUIRE_USER_ALLOCATION"):
        assert library.is_rtx
        return
    with pytest.raises(ConfigError, match=r"REQUIRE_USER_ALLOCATION.*another version"):
        library.flag("REQUIRE_USER_ALLOCATION")


def test_the_record_is_that_of_the_installed_library(tensorrt_module_of):
    import importlib.util

    trt = pytest.importorskip("tensorrt_rtx")
    recorded = tensorrt_module_of("tensorrt_rtx")
    path = Path(__file__).parents[3] / "tools" / "dev" / "record_tensorrt_api.py"
    spec = importlib.util.spec_from_file_location("record_tensorrt_api", path)
    recorder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recorder)
    api = recorder.api_of(trt)
    gone = {f"{kind}.{name}" for kind, names in recorded.api.items() for name in names} - {
        f"{kind}.{name}" for kind, names in api.items() for name in names
    }
    assert gone == set(), "record the API again and look at what the adapter uses"
    assert load_library("tensorrt_rtx").capabilities[:2] == ("SM75", "SM80")
