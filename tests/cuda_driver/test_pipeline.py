"""From prompt to picture on the stand-in GPU: the CPU's pictures, and what crosses the bus."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from blockcache import Pipeline
from blockcache.runtime import InputError
from blockcache.runtime.devices import cuda, cuda_driver
from blockcache.runtime.engines.ort import OrtBackend
from blockcache.runtime.engines.trt import TrtBackend

pytestmark = pytest.mark.driver


@pytest.fixture
def pipelines_of(tensorrt, bundle_of, engines_for):
    """``pipelines_of(kind)``: a pipeline on the stand-in GPU and one on the CPU, of one bundle."""
    with contextlib.ExitStack() as opened:

        def make(kind):
            library, bundle = tensorrt(), bundle_of(kind)
            engines_for(bundle, library, chunks=2)
            backends = TrtBackend(graphs="check"), OrtBackend(threads=1)
            return [
                opened.enter_context(Pipeline.open(bundle, backend=backend, verify=False))
                for backend in backends
            ]

        yield make


def same(pipelines, *arguments, **options):
    """Both draw one request, and agree in every bit; the GPU's result."""
    ours, theirs = (pipeline(*arguments, **options) for pipeline in pipelines)
    np.testing.assert_array_equal(ours.latents, theirs.latents)
    np.testing.assert_array_equal(ours.images, theirs.images)
    return ours


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_pictures_are_those_of_the_cpu(pipelines_of, kind):
    pipelines = pipelines_of(kind)
    for _ in range(2):  # launched, then replayed; the texts' states are kept
        same(pipelines, ["abc", "q", "xyz"], "no", seeds=[0, 1, 2], guidance_scale=4.0)
    same(pipelines, "abc", seeds=[0, 1])  # one prompt for both; sdxl: zeros beside it
    same(pipelines, "abc", seeds=[0], guidance_scale=1.0)
    same(pipelines, "abcdefg hij", seeds=[0], long_prompts=True, tile=32)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    same(pipelines, "abc", seeds=[3], image=image, strength=0.6)


@pytest.fixture
def crossings(monkeypatch):
    """Bytes of what was copied up to the GPU and down from it, copy by copy."""
    found = {"cuMemcpyHtoDAsync": [], "cuMemcpyDtoHAsync": []}
    for module in (cuda, cuda_driver):

        def watched(name, *arguments, original=module.call):
            if name in found:
                found[name].append(arguments[2])
            return original(name, *arguments)

        monkeypatch.setattr(module, "call", watched)

    def taken():
        copies = [sorted(sizes) for sizes in found.values()]
        for sizes in found.values():
            sizes.clear()
        return copies

    return taken


SMALL = 200  # bytes: token numbers, seeds, sizes, the solver's table; less than one text's states


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_nothing_leaves_the_gpu_between_text_and_picture(pipelines_of, crossings, kind):
    """Up go token numbers and noise, and nothing else; down come latents and pictures, once."""
    pipeline, _ = pipelines_of(kind)
    pipeline(["abc", "q"], "no", seeds=[0, 1], guidance_scale=4.0)  # puts the preset's tables there
    for prompts in (["abc", "q"], ["abc", "q"], ["new", "texts"]):
        crossings()
        drawn = pipeline(prompts, "no", seeds=[0, 1], guidance_scale=4.0)
        up, down = crossings()
        latents = drawn.latents.nbytes
        assert [size for size in up if size > SMALL] == [latents, 2 * latents]  # the model's input
        assert down == [latents, *[12 * drawn.images[0].size // 3] * 2]
        crossings()
        pipeline(prompts, seeds=[0, 1], guidance_scale=4.0, tile=32)
        up, down = crossings()
        assert [size for size in up if size > SMALL] == [latents, 2 * latents]


def test_a_session_takes_conditions_where_they_lie(pair_of, crossings):
    """The latents are those of the same numbers from the host; other dtypes go through it."""
    pair = pair_of()
    device, request = pair.gpu.backend.device, pair.request(2)
    expected = pair.cpu.denoise(**request).latents
    names = ("prompt_embeds", "negative_prompt_embeds")

    def on_gpu(values):
        tensor = device.tensor(device.allocate(values.nbytes), 0, values.shape, "float32")
        device.upload(tensor, values)
        return device.view(tensor)

    moved = {**request, **{name: on_gpu(request[name]) for name in names}}
    pair.gpu.denoise(**request)
    crossings()
    np.testing.assert_array_equal(pair.gpu.denoise(**moved).latents, expected)
    up, down = crossings()
    noise = request["noise"].nbytes
    assert [size for size in up if size > SMALL] == [noise, 2 * noise]
    assert down == [noise]
    checked = pair.gpu.denoise(**moved, check_finite=True)
    np.testing.assert_array_equal(checked.latents, expected)
    half_on_gpu = {**request, "prompt_embeds": moved["prompt_embeds"]}
    np.testing.assert_array_equal(pair.gpu.denoise(**half_on_gpu).latents, expected)
    with pytest.raises(InputError, match=r"prompt_embeds|encoder_hidden_states: expected shape"):
        pair.gpu.denoise(**{**moved, "prompt_embeds": on_gpu(np.zeros((2, 7, 8), np.float32))})
    both = on_gpu(np.concatenate([request[name] for name in names]))
    sample = np.concatenate([request["noise"]] * 2)
    with pair.cpu.begin(np.concatenate([request[name] for name in names])) as plain:
        wanted = plain.predict(0, sample).copy()
    with pair.gpu.begin(both) as lent:
        np.testing.assert_array_equal(lent.predict(0, sample), wanted)
