"""The parts of a build that need no TensorRT: library differences, layers, workers, targets."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockcache.export.engines.bfloat16_resize import with_float32_resize
from blockcache.export.engines.build import BuildOptions, ShapeOptions
from blockcache.export.engines.cache import SegmentWeights, engine_key
from blockcache.export.engines.engine import boundary_format, input_shape
from blockcache.export.engines.log import logged_layers, logged_scratch, parse_inspector
from blockcache.export.engines.report import fusion_facts
from blockcache.export.engines.targets import Target
from blockcache.export.engines.workers import Job, next_job
from blockcache.runtime.engines.files import ShapeProfile
from blockcache.runtime.engines.tensorrt_library import load_library
from blockcache.runtime.errors import ConfigError, MissingExtraError
from blockcache.runtime.plan import Dim, Segment, Sizes, TensorSpec


def spec(name, dtype, *dims):
    return TensorSpec(name, dtype, tuple(Dim.parse(dim) for dim in dims))


IMAGE = spec("trunk_0_0", "bfloat16", "batch", 64, "height/2", "width/2")
PROMPT = spec("prompt_0", "bfloat16", "batch", "tokens", 64)


def profile(batch, height, width=16):
    def sizes(index):
        return Sizes(batch=batch[index], height=height[index], width=width, tokens=7)

    return ShapeProfile(sizes(0), sizes(1), sizes(2))


# -- the library ----------------------------------------------------------------------------------


def test_a_missing_library_names_its_extra(monkeypatch):
    import importlib

    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingExtraError, match=r"blockcache\[tensorrt\]"):
        load_library.__wrapped__("tensorrt")
    with pytest.raises(MissingExtraError, match=r"blockcache\[tensorrt-rtx\]"):
        load_library.__wrapped__("auto")
    with pytest.raises(ConfigError, match="'auto'"):
        load_library.__wrapped__("tensorflow")


# -- shapes and layouts ----------------------------------------------------------------------------


def test_only_what_profiles_vary_is_left_open():
    dynamic_batch = profile((1, 2, 8), (16, 16, 16))
    assert input_shape(IMAGE, [dynamic_batch]) == (-1, 64, 8, 8)
    assert input_shape(PROMPT, [dynamic_batch]) == (-1, 7, 64)
    assert input_shape(IMAGE, [profile((2, 2, 2), (16, 16, 16))]) == (2, 64, 8, 8)
    two = [dynamic_batch, profile((1, 2, 8), (32, 32, 32))]
    assert input_shape(IMAGE, two) == (-1, 64, -1, 8)


@pytest.mark.parametrize(
    ("tensor", "layout"),
    [
        (IMAGE, "hwc8"),
        (spec("x", "float16", "batch", 8, "height", "width"), "hwc8"),
        (spec("x", "bfloat16", "batch", 12, "height", "width"), "linear"),
        (spec("x", "float32", "batch", 64, "height", "width"), "linear"),
        (spec("sample", "bfloat16", "batch", 8, "height", "width"), "linear"),
        (spec("model_output", "bfloat16", "batch", 8, "height", "width"), "linear"),
        (spec("scale_0", "float32", 1, 64, 1, 1), "linear"),
        (PROMPT, "linear"),
    ],
)
def test_layouts(tensor, layout):
    assert boundary_format(tensor) == layout


@pytest.mark.parametrize(
    "make",
    [
        lambda: ShapeOptions(min_batch=3),
        lambda: ShapeOptions(dynamic=True),
        lambda: BuildOptions(weights="some"),
        lambda: BuildOptions(level=6),
        lambda: BuildOptions(jobs=-1),
    ],
)
def test_options_that_cannot_work_are_refused(make):
    with pytest.raises(ConfigError, match=r"Expected|Dynamic"):
        make()


# -- targets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "dotted"),
    [
        ("sm80", "sm80", ("8.0",)),
        ("A100", "sm80", ("8.0",)),
        ("rtx-4090+sm120", "sm89+sm120", ("8.9", "12.0")),
        ("current", "current", ()),
        ("any", "any", ()),
    ],
)
def test_targets(text, name, dotted):
    target = Target.parse(text)
    assert (target.name, target.dotted) == (name, dotted)


@pytest.mark.parametrize(
    "text", ["", "sm", "a1000", "sm80+current", "sm80+any", "../sm80", "sm80+"]
)
def test_unknown_targets_are_refused(text):
    with pytest.raises(ConfigError, match=r"current|'any' stands alone: it is all GPUs"):
        Target.parse(text)


# -- layers and fusions ----------------------------------------------------------------------------

TENSOR = "{{ Name: {}, Dimensions: [1,2], Strides: [2,1], StrideOrder: [1,0], Datatype: {}, F: x }}"


def log_line(name, kind, inputs, outputs, dtype="BFloat16"):
    def listed(names):
        return ", ".join(TENSOR.format(n, dtype) for n in names)

    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {listed(inputs)}], Constants: [ "
        f"{listed(['weight'])}], Outputs: [ {listed(outputs)}], TacticName: t, StreamId: 0"
    )


def test_layers_are_read_from_the_log():
    text = "\n".join(
        [
            "Layers:",
            log_line("_gemm_mha_v2_myl0_1", "kgen", ["q", "k"], ["o"]),
            log_line("shape", "shape_call", [], []),
            log_line("cast_hvar", "cast", ["n"], ["m"], "Int64"),
            "Total Activation Memory: 8847360 bytes",
        ]
    )
    layers = logged_layers(["[V] noise", text])
    assert [(layer.name, layer.host) for layer in layers] == [
        ("_gemm_mha_v2_myl0_1", False), ("shape", True), ("cast_hvar", True),
    ]  # fmt: skip
    assert (layers[0].inputs, layers[0].outputs) == (("q", "k"), ("o",))
    assert logged_scratch(["Total Activation Memory: 12 bytes"]) == 12


def test_layers_are_read_from_the_inspector():
    text = json.dumps(
        {"Layers": [{"Name": "a", "LayerType": "gemm", "Inputs": [{"Name": "x"}]}, "b"]}
    )
    first, second = parse_inspector(text)
    assert (first.inputs, first.kind, second.name) == (("x",), "gemm", "b")


@pytest.mark.parametrize(("split", "fused"), [(False, 1), (True, 0)])
def test_scale_shift_counts_as_fused_in_one_kernel_only(split, fused):
    scale = spec("scale_3", "float32", 1, 64, 1, 1)
    segment = Segment("trunk_04", "trunk", "trunk_04.onnx", (IMAGE, scale), ())
    inputs = ["block_3", "scale_3", "shift_3", "x"]
    lines = [log_line("__myl_MulAddAdd_1", "kgen", inputs[: 2 if split else 4], ["y"])]
    lines.append(log_line("__myl_TranMove_2", "kgen", ["trunk_0_0"], ["z"]))
    seen = fusion_facts(segment, logged_layers(lines), attentions=0)
    assert (seen.kernels, seen.counts["scale_shifts_fused"]) == (2, fused)
    assert (seen.counts["boundary_copies"], seen.copied) == (1, ("trunk_0_0",))


# -- side by side within a memory budget -----------------------------------------------------------


def job(gigabytes):
    return Job(None, None, "", int(gigabytes * 1e9))


def test_jobs_start_while_they_fit():
    budget = int(12e9)
    assert next_job([], [], 2, budget) is None
    assert next_job([job(100)], [], 2, budget) == 0  # larger than all: alone
    assert next_job([job(1), job(1)], [job(1)], 2, budget) == 0
    assert next_job([job(3), job(0.1)], [job(2)], 2, budget) == 1
    assert next_job([job(3)], [job(2)], 2, budget) is None
    assert next_job([job(0.1)], [job(0.1), job(0.1)], 2, budget) is None


@given(
    sizes=st.lists(st.floats(0, 8), max_size=8),
    count=st.integers(1, 4),
    gigabytes=st.floats(0.1, 40),
    choices=st.randoms(use_true_random=False),
)
def test_every_job_runs_and_memory_stays_within_the_budget(sizes, count, gigabytes, choices):
    waiting, running, budget = [job(size) for size in sizes], [], int(gigabytes * 1e9)
    started = 0
    while waiting or running:
        while (index := next_job(waiting, running, count, budget)) is not None:
            running.append(waiting.pop(index))
            started += 1
        used = sum(each.memory_bytes for each in running)
        assert 1 <= len(running) <= count
        assert used <= budget or len(running) == 1
        running.pop(choices.randrange(len(running)))
    assert started == len(sizes)


# -- keys and the bfloat16 Resize ------------------------------------------------------------------


def test_every_part_of_a_recipe_is_in_the_key(monkeypatch):
    import dataclasses
    from pathlib import Path

    from blockcache.export.engines.engine import Recipe
    from blockcache.export.revisions import REVISIONS

    segment = Segment("trunk_00", "trunk", "trunk_00.onnx", (IMAGE,), ())
    recipe = Recipe(
        segment=segment, onnx=Path("a.onnx"), library="tensorrt_rtx", capabilities=("SM80",),
        profiles=(profile((1, 2, 8), (16, 16, 16)),), flags=(), level=3, threads=2,
    )  # fmt: skip
    weights = SegmentWeights(0, "w").sha256
    key = engine_key(recipe, "1.7", "onnx", weights)
    assert engine_key(dataclasses.replace(recipe, threads=4), "1.7", "onnx", weights) == key
    changes = {
        "library": "tensorrt", "capabilities": ("SM89",), "flags": ("REFIT",), "level": 4,
        "profiles": (profile((1, 2, 4), (16, 16, 16)),),
    }  # fmt: skip
    others = {engine_key(dataclasses.replace(recipe, **{n: v}), "1.7", "onnx", weights)
              for n, v in changes.items()}  # fmt: skip
    others |= {engine_key(recipe, "1.8", "onnx", weights), engine_key(recipe, "1.7", "o", weights)}
    others.add(engine_key(recipe, "1.7", "onnx", "other"))
    bumped = dataclasses.replace(REVISIONS["engine"], number=REVISIONS["engine"].number + 1)
    monkeypatch.setitem(REVISIONS, "engine", bumped)
    others.add(engine_key(recipe, "1.7", "onnx", weights))
    assert len(others | {key}) == len(changes) + 5


@pytest.mark.parametrize("at_the_end", [False, True])
def test_resize_in_float32_between_casts(tmp_path, at_the_end):
    ir = pytest.importorskip("onnx_ir")
    import onnx

    tail = "" if at_the_end else "y = Relu(z)"
    name = "z" if at_the_end else "y"
    model = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 22]>
        g (bfloat16[1,1,2,2] x) => (bfloat16[1,1,4,4] {name})
        <float[4] scales = {{1, 1, 2, 2}}>
        {{ z = Resize <mode = "nearest"> (x, , scales) {tail} }}"""
    )
    path = tmp_path / "resize.onnx"
    onnx.save(model, path)
    made = ir.from_proto(onnx.load_from_string(with_float32_resize(path)))
    types = [node.op_type for node in made.graph]
    assert types == ["Cast", "Resize", "Cast"] + ([] if at_the_end else ["Relu"])
    assert made.graph.outputs[0].name == name
    onnx.checker.check_model(ir.to_proto(made), full_check=True)
