"""ONNX Runtime bound by address: what runs on the GPU, here on the CPU's addresses."""

from __future__ import annotations

import numpy as np
import pytest

from blockcache.runtime.devices.host import HostDevice
from blockcache.runtime.engines.ort import OrtBackend
from blockcache.runtime.engines.ort_cuda import (
    OrtCudaBackend,
    OrtCudaEngine,
    providers,
    require_providers,
)
from blockcache.runtime.errors import EngineError, MissingExtraError
from blockcache.runtime.plan import Sizes

ort = pytest.importorskip("onnxruntime")
SIZES = Sizes(batch=2, height=16, width=16, tokens=7)


def bound(bundle, segment, engine, seed=0):
    """Memory of a segment with random inputs, and its launch."""
    device, rng, tensors = HostDevice(), np.random.default_rng(seed), {}
    for spec in (*segment.inputs, *segment.outputs):
        memory = device.allocate(spec.bytes(SIZES))
        tensors[spec.name] = device.tensor(memory, 0, spec.shape(SIZES), spec.dtype)
    for spec in segment.inputs:
        device.upload(tensors[spec.name], rng.standard_normal(spec.shape(SIZES), np.float32))
    return tensors, engine.bind(tensors)


@pytest.fixture
def by_address(compiled):
    """(bundle, segment, engine bound by raw addresses)."""
    _, bundle = compiled("sd")
    segment = next(s for s in bundle.segments if s.name == "block_00")
    session = ort.InferenceSession(
        str(bundle.segment_path(segment)), providers=["CPUExecutionProvider"]
    )
    return bundle, segment, OrtCudaEngine(segment, session, "cpu", 0)


def test_addresses_hold_what_the_arrays_of_the_cpu_engine_hold(by_address):
    bundle, segment, engine = by_address
    expected, run = bound(bundle, segment, OrtBackend().load(bundle, segment))
    made, run_by_address = bound(bundle, segment, engine)
    run()
    run_by_address()
    assert np.abs(made["block_0"].array).max() > 0
    np.testing.assert_array_equal(made["block_0"].array, expected["block_0"].array)


def test_a_launch_reads_its_addresses_anew(by_address):
    bundle, segment, engine = by_address
    tensors, run = bound(bundle, segment, engine)
    run()
    before = tensors["block_0"].array.copy()
    for spec in segment.inputs:
        tensors[spec.name].array[:] *= 0.5
    run()
    assert np.abs(tensors["block_0"].array - before).max() > 1e-3


def test_a_failure_names_the_segment(by_address):
    bundle, segment, engine = by_address

    class Failing:
        io_binding = engine._session.io_binding

        def run_with_iobinding(self, binding, options):
            raise RuntimeError("out of memory")

    _, run = bound(bundle, segment, OrtCudaEngine(segment, Failing(), "cpu", 0))
    with pytest.raises(EngineError, match=r"'block_00': out of memory"):
        run()


def test_a_silent_fall_back_to_the_cpu_is_an_error(by_address):
    session = by_address[2]._session
    require_providers(session, ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match="run on CUDAExecutionProvider, it fell back to CPU"):
        require_providers(session, ["CUDAExecutionProvider"])


def test_providers_share_device_and_stream():
    place = {"device_id": "1", "user_compute_stream": "1234"}
    (cuda,) = providers(False, 1, 1234, "cache")
    assert cuda[0] == "CUDAExecutionProvider"
    assert place.items() <= cuda[1].items()
    assert cuda[1]["arena_extend_strategy"] == "kSameAsRequested"
    tensorrt, behind = providers(True, 1, 1234, "cache")
    assert behind == cuda
    assert tensorrt[0] == "TensorrtExecutionProvider"
    assert place.items() <= tensorrt[1].items()
    assert tensorrt[1]["trt_engine_cache_path"] == "cache"
    assert providers(True, 1, 1234, "")[0][1] == place


@pytest.mark.parametrize("tensorrt", [False, True])
def test_a_build_without_gpu_names_the_extra(monkeypatch, tensorrt):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingExtraError, match=r"blockcache\[gpu\]"):
        OrtCudaBackend(tensorrt=tensorrt)
