"""Guidance and its rescale: every way a device does them is diffusers' formula."""

import gc
import importlib
import weakref
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockcache.runtime import EngineError, InputError
from blockcache.runtime.devices import cuda_kernels
from blockcache.runtime.devices import host as host_module
from blockcache.runtime.devices.cuda_kernels import SolverKernel, SolverKernels
from blockcache.runtime.devices.device import Guidance, modes_of
from blockcache.runtime.devices.host import HostDevice
from blockcache.runtime.solvers.philox import standard_normal

DDIM_ROW = [0.9, -0.3, 0, 0, 0, 0, 0.7, 0]
DPM_ROW = [0.9, -0.3, 0.2, 0, 1.1, -0.7, 0.5, 0]
UNIPC_ROW = [0.9, -0.3, 0.2, -0.4, 1.1, -0.7, 0.5, 0]
SDE_ROW = [0.9, -0.3, 0.2, 0, 1.1, -0.7, 0.5, 0.8]


def floats(device, values):
    """A tensor of ``device`` that holds ``values``."""
    tensor = device.tensor(device.allocate(values.nbytes), 0, values.shape, "float32")
    device.upload(tensor, values)
    return tensor


def bind_compiled(_twin, device, table, guidance, seeds, *tensors):
    return device.solver(table, guidance, seeds, *tensors)


def bind_numpy(_twin, device, table, guidance, seeds, *tensors):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_module.kernels, "host_available", lambda: False)
        return device.solver(table, guidance, seeds, *tensors)


def bind_cuda(twin, device, table, guidance, seeds, *tensors):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_kernels.kernels, "cuda_library", lambda: twin)
        kernel = SolverKernel(device, 0, len(table), *modes_of(guidance), *tensors)
    kernel.set(device, table, guidance, seeds)
    return kernel.step


@st.composite
def requests(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    images = draw(st.integers(1, 3))
    guidance = draw(
        st.one_of(
            st.none(),
            st.builds(Guidance, st.floats(1.5, 12), st.sampled_from([0.0, 0.3, 0.7, 1.0])),
            st.builds(Guidance, st.floats(1.5, 12), image_scale=st.floats(1.1, 3)),
        )
    )
    half = (images, 4, *draw(st.tuples(st.integers(1, 9), st.integers(1, 9))))
    both = (modes_of(guidance)[0] * images, *half[1:])
    shapes = {"latents": half, "past": (2, *half), "model_output": both, "model_input": both}
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    row = draw(st.sampled_from([DDIM_ROW, DPM_ROW, UNIPC_ROW, SDE_ROW]))
    seeds = np.array([draw(st.integers(0, 2**64 - 1)) for _ in range(images)], np.uint64)
    return values, np.array([row, row], np.float32), guidance, seeds, draw(st.integers(0, 1))


def diffusers_guided(output, guidance):
    """The guided and rescaled output [N, ...] by diffusers' own function, in float64."""
    torch = pytest.importorskip("torch")
    module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"
    rescale_noise_cfg = importlib.import_module(module).rescale_noise_cfg
    output = torch.from_numpy(output.astype(np.float64))
    if guidance is None:
        return output.numpy()
    if guidance.rows == 3:  # as StableDiffusionInstructPix2PixPipeline has it, in our order
        nothing, image, text = output.chunk(3)
        by_image = guidance.image_scale * (image - nothing)
        return (nothing + guidance.scale * (text - image) + by_image).numpy()
    unconditional, conditional = output.chunk(2)
    guided = unconditional + guidance.scale * (conditional - unconditional)
    if guidance.rescale > 0:  # as the pipelines have it
        guided = rescale_noise_cfg(guided, conditional, guidance.rescale)
    return guided.numpy()


@pytest.mark.parametrize("bind", [bind_compiled, bind_numpy, bind_cuda])
@settings(max_examples=40, deadline=None)
@given(requests())
def test_a_step_is_diffusers_guidance_and_the_table_row(twin_library, bind, drawn):
    """A dozen float32 roundings, each of at most the sums' size, which the guidance scale makes."""
    values, table, guidance, seeds, at = drawn
    device = HostDevice()
    tensors = {name: floats(device, each) for name, each in values.items()}
    bind(twin_library, device, table, guidance, seeds, *tensors.values())(at)
    x, past = (values[name].astype(np.float64) for name in ("latents", "past"))
    g, row = diffusers_guided(values["model_output"], guidance), table[at].astype(np.float64)
    z = standard_normal(seeds, at, x[0].size).reshape(x.shape)
    wanted = row[0] * x + row[1] * g + row[2] * past[1 - at] + row[3] * past[at] + row[7] * z
    scale = 1.0 if guidance is None else guidance.scale + guidance.image_scale
    tolerance = 12 * 2.0**-24 * (1 + 2 * scale) * 8  # 8: the largest normal number drawn
    np.testing.assert_allclose(tensors["latents"].array, wanted, rtol=0, atol=tolerance)
    halves = len(values["model_input"]) // len(x)
    following = np.tile(row[6] * wanted, (halves, 1, 1, 1))
    np.testing.assert_allclose(tensors["model_input"].array, following, rtol=0, atol=tolerance)
    if row[4:6].any():
        x0 = row[4] * x + row[5] * g
        np.testing.assert_allclose(tensors["past"].array[at], x0, rtol=0, atol=tolerance)
        np.testing.assert_array_equal(tensors["past"].array[1 - at], values["past"][1 - at])


class Memory:
    """A tensor's owner, as weakly held as a CudaMemory."""


def test_a_cuda_kernel_stays_for_the_next_request_and_goes_with_its_latents(
    twin_library, monkeypatch
):
    """Same addresses, other guidance: what a captured graph relies on."""
    monkeypatch.setattr(cuda_kernels.kernels, "cuda_library", lambda: twin_library)
    device, rng, solvers = HostDevice(), np.random.default_rng(0), SolverKernels()
    shapes = [(1, 4, 3, 3), (2, 1, 4, 3, 3), (2, 4, 3, 3), (2, 4, 3, 3)]
    values = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    tensors = [floats(device, each) for each in values]
    tensors[0] = replace(tensors[0], owner=Memory())
    table, used = np.array([DDIM_ROW], np.float32), set()
    for guidance in (Guidance(3.0, 0.5), Guidance(9.0, 1.0)):
        for tensor, each in zip(tensors, values, strict=True):
            device.upload(tensor, each)
        step = solvers.bind(device, 0, table, guidance, None, *tensors)
        step(0)
        used.add(step.__self__)
        fresh = [floats(device, each) for each in values]
        bind_compiled(None, device, table, guidance, None, *fresh)(0)
        np.testing.assert_array_equal(tensors[0].array, fresh[0].array)
    assert len(used) == 1
    assert solvers.bind(device, 0, table, Guidance(3.0), None, *tensors).__self__ not in used
    kernel = weakref.ref(used.pop())
    del step, tensors
    gc.collect()
    assert kernel() is None


@pytest.mark.parametrize("rescale", [-0.1, 1.5, float("nan")])
def test_a_rescale_out_of_range_is_refused(rescale):
    with pytest.raises(InputError, match=r"^guidance_rescale: expected 0 \(off\) to 1, got "):
        Guidance(5.0, rescale)


def test_modes_tell_which_kernels_run():
    assert modes_of(None) == (1, False)
    assert modes_of(Guidance(5.0)) == (2, False)
    assert modes_of(Guidance(5.0, 0.7)) == (2, True)
    assert modes_of(Guidance(5.0, image_scale=1.5)) == (3, False)


def test_an_image_scale_out_of_range_or_beside_a_rescale_is_refused():
    with pytest.raises(
        InputError, match=r"^image_guidance_scale: expected 1 \(off\) or more, got 0"
    ):
        Guidance(5.0, image_scale=0.5)
    with pytest.raises(InputError, match=r"^guidance_rescale: expected 0 beside an image_guidance"):
        Guidance(5.0, 0.5, 2.0)


# -- the model input anew, from latents that a caller has edited -----------------------------------


def renew_on_host(_twin, device, *arguments):
    return device.model_input(*arguments)


def renew_by_kernel(twin, device, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_kernels.kernels, "cuda_library", lambda: twin)
        return cuda_kernels.bind_model_input(device, 0, *arguments)


@pytest.mark.parametrize("renew", [renew_on_host, renew_by_kernel])
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("images", [1, 3])
def test_the_model_input_is_the_scaled_latents_in_every_half(twin_library, renew, halves, images):
    device, rng = HostDevice(), np.random.default_rng(images)
    latents = floats(device, rng.standard_normal((images, 4, 3, 5)).astype(np.float32))
    model_input = floats(device, np.full((halves * images, 4, 3, 5), np.nan, np.float32))
    scales = np.array([0.7, 1.3], np.float32)
    write = renew(twin_library, device, scales, latents, model_input)
    kept = latents.array.copy()
    for step in (1, 0):
        write(step)
        wanted = np.tile(kept * scales[step], (halves, 1, 1, 1))
        np.testing.assert_array_equal(model_input.array, wanted)
    np.testing.assert_array_equal(latents.array, kept)


# -- errors of the kernels -------------------------------------------------------------------------


def test_a_kernel_that_fails_is_our_error(twin_library):
    device = HostDevice()
    shapes = [(1, 4, 3, 3), (2, 1, 4, 3, 3), (1, 4, 3, 3), (1, 4, 3, 3)]
    tensors = [floats(device, np.zeros(shape, np.float32)) for shape in shapes]
    table = np.array([DPM_ROW], np.float32)
    steps = [
        device.solver(table, None, None, *tensors),
        renew_by_kernel(twin_library, device, table[:, 6], tensors[0], tensors[3]),
    ]
    for step in steps:
        with pytest.raises(EngineError, match=r"^blockcache's kernels failed: .*step.* Install "):
            step(5)
