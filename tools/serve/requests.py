"""A request for a picture in JSON, and its answer: the same behind every server.

Whatever is wrong with a request is an error with the status that HTTP has for it, and a message
that goes to the client alone. Nothing here logs, and nothing imports a server.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from blockcache.runtime import (
    BatchedPicture,
    BlockCacheError,
    Cancelled,
    ConfigError,
    DeadlineError,
    InputError,
    QueueFullError,
)
from blockcache.runtime.arguments import finite_number, whole_number

MOST_BYTES = 16 << 20
"""Of a request's body; a picture to start from takes most of it."""

MOST_CHARACTERS = 10_000
"""Of a prompt; text encoders read a few hundred."""

MOST_PIXELS = 4096 * 4096
"""Of a picture to start from."""

FORMATS = ("png", "json", "stream")
"""A PNG; JSON with the PNG in base64; the same, with previews before it, a line each."""


class RequestError(BlockCacheError):
    """What a client sent is no request; ``status`` is that of HTTP."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class PictureRequest:
    """What a client asks for."""

    arguments: Mapping[str, Any]  # of ``BatchedPipeline.submit``
    format: str  # of FORMATS


def read_request(body: bytes) -> PictureRequest:
    """The request that a body holds.

    Args:
        body: JSON in UTF-8: an object with ``prompt`` and whatever else of ``FIELDS``.

    Raises:
        RequestError: anything else; too large (413) or malformed (400).
    """
    if len(body) > MOST_BYTES:
        raise too_large()
    return request_of(_parse(body))


def request_of(fields: object) -> PictureRequest:
    """The request that a JSON value holds; errors as ``read_request``."""
    if not isinstance(fields, dict):
        raise RequestError(f"Expected a JSON object, got {_kind(fields)}.")
    given = {name: value for name, value in fields.items() if value is not None}
    unknown = [name for name in given if name not in FIELDS]
    if unknown:
        raise RequestError(f"Expected the fields {list(FIELDS)}, got {unknown[0][:80]!r}.")
    if "prompt" not in given:
        raise RequestError("prompt: expected a text, got none.")
    try:
        read = {name: FIELDS[name](name, value) for name, value in given.items()}
    except InputError as error:
        raise RequestError(str(error)) from error
    form = read.pop("format", FORMATS[0])
    return PictureRequest(arguments=read, format=form)


def too_large() -> RequestError:
    """Of a body that is longer than is read."""
    return RequestError(f"Expected a body of at most {MOST_BYTES} bytes, got more.", 413)


def status_of(error: BaseException) -> int:
    """The status of HTTP for what a request ended in."""
    if isinstance(error, RequestError):
        return error.status
    kinds: tuple[tuple[type[BaseException], int], ...] = (
        (InputError, 400),
        (ConfigError, 400),  # a picture to start from, and no encoder
        (QueueFullError, 429),
        (DeadlineError, 504),
        (Cancelled, 503),
    )
    return next((status for kind, status in kinds if isinstance(error, kind)), 500)


def message_of(error: BaseException) -> str:
    """What a client is told: our own errors in their words, no others."""
    told = status_of(error) != 500
    return str(error) if told else "The picture could not be drawn; the server's log says why."


def png_of(image: np.ndarray) -> bytes:
    """A PNG of a picture uint8 [H, W, 3]."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)  # quick: a service compresses live
    return file.getvalue()


def answer_of(picture: BatchedPicture) -> dict[str, Any]:
    """A picture as JSON: the PNG in base64, its seed, what was cut off, and times."""
    image = base64.b64encode(png_of(picture.image)).decode()
    return {"image": image, **details_of(picture)}


def details_of(picture: BatchedPicture) -> dict[str, Any]:
    """What an answer says beside the picture: its seed, what was cut off, and times."""
    return {"truncated": picture.truncated, **picture.summary()}


def preview_of(step: int, steps: int, image: np.ndarray) -> dict[str, Any]:
    """A preview as JSON."""
    return {"step": step, "steps": steps, "preview": base64.b64encode(png_of(image)).decode()}


def headers_of(picture: BatchedPicture) -> dict[str, str]:
    """What stands beside a PNG: its seed, whether the prompt was cut, times in milliseconds."""
    times = {k: v for k, v in picture.summary().items() if k.endswith("_ms")}
    return {
        "X-Seed": str(picture.seed),
        "X-Truncated": str(int(bool(picture.truncated))),
        "Server-Timing": ", ".join(f"{k.removesuffix('_ms')};dur={v}" for k, v in times.items()),
    }


# -- fields ----------------------------------------------------------------------------------------


def _parse(body: bytes) -> object:
    try:
        return json.loads(body, parse_constant=_no_constant, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        # a JSONDecodeError's own text quotes nothing of the body
        raise RequestError(f"Expected JSON in UTF-8, got {str(error)[:200]}.") from error


def _no_constant(name: str) -> float:
    raise ValueError(f"{name}, which is no JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field twice")
    return found


def _kind(value: object) -> str:
    kinds = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or len(value) > MOST_CHARACTERS:
        got = f"{len(value)} characters" if isinstance(value, str) else _kind(value)
        raise InputError(f"{name}: expected a text of at most {MOST_CHARACTERS}, got {got}.")
    return value


def _format(name: str, value: object) -> str:
    if value not in FORMATS:
        raise InputError(f"{name}: expected one of {list(FORMATS)}, got {str(value)[:80]!r}.")
    return str(value)


def _seed(name: str, value: object) -> int:
    return whole_number(name, value, 0, 2**64 - 1)


def _pair(name: str, value: object) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise InputError(f"{name}: expected [height, width] in whole pixels, got {_kind(value)}.")
    first, second = (whole_number(name, side, 0, 1 << 16) for side in value)
    return first, second


def _image(name: str, value: object) -> np.ndarray:
    """uint8 [H, W, 3] of a PNG or JPEG in base64; its size is checked before it is decoded."""
    from PIL import Image

    try:
        content = base64.b64decode(_base64(name, value), validate=True)
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise InputError(f"{name}: expected at most {MOST_PIXELS} pixels, got more.")
            return np.array(opened.convert("RGB"), np.uint8)
    except (binascii.Error, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{name}: expected a PNG or JPEG in base64, got something else."
        ) from error


def _base64(name: str, value: object) -> str:
    if not isinstance(value, str) or not value.isascii():
        raise InputError(f"{name}: expected a PNG or JPEG in base64, got something else.")
    return value


FIELDS: Mapping[str, Callable[[str, object], Any]] = {
    "prompt": _text,
    "negative_prompt": _text,
    "preset": _text,
    "seed": _seed,
    "guidance_scale": finite_number,
    "guidance_rescale": finite_number,
    "image": _image,
    "strength": finite_number,
    "original_size": _pair,
    "crops_coords_top_left": _pair,
    "target_size": _pair,
    "aesthetic_score": finite_number,
    "negative_aesthetic_score": finite_number,
    "deadline": finite_number,
    "format": _format,
}
"""What a request may hold, and how each is read."""
