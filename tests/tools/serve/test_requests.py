"""A request in JSON: what is read is what was sent, anything else has a status and a message."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blockcache.runtime import (
    BatchedPicture,
    Cancelled,
    ConfigError,
    DeadlineError,
    EngineError,
    InputError,
    QueueFullError,
)
from blockcache.tools.serve import requests
from blockcache.tools.serve.requests import (
    FIELDS,
    MOST_BYTES,
    MOST_CHARACTERS,
    RequestError,
    answer_of,
    headers_of,
    message_of,
    png_of,
    preview_of,
    read_request,
    status_of,
)

IMAGE = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)


def encoded(image=IMAGE, form="PNG"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, form)
    return base64.b64encode(file.getvalue()).decode()


numbers = st.floats(allow_nan=False, allow_infinity=False)
pairs = st.lists(st.integers(0, 1 << 16), min_size=2, max_size=2)
bodies = st.fixed_dictionaries(
    {"prompt": st.text(max_size=40)},
    optional={
        "negative_prompt": st.text(max_size=40),
        "preset": st.text(max_size=20),
        "seed": st.integers(0, 2**64 - 1),
        **dict.fromkeys(("guidance_scale", "strength", "deadline"), numbers),
        "original_size": pairs,
        "format": st.sampled_from(requests.FORMATS),
    },
)


@settings(max_examples=40)
@given(bodies)
def test_what_is_read_is_what_was_sent(body):
    read = read_request(json.dumps(body).encode())
    sent = {name: tuple(v) if isinstance(v, list) else v for name, v in body.items()}
    assert read.format == sent.pop("format", "png")
    assert read.arguments == sent


@settings(max_examples=60)
@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([*FIELDS, "steps"]), inner, max_size=4)
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_no_body_has_another_outcome(body):
    try:
        read = read_request(body)
    except RequestError as refused:
        outcome = refused.status, "xpected" in str(refused)
        assert outcome == (400, True)
    else:
        assert isinstance(read.arguments["prompt"], str)


def test_a_picture_to_start_from():
    read = read_request(json.dumps({"prompt": "a", "image": encoded()}).encode())
    np.testing.assert_array_equal(read.arguments["image"], IMAGE)
    grey = encoded(IMAGE[..., 0])  # becomes RGB
    read = read_request(json.dumps({"prompt": "a", "image": grey}).encode())
    np.testing.assert_array_equal(read.arguments["image"], np.repeat(IMAGE[..., :1], 3, axis=2))


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "Expected JSON in UTF-8, got"),
        (b"\xff", "Expected JSON in UTF-8, got"),
        (b"[" * 100_000, "Expected JSON in UTF-8, got"),
        (b'{"prompt":"a","seed":' + b"1" * 5000 + b"}", "Expected JSON in UTF-8, got"),
        (b'{"prompt":"a","seed":NaN}', "Expected JSON in UTF-8, got NaN, which is no JSON number."),
        (b'{"prompt":"a","prompt":"b"}', "Expected JSON in UTF-8, got a field twice."),
        (b"[1]", "Expected a JSON object, got an array."),
        (b"{}", "prompt: expected a text, got none."),
        (b'{"prompt":"a","steps":3}', "Expected the fields ['prompt', 'negative_prompt',"),
        (b'{"prompt":3}', "prompt: expected a text of at most 10000, got a number."),
        (b'{"prompt":"a","format":"gif"}', "format: expected one of ['png', 'json', 'stream']"),
        (b'{"prompt":"a","target_size":[1]}', "target_size: expected [height, width] in whole"),
        (b'{"prompt":"a","image":"zz!"}', "image: expected a PNG or JPEG in base64"),
        (b'{"prompt":"a","image":"aGVsbG8="}', "image: expected a PNG or JPEG in base64"),
    ],
)
def test_what_is_wrong_is_said(body, text):
    with pytest.raises(RequestError) as caught:
        read_request(body)
    assert str(caught.value).startswith(text)
    assert len(str(caught.value)) < 500
    assert caught.value.status == 400


def test_what_is_too_large_is_not_read(monkeypatch):
    with pytest.raises(RequestError) as caught:
        read_request(b" " * (MOST_BYTES + 1))
    assert caught.value.status == 413
    long = json.dumps({"prompt": "a" * (MOST_CHARACTERS + 1)}).encode()
    with pytest.raises(RequestError, match=r"got 10001 characters\.") as caught:
        read_request(long)
    assert "aaa" not in str(caught.value)
    monkeypatch.setattr(requests, "MOST_PIXELS", 23)
    with pytest.raises(RequestError, match="image: expected at most 23 pixels, got more"):
        read_request(json.dumps({"prompt": "a", "image": encoded()}).encode())


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestError("x", 413), 413),
        (InputError("x"), 400),
        (ConfigError("x"), 400),
        (QueueFullError("x"), 429),
        (Cancelled("x"), 503),
        (DeadlineError("x"), 504),
        (EngineError("x"), 500),
        (KeyError("x"), 500),
    ],
)
def test_every_error_has_a_status_and_only_ours_are_told(error, status):
    assert status_of(error) == status
    assert (str(error) in message_of(error)) == (status != 500) or str(error) == "x"
    assert message_of(EngineError("secret")).startswith("The picture could not be drawn")


def test_answers_hold_the_picture_and_its_times():
    picture = BatchedPicture(
        image=IMAGE, seed=7, latents=np.zeros((1, 4, 2, 2), np.float32), truncated="hij", steps=4,
        launches=9, text_ms=1.0, denoising_ms=2.0, decode_ms=3.0, waiting_ms=0.5,
    )  # fmt: skip
    answer = json.loads(json.dumps(answer_of(picture)))
    read = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["image"]))))
    np.testing.assert_array_equal(read, IMAGE)
    assert (answer["seed"], answer["truncated"], answer["waiting_ms"]) == (7, "hij", 0.5)
    assert headers_of(picture) == {
        "X-Seed": "7",
        "X-Truncated": "1",
        "Server-Timing": "text;dur=1.0, waiting;dur=0.5, denoising;dur=2.0, decode;dur=3.0",
    }
    assert png_of(IMAGE)[:4] == b"\x89PNG"
    assert preview_of(1, 4, IMAGE)["step"] == 1
