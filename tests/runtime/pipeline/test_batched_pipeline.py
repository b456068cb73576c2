"""The batched pipeline: every request's picture is the one that a Pipeline draws alone."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("onnxruntime")
pytest.importorskip("tokenizers")

from blockcache import Pipeline
from blockcache.runtime import (
    BatchedPipeline,
    Cancelled,
    ConfigError,
    DeadlineError,
    EngineError,
    InputError,
    QueueFullError,
)

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def alone(pipeline_bundle):
    with Pipeline.open(pipeline_bundle("sd"), threads=1) as opened:
        yield opened


@pytest.fixture
def open_(pipeline_bundle):
    """``open_(slots=..., queue=...)``; closed at the end, whatever happens."""
    opened = []

    def make(slots=3, queue=64):
        bundle = pipeline_bundle("sd")
        made = BatchedPipeline.open(bundle, slots=slots, queue=queue, threads=1)
        opened.append(made)
        return made

    yield make
    for each in opened:
        each.close(drain=False)


def assert_same(picture, drawn):
    np.testing.assert_allclose(
        picture.latents, drawn.latents, rtol=0, atol=1e-5 * np.abs(drawn.latents).max()
    )
    assert np.abs(picture.image.astype(int) - drawn.images[0]).max() <= 1


def ended(counters):
    return counters.finished + counters.failed + counters.cancelled + counters.expired


requests = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from(["", "abc", "q r s", "abcdefg hij"]),
        "negative_prompt": st.sampled_from([None, "x"]),
        "seed": st.integers(0, 2**32 - 1),
        "guidance_scale": st.sampled_from([None, 1.0, 4.0]),
        "guidance_rescale": st.sampled_from([0.0, 0.7]),
        "strength": st.sampled_from([None, 0.5, 1.0]),
        "fate": st.sampled_from(["runs", "runs", "runs", "cancelled", "expires", "fails"]),
    }
)


def no_preview(_):
    raise ZeroDivisionError("no preview")


@settings(
    max_examples=4,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a batch's timing does not shrink
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(asked=st.lists(requests, min_size=2, max_size=6), slots=st.integers(1, 4))
@pytest.mark.filterwarnings("ignore:The end of a prompt was cut off")
def test_each_picture_is_the_one_drawn_alone(open_, alone, asked, slots):
    pipeline, futures = open_(slots=slots), []
    for each in asked:
        given_ = {key: value for key, value in each.items() if key not in ("fate", "strength")}
        if each["strength"] is not None:
            given_ |= {"image": IMAGE, "strength": each["strength"]}
        future = pipeline.submit(
            **given_,
            deadline=0.0 if each["fate"] == "expires" else None,
            callback=no_preview if each["fate"] == "fails" else None,
        )
        if each["fate"] == "cancelled":
            future.cancel()
        futures.append((each, given_, future))
    pipeline.close()
    for each, given_, future in futures:
        error = future.exception(timeout=0)
        if each["fate"] == "runs":
            names = {"prompt": "prompts", "negative_prompt": "negative_prompts"}
            plain = {names.get(k, k): v for k, v in given_.items() if k != "seed"}
            drawn = alone(**plain, seeds=[each["seed"]])
            picture = future.result()
            assert_same(picture, drawn)
            assert (picture.seed, picture.truncated) == (drawn.seeds[0], drawn.truncated[0])
            assert picture.steps == len(drawn.record.steps)
        elif each["fate"] == "cancelled":
            assert error is None or isinstance(error, Cancelled)
        else:
            wanted = {"expires": DeadlineError, "fails": ZeroDivisionError}[each["fate"]]
            late = (
                each["fate"] == "fails" and error is None
            )  # its callback came after the last step
            assert late or isinstance(error, wanted)
    counters = pipeline.counters()
    assert counters.pending == counters.batch.waiting == counters.batch.active == 0
    assert ended(counters) == counters.submitted == len(asked)
    decoded = sum(images * runs for images, runs in counters.decodes_of_images.items())
    assert decoded >= counters.finished


def test_what_is_denoised_meanwhile_is_decoded_together(open_):
    pipeline = open_(slots=4)
    with pipeline._decoding:
        futures = [pipeline.submit("abc", seed=0)]
        while not pipeline.counters().batch.finished:
            time.sleep(0.001)
        futures += [pipeline.submit("abc", seed=seed) for seed in (1, 2)]
        while pipeline.counters().batch.finished < 3:
            time.sleep(0.001)
    pictures = [future.result(timeout=60) for future in futures]
    counters = pipeline.counters()
    assert counters.decodes_of_images == {1: 1, 2: 1}
    for name in ("text", "waiting", "denoising", "decode"):
        total = sum(getattr(picture, f"{name}_ms") for picture in pictures)
        assert getattr(counters, f"{name}_seconds") == pytest.approx(total / 1e3)
    assert counters.to_json()["decodes_of_images"] == {"1": 1, "2": 1}
    assert pictures[0].summary().keys() >= {"seed", "steps", "waiting_ms", "decode_ms"}


def test_callbacks_see_steps_and_make_previews(open_):
    pipeline, seen = open_(), []

    def watch(progress):
        seen.append((progress.step, progress.steps, pipeline.decode(progress.latents).shape))

    picture = pipeline.submit("abc", seed=0, callback=watch).result(timeout=60)
    assert picture.image.shape == (64, 64, 3)
    steps = [step for step, _, _ in seen]
    assert steps == sorted(set(steps))
    assert set(steps) <= set(range(4))
    assert seen[0][1:] == (4, (1, 64, 64, 3))
    with pytest.raises(InputError, match=r"latents: expected float32 \[N, 4, 16, 16\]"):
        pipeline.decode(np.zeros((1, 4, 8, 8), np.float32))


def test_pending_requests_are_bounded(open_):
    pipeline = open_(slots=1, queue=1)
    with pipeline._decoding:  # what is denoised stays pending
        futures = [pipeline.submit("abc", seed=seed) for seed in range(2)]
        with pytest.raises(QueueFullError, match="Expected at most 2 pending requests"):
            pipeline.submit("abc")
    assert [future.result(timeout=60).seed for future in futures] == [0, 1]
    assert pipeline.submit("abc", seed=2).result(timeout=60).seed == 2


def test_a_request_ends_before_it_is_decoded(open_):
    pipeline = open_()
    with pipeline._decoding:
        first = pipeline.submit("abc", seed=0)
        while not pipeline.counters().batch.finished:
            time.sleep(0.001)
        cancelled = pipeline.submit("abc", seed=1)
        late = pipeline.submit("abc", seed=2, deadline=30)
        while pipeline.counters().batch.finished < 3:
            time.sleep(0.001)
        cancelled.cancel()
        pipeline._denoised[-1].submitted -= 60
    with pytest.raises(Cancelled, match="The request was cancelled; others go on"):
        cancelled.result(timeout=60)
    with pytest.raises(DeadlineError, match="Expected the picture within 30 s"):
        late.result(timeout=60)
    assert first.result(timeout=60).seed == 0


def test_a_decoder_that_fails_ends_what_it_decodes_and_no_others(open_, monkeypatch):
    pipeline = open_()

    def broken(*_):
        raise EngineError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline._parts.decoder, "images", broken)
        with pytest.raises(EngineError, match="broken"):
            pipeline.submit("abc").result(timeout=60)
    assert pipeline.submit("abc", seed=0).result(timeout=60).seed == 0
    assert pipeline.counters().failed == 1


def test_close_drains_or_cancels(open_):
    drained, dropped = open_(slots=1), open_(slots=1)
    assert drained.running
    futures = [drained.submit("abc", seed=seed) for seed in range(3)]
    drained.close()
    drained.close()
    assert [future.result(timeout=0).seed for future in futures] == [0, 1, 2]
    assert not drained.running
    with pytest.raises(ConfigError, match="Expected an open pipeline, this one is closed"):
        drained.submit("abc")
    futures = [dropped.submit("abc") for _ in range(3)]
    dropped.close(drain=False)
    assert isinstance(futures[-1].exception(timeout=0), Cancelled)


def test_a_callback_cannot_close_the_pipeline(open_):
    pipeline, caught, told = open_(), [], threading.Event()

    def close(_):
        try:
            pipeline.close()
        except ConfigError as error:
            caught.append(str(error))
        told.set()

    pipeline.submit("abc").add_done_callback(close)
    assert told.wait(60)
    assert caught[0].startswith("close was called from a callback")


def test_warm_up_draws_and_is_counted(open_):
    pipeline = open_(slots=2)
    pipeline.warm_up(2)
    assert pipeline.counters().finished == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"prompt": 3}, "prompt: expected a text, got int."),
        ({"negative_prompt": ["x"]}, "negative_prompt: expected a text, got list."),
        ({"preset": "dpm-99"}, "preset: expected one that the batch was opened with, ['ddim-4']"),
        ({"seed": -1}, "seed: expected a whole number of 0 or more, got -1."),
        ({"guidance_scale": "3"}, "guidance_scale: expected one finite number"),
        ({"guidance_rescale": 2.0}, "guidance_rescale: expected"),
        ({"image": IMAGE[:32]}, "image: expected one picture of [64, 64] pixels"),
        ({"image": IMAGE, "strength": 0.0}, "strength: expected more than 0.25"),
        ({"target_size": (1, 2, 3)}, "target_size: expected two whole numbers of pixels"),
        ({"crops_coords_top_left": (0, -1)}, "crops_coords_top_left: expected a whole number of 0"),
        ({"aesthetic_score": None}, "aesthetic_score: expected one finite number"),
        ({"deadline": "soon"}, "deadline: expected one finite number"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_at_once(open_, arguments, text):
    pipeline = open_()
    with pytest.raises(InputError) as caught:
        pipeline.submit(**{"prompt": "abc", **arguments})
    assert str(caught.value).startswith(text)
    assert pipeline.counters().submitted == 0


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"slots": 0}, ConfigError, "slots: expected a whole number of 1"),
        ({"queue": 0}, ConfigError, "queue: expected a whole number of 1"),
        ({"height": 60}, InputError, "height: expected a multiple of 16 pixels, got 60."),
        ({"tile": 7}, InputError, "tile: expected a multiple of 4 pixels"),
    ],
)
def test_options_are_checked_when_the_pipeline_opens(pipeline_bundle, options, error, text):
    with pytest.raises(error) as caught:
        BatchedPipeline.open(pipeline_bundle("sd"), **options)
    assert str(caught.value).startswith(text)


def test_a_bundle_of_the_u_net_alone_is_refused(pipeline_bundle):
    bundle = pipeline_bundle("sd")
    bare = replace(bundle, manifest=replace(bundle.manifest, pipeline=None))
    with pytest.raises(ConfigError, match="has no text_encoder and no decoder"):
        BatchedPipeline.open(bare)
