"""The pipeline: arguments, cache, tiles, progress, errors. Pictures: tests/end_to_end."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("tokenizers")

from blockcache import Pipeline
from blockcache.runtime import Cancelled, ConfigError, InputError
from blockcache.runtime.pipeline.prompts import CACHED_TEXTS

IMAGE = np.zeros((64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def pipeline(pipeline_bundle):
    with Pipeline.open(pipeline_bundle("sd")) as opened:
        yield opened


def test_a_picture_is_the_same_alone_and_in_a_batch(pipeline):
    both = pipeline(["abc", "q"], "x", seeds=[1, 2])
    alone = pipeline("q", "x", seeds=[2])
    assert both.images.shape == (2, 64, 64, 3)
    assert both.images.dtype == np.uint8
    assert np.abs(both.images[1].astype(int) - alone.images[0]).max() <= 1


def test_one_prompt_is_drawn_with_several_seeds(pipeline):
    drawn = pipeline("abc", seeds=range(3))
    assert drawn.seeds == (0, 1, 2)
    assert len(drawn.images) == 3
    assert (drawn.images[0] != drawn.images[1]).any()


def test_seeds_that_nobody_chose_are_told_and_draw_the_same_again(pipeline):
    drawn = pipeline(["abc", "q"])
    assert len(set(drawn.seeds)) == 2
    again = pipeline(["abc", "q"], seeds=drawn.seeds)
    np.testing.assert_array_equal(drawn.images, again.images)


def test_a_negative_prompt_counts_with_guidance_only(pipeline):
    plain = pipeline("abc", seeds=[0], guidance_scale=1.0)
    with_negative = pipeline("abc", "q", seeds=[0], guidance_scale=1.0)
    np.testing.assert_array_equal(plain.images, with_negative.images)
    guided = pipeline("abc", seeds=[0], guidance_scale=5.0)
    other = pipeline("abc", "q", seeds=[0], guidance_scale=5.0)
    assert (guided.latents != other.latents).any()


def test_long_prompts_are_cut_with_a_warning_or_encoded_in_chunks(pipeline):
    with pytest.warns(UserWarning, match=r"cut off, the text encoder does not take it: 'hij'\."):
        cut = pipeline("abcdefg hij", seeds=[0])
    assert cut.truncated == ("hij",)
    np.testing.assert_array_equal(cut.images, pipeline("abcdefg", seeds=[0]).images)
    whole = pipeline("abcdefg hij", seeds=[0], long_prompts=True)
    assert whole.truncated == ("",)
    assert (whole.latents != cut.latents).any()


def test_texts_are_encoded_once(pipeline, monkeypatch):
    encoded = []
    encode = pipeline._parts.prompts._encode
    monkeypatch.setattr(
        pipeline._parts.prompts, "_encode", lambda *of: (encoded.append(of), encode(*of))[1]
    )
    pipeline(["zyx", "zyx"], "wvu", seeds=[0, 1])
    pipeline("zyx", "wvu", seeds=[0])
    assert encoded == [("zyx", 1), ("wvu", 1)]
    for text in map(str, range(2 * CACHED_TEXTS)):
        pipeline._parts.prompts([text])
    assert len(pipeline._parts.prompts._cache) == CACHED_TEXTS


def test_tiles_cover_the_picture(pipeline):
    latents = np.random.default_rng(0).standard_normal((1, 4, 16, 28)).astype(np.float32)
    whole = pipeline.decode(latents)
    tiled = pipeline.decode(latents, tile=48)
    assert tiled.shape == whole.shape == (1, 64, 112, 3)
    assert tiled.min() < 255, "every pixel belongs to a tile"
    np.testing.assert_array_equal(pipeline.decode(latents, tile=256), whole)
    flat = np.zeros((1, 4, 16, 28), np.float32)  # far from borders tiles agree on a flat picture
    apart = np.abs(pipeline.decode(flat, tile=48).astype(int) - pipeline.decode(flat)).mean()
    assert apart < 24


def test_progress_previews_and_cancel(pipeline):
    steps, previews = [], []

    def watch(progress):
        steps.append((progress.step, progress.steps))
        previews.append(pipeline.decode(np.array(progress.latents)))

    pipeline("abc", seeds=[0], callback=watch)
    assert steps == [(step, 4) for step in range(4)]
    assert previews[0].shape == (1, 64, 64, 3)
    with pytest.raises(Cancelled):
        pipeline("abc", seeds=[0], cancelled=lambda: True)
    asked = iter([False] * 4 + [True] * 9)  # before the steps; then before the first picture
    with pytest.raises(Cancelled, match="while its pictures were decoded"):
        pipeline("abc", seeds=[0], cancelled=lambda: next(asked))


def test_calls_of_several_threads_wait_for_each_other(pipeline):
    wanted = {seed: pipeline("abc", seeds=[seed]).images for seed in range(4)}
    made = {}
    threads = [
        threading.Thread(target=lambda s=seed: made.update({s: pipeline("abc", seeds=[s]).images}))
        for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, images in wanted.items():
        np.testing.assert_array_equal(made[seed], images)


def test_warm_up_and_close(pipeline_bundle):
    pipeline = Pipeline.open(pipeline_bundle("sd"), threads=1)
    pipeline.warm_up(images=2, height=32, width=64)
    pipeline.close()
    pipeline.close()
    with pytest.raises(ConfigError, match="Expected an open session"):
        pipeline("abc")


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ([[]], {}, "prompts: expected at least one text, got an empty list."),
        ([3], {}, "prompts: expected a text or a list of texts, got '3'."),
        ([["a", b"b"]], {}, "prompts: expected a text or a list of texts, got"),
        ([["a", "b"], ["c", "d", "e"]], {}, "as many, got 2 prompts, 3 negative_prompts."),
        ([["a", "b"]], {"seeds": [1]}, "seeds: expected one a picture, 2, got 1."),
        (["a"], {"seeds": 3}, "seeds: expected a list of whole numbers, got 3."),
        (["a"], {"seeds": []}, "Expected one of each or as many, got 0 seeds."),
        (["a"], {"height": 60}, "height: expected a multiple of 16 pixels, got 60. Take 64."),
        (["a"], {"width": 1.5}, "width: expected a whole number"),
        (["a"], {"image": IMAGE.astype(float)}, r"image: expected uint8 \[N, H, W, 3\]"),
        (["a"], {"image": IMAGE[:, :, :1]}, r"image: expected uint8 \[N, H, W, 3\]"),
        (["a"], {"image": IMAGE, "height": 128}, "height: expected 64, by the size of the image"),
        (["a"], {"image": IMAGE[:60]}, "height: expected a multiple of 16 pixels, got 60."),
        (["a"], {"image": IMAGE, "strength": 0.1}, "strength: expected more than 0.25"),
        (["a"], {"image": IMAGE, "strength": 1.1}, "strength: expected more than 0.25"),
        (["a"], {"tile": 7}, "tile: expected a multiple of 4 pixels, 16 or more, got 7."),
        (["a"], {"guidance_scale": float("nan")}, "guidance_scale: expected one finite number"),
    ],
)
def test_bad_input_is_refused(pipeline, arguments, options, error):
    with pytest.raises(InputError, match=error):
        pipeline(*arguments, **options)


def test_latents_of_another_shape_are_not_decoded(pipeline):
    with pytest.raises(InputError, match=r"latents: expected float32 \[N, 4, h, w\]"):
        pipeline.decode(np.zeros((4, 16, 16), np.float32))


def test_a_bundle_of_the_u_net_alone_is_refused(compiled):
    _, bundle = compiled("sd")
    with pytest.raises(ConfigError, match="has no text_encoder and no decoder"):
        Pipeline.open(bundle)


def test_all_parts_take_other_weights_and_go_back(pipeline_bundle, reweighted, tmp_path):
    plain = pipeline_bundle("sd")
    other = reweighted(plain, tmp_path / "warm", 1.01)
    with Pipeline.open(other) as opened:
        wanted = opened("abc", seeds=[0])
    with Pipeline.open(plain) as opened:
        before = opened("abc", seeds=[0])
        assert opened.swap_weights(other) == "warm"
        swapped = opened("abc", seeds=[0])
        assert opened.swap_weights(name="base") == "base"
        after = opened("abc", seeds=[0])
        graph = plain.pipeline.parts[0].file
        files = {
            **plain.manifest.files,
            graph: replace(plain.manifest.files[graph], sha256="0" * 64),
        }
        with pytest.raises(ConfigError, match="text encoders, tokenizers and autoencoder differ"):
            opened.swap_weights(replace(plain, manifest=replace(plain.manifest, files=files)), "x")
        with pytest.raises(ConfigError, match="Expected a bundle, or a name of"):
            opened.swap_weights(name="nobody")
    for one, same in ((swapped, wanted), (after, before)):
        np.testing.assert_array_equal(one.latents, same.latents)
        np.testing.assert_array_equal(one.images, same.images)
    assert (swapped.images != before.images).any()
