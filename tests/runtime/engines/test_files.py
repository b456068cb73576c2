"""Every way in which engines may not fit, each with its own readable error."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest

from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.bundles.manifest import FileEntry
from blockcache.runtime.engines.choice import make_backend
from blockcache.runtime.engines.files import (
    EngineEntry,
    EngineSet,
    ShapeProfile,
    built_targets,
    check_engines,
    engines_folder,
    read_engines,
    read_plan,
    write_engines,
)
from blockcache.runtime.errors import (
    BundleFormatError,
    BundleIntegrityError,
    BundlePathError,
    EngineError,
    EnginesMissingError,
    EnginesStaleError,
    WrongGpuError,
    WrongLibraryError,
)
from blockcache.runtime.plan import Sizes

SIZES = Sizes(batch=1, height=16, width=16, tokens=7)


@pytest.fixture
def bundle(bundle_copy):
    """The tiny bundle with an engine set of one made-up plan."""
    opened = Bundle.open(bundle_copy)
    folder = engines_folder(opened, "sm80")
    folder.mkdir(parents=True)
    plan = folder / "trunk_00.plan"
    plan.write_bytes(b"a plan")
    graph = opened.manifest.files[segment_of(opened).file]
    file = FileEntry.of(plan)
    entry = EngineEntry(
        file="trunk_00.plan",
        key="k",
        bytes=file.bytes,
        sha256=file.sha256,
        onnx_sha256=graph.sha256,
        weights_file_sha256=opened.weights.sha256,
        seconds=0.5,
        formats={"sample": "linear"},
        kernels=9,
        scratch_bytes=0,
        copied=("prompt_0",),
    )
    engines = EngineSet(
        target="sm80",
        library="tensorrt_rtx",
        version="1.7.1",
        capabilities=("8.0",),
        precision="bfloat16",
        weights="included",
        weights_sha256=opened.weights.sha256,
        profiles=(ShapeProfile(*(dataclasses.replace(SIZES, batch=batch) for batch in (1, 2, 8))),),
        engines={"trunk_00": entry},
    )
    write_engines(opened, engines)
    return opened


def segment_of(bundle, name="trunk_00"):
    return next(segment for segment in bundle.segments if segment.name == name)


def test_round_trip(bundle):
    engines = read_engines(bundle, "sm80")
    assert EngineSet.from_json(engines.to_json()) == engines
    assert engines.engines["trunk_00"].copied == ("prompt_0",)
    assert built_targets(bundle) == ("sm80",)
    check_engines(bundle, engines, "tensorrt_rtx", "1.7.1", "8.0")
    assert read_plan(bundle, engines, segment_of(bundle)) == b"a plan"


@pytest.mark.parametrize(
    ("library", "version", "capability", "error", "says"),
    [
        ("tensorrt", "1.7.1", "8.0", WrongLibraryError, "got tensorrt 1.7.1"),
        ("tensorrt_rtx", "1.8.0", "8.0", WrongLibraryError, "Install that version, or build again"),
        ("tensorrt_rtx", "1.7.1", "9.0", WrongGpuError, "--target sm90"),
    ],
)
def test_wrong_library_version_and_gpu(bundle, library, version, capability, error, says):
    with pytest.raises(error, match=says):
        check_engines(bundle, read_engines(bundle, "sm80"), library, version, capability)


def test_engines_of_another_compile_are_stale(bundle):
    engines = read_engines(bundle, "sm80")
    with pytest.raises(EnginesStaleError, match="blockcache build"):
        check_engines(
            bundle, dataclasses.replace(engines, weights_sha256="0"), "tensorrt_rtx", "1.7.1", ""
        )
    entry = dataclasses.replace(engines.engines["trunk_00"], onnx_sha256="0")
    changed = dataclasses.replace(engines, engines={"trunk_00": entry})
    with pytest.raises(EnginesStaleError, match=r"trunk_00\.onnx"):
        read_plan(bundle, changed, segment_of(bundle))


def test_refittable_engines_survive_new_weights(bundle):
    engines = dataclasses.replace(
        read_engines(bundle, "sm80"), weights_sha256="0", weights="refittable"
    )
    check_engines(bundle, engines, "tensorrt_rtx", "1.7.1", "8.0")


@pytest.mark.parametrize(
    ("content", "says"), [(b"a plaN", "altered"), (b"a pla", "truncated"), (None, "missing")]
)
def test_a_tampered_plan_is_refused(bundle, content, says):
    plan = engines_folder(bundle, "sm80") / "trunk_00.plan"
    plan.unlink()
    if content is not None:
        plan.write_bytes(content)
    with pytest.raises(BundleIntegrityError, match=says):
        read_plan(bundle, read_engines(bundle, "sm80"), segment_of(bundle))


def test_missing_engines_name_the_command(bundle):
    with pytest.raises(EnginesMissingError, match=r"found \['sm80'\].*--target sm89"):
        read_engines(bundle, "sm89")
    with pytest.raises(EnginesMissingError, match="block_00"):
        read_plan(bundle, read_engines(bundle, "sm80"), segment_of(bundle, "block_00"))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": "other", "version_of_format": 1}', '{"format": "x"}']
)
def test_a_malformed_file_is_refused(bundle, text):
    (engines_folder(bundle, "sm80") / "engines.json").write_text(text)
    with pytest.raises(BundleFormatError, match="Build the engines again"):
        read_engines(bundle, "sm80")


@pytest.mark.parametrize(
    ("name", "value"), [("file", None), ("bytes", "6"), ("sha256", 3), ("kernels", True)]
)
def test_an_engine_with_a_field_of_another_type_is_refused_by_name(bundle, name, value):
    path = engines_folder(bundle, "sm80") / "engines.json"
    content = json.loads(path.read_text())
    content["engines"]["trunk_00"][name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(BundleFormatError, match=f"Expected '{name}' of an engine as "):
        read_engines(bundle, "sm80")


def test_a_file_that_is_no_text_is_refused(bundle):
    (engines_folder(bundle, "sm80") / "engines.json").write_bytes(b"\xff\xfe" * 20)
    with pytest.raises(BundleFormatError, match="Build the engines again"):
        read_engines(bundle, "sm80")


@pytest.mark.parametrize("target", ["../..", ".."])
def test_a_target_outside_the_bundle_is_refused(bundle, target):
    with pytest.raises(BundlePathError):
        read_engines(bundle, target)


def test_an_engine_file_outside_the_bundle_is_refused(bundle):
    engines = read_engines(bundle, "sm80")
    entry = dataclasses.replace(engines.engines["trunk_00"], file="../../../etc/passwd")
    with pytest.raises(BundlePathError):
        read_plan(
            bundle, dataclasses.replace(engines, engines={"trunk_00": entry}), segment_of(bundle)
        )


# -- without a device ------------------------------------------------------------------------------


def test_auto_takes_the_cpu_where_there_is_no_device(bundle, monkeypatch):
    from blockcache.runtime.devices import cuda_driver

    monkeypatch.setattr(cuda_driver, "device_count", lambda: 0)
    assert make_backend("auto", bundle=bundle).name.startswith("ort-cpu")


def test_auto_takes_engines_where_there_is_a_device(bundle, monkeypatch):
    from blockcache.runtime.devices import cuda_driver
    from blockcache.runtime.engines import tensorrt_library, trt

    monkeypatch.setattr(cuda_driver, "device_count", lambda: 1)
    monkeypatch.setattr(cuda_driver, "device_capability", lambda index: "8.0")
    monkeypatch.setattr(cuda_driver, "driver_version", lambda: (13, 0))
    library = SimpleNamespace(problem=lambda capability, driver: "")
    monkeypatch.setattr(tensorrt_library, "load_library", lambda: library)
    monkeypatch.setattr(trt, "TrtBackend", lambda **options: ("trt", options))
    chosen, options = make_backend("auto", bundle=bundle, graphs="check", verify=False)
    assert (chosen, options) == (
        "trt",
        {"stream": None, "device": None, "graphs": "check", "verify": False},
    )


def test_tensorrt_without_a_device_says_what_to_do():
    pytest.importorskip("cuda.bindings.driver")
    from blockcache.runtime.devices.cuda_driver import device_count

    if device_count():
        pytest.skip("there is a device here")
    with pytest.raises(EngineError, match="NVIDIA GPU and its driver"):
        make_backend("trt")
