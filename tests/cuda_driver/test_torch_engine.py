"""Whole requests with PyTorch for an engine library: on the stand-in, and on a real GPU.

    pytest -m gpu tests/cuda_driver/test_torch_engine.py      on a machine with a GPU and torch

PyTorch adds in another order than ONNX Runtime, so that latents are the CPU's but for rounding.
What is captured and replayed is what was launched, bit for bit.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from blockcache.runtime import Session
from blockcache.runtime.engines.ort import OrtBackend

pytestmark = [pytest.mark.driver, pytest.mark.gpu]


@pytest.fixture
def session_of(place_of, bundle_of):
    """``session_of(...)``: a session with about half of the blocks reused."""
    from blockcache.tools.bench.made_up import made_up
    from blockcache.tools.bench.torch_backend import TorchBackend

    opened = {}

    def make(preset="ddim-4", outputs=1, graphs="check", place=None, seed=0, backend=None):
        if outputs not in opened:
            opened[outputs] = bundle_of(outputs)
        bundle = opened[outputs]
        chosen = made_up(bundle.preset(preset), seed)
        return Session(bundle, chosen, backend or TorchBackend(place or place_of(), graphs))

    return make


def request_of(session, images=1, seed=0, **options):
    """Arguments of ``denoise``, with random prompts."""
    rng = np.random.default_rng(seed)
    prompt, negative = rng.standard_normal((2, images, 7, 32), np.float32)
    noise = session.noise([seed + image for image in range(images)])
    prompts = {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
    return {"noise": noise, **prompts, "guidance_scale": 5.0, **options}


def near(found, expected, most=1e-4):
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error <= most, error


@pytest.mark.parametrize(
    ("preset", "outputs", "images"), [("ddim-4", 1, (1, 2, 1)), ("dpm-20", 2, (1, 1))]
)
def test_launched_and_replayed_latents_are_the_cpus(session_of, preset, outputs, images):
    session = session_of(preset, outputs)
    cpu = session_of(preset, outputs, backend=OrtBackend(threads=1))
    for seed, count in enumerate(images):
        request = request_of(session, count, seed, guidance_rescale=0.7)
        near(session.denoise(**request).latents, cpu.denoise(**request).latents)
    assert (len(session._graphs), session._graphs.why_not) == (len({*images}), "")


def test_what_is_replayed_is_what_was_launched(session_of):
    launched, replayed = session_of(graphs="off"), session_of()
    replayed.denoise(**request_of(replayed))
    for seed, options in enumerate([{}, {"guidance_scale": 2.0}, {}]):
        request = request_of(replayed, seed=seed, **options)
        expected, found = launched.denoise(**request), replayed.denoise(**request)
        np.testing.assert_array_equal(found.latents, expected.latents)
    assert (len(launched._graphs), len(replayed._graphs)) == (0, 1)


def test_a_graph_a_step_for_callbacks(session_of):
    session, steps = session_of(), []
    request = request_of(session)
    expected = session.denoise(**request).latents
    for _ in range(3):
        found = session.denoise(**request, callback=lambda p: steps.append(p.step)).latents
        np.testing.assert_array_equal(found, expected)
    assert steps == 3 * [0, 1, 2, 3]
    assert len(session._graphs) == 1 + 4


def test_two_sessions_on_one_stream(session_of, place_of):
    place = place_of()
    pair = [session_of(place=place, seed=seed) for seed in (0, 1)]
    requests = [request_of(session, images) for session, images in zip(pair, (1, 2), strict=True)]
    expected = [s.denoise(**r).latents for s, r in zip(pair, requests, strict=True)]
    assert np.abs(expected[0] - expected[1][:1]).max() > 0  # schedules of their own
    for _ in range(2):
        for session, request, alone in zip(pair, requests, expected, strict=True):
            np.testing.assert_array_equal(session.denoise(**request).latents, alone)


def test_two_sessions_in_two_threads_while_a_third_opens_others(session_of, place_of):
    """Captures, replays and loads side by side, on three streams."""
    pair = [session_of(seed=seed) for seed in (0, 1)]
    requests = [request_of(session, images) for session, images in zip(pair, (1, 2), strict=True)]
    expected = [s.denoise(**r).latents for s, r in zip(pair, requests, strict=True)]
    done = threading.Event()

    def open_others():
        while not done.is_set():
            session_of().warm_up()

    def run(which):
        for _ in range(3):
            found = pair[which].denoise(**requests[which]).latents
            np.testing.assert_array_equal(found, expected[which])

    with ThreadPoolExecutor(3) as pool:
        opening = pool.submit(open_others)
        try:
            for running in [pool.submit(run, which) for which in (0, 1)]:
                running.result()
        finally:
            done.set()
        opening.result()
    assert [session._graphs.why_not for session in pair] == ["", ""]


def test_a_callers_stream(session_of, place_of):
    own = place_of()
    session, plain = session_of(place=place_of(own.device.stream)), session_of()
    assert session.backend.device.stream == own.device.stream
    request = request_of(session)
    for _ in range(2):
        found, expected = session.denoise(**request), plain.denoise(**request)
        np.testing.assert_array_equal(found.latents, expected.latents)


def test_a_launch_that_fails_names_its_segment(session_of, place_of, monkeypatch):
    from blockcache.runtime import EngineError

    place = place_of()
    session = session_of(place=place)

    def fail(work):
        raise RuntimeError("planted")

    monkeypatch.setattr(place, "run", fail)
    with pytest.raises(EngineError, match=r"^PyTorch .* failed in segment 'prompt': planted$"):
        session.denoise(**request_of(session))
