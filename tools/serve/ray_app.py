"""A bundle behind Ray Serve: a request in JSON, a PNG back; each replica a batched pipeline.

    serve run blockcache.tools.serve.ray_app:build bundle=BUNDLE slots=8

This is for a Ray cluster of yours; ``ray_local`` is for one machine. Routing, autoscaling, health
and metrics are Ray's. What a client sends is never logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, fields
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before ray reads it: nothing phones home

from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.metrics import Counter, Gauge, Histogram
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from blockcache.runtime import (
    BatchedPicture,
    BatchedPipeline,
    BatchProgress,
    ConfigError,
    PictureFuture,
    PipelineCounters,
)
from blockcache.runtime.arguments import whole_number
from blockcache.tools.serve.requests import (
    MOST_BYTES,
    PictureRequest,
    answer_of,
    headers_of,
    message_of,
    png_of,
    preview_of,
    read_request,
    status_of,
    too_large,
)

APP = "blockcache"
"""The name of the application and of its deployment."""

_log = logging.getLogger("blockcache")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How a bundle is served; what ``build`` takes by name."""

    bundle: str
    slots: int = 8  # of a replica
    queue: int = 32  # requests that wait at a replica, beyond its slots
    presets: str = ""  # by commas, the default first; "" takes all
    height: int = 0  # in pixels; 0 is the model's
    width: int = 0
    replicas: int = 1
    most_replicas: int = 0  # more than replicas: as many as the queue asks for, up to these
    cpus: int = 1  # of a replica, and threads of its engines
    drain_seconds: int = 60  # what runs may take so long to end when a replica stops

    def __post_init__(self) -> None:
        least = {"slots": 1, "queue": 1, "replicas": 1, "cpus": 1}
        for each in fields(self):
            if each.type == "int":
                value = getattr(self, each.name)
                whole_number(each.name, value, least.get(each.name, 0), error=ConfigError)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> ServeOptions:
        """From a command line or a config file: whole numbers may be texts.

        Raises:
            ConfigError: an unknown name, no bundle, or a value that is no whole number.
        """
        known = {each.name: each.type for each in fields(cls)}
        unknown = sorted(given.keys() - known.keys())
        if unknown or "bundle" not in given:
            got = f"{unknown[0]!r}" if unknown else "no bundle"
            raise ConfigError(f"Expected bundle=FOLDER and any of {list(known)}, got {got}.")
        read: dict[str, Any] = {
            name: _number(name, value) if known[name] == "int" else str(value)
            for name, value in given.items()
        }
        return cls(**read)


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application for ``serve run``; ``args`` are those of ``ServeOptions``.

    Raises:
        ConfigError: see ``ServeOptions.of``.
    """
    return application(ServeOptions.of(args))


def application(options: ServeOptions) -> serve.Application:
    """The application: replicas that each take as many requests as they have room for."""
    most = max(options.replicas, options.most_replicas)
    scaling = AutoscalingConfig(
        min_replicas=options.replicas,
        max_replicas=most,
        target_ongoing_requests=options.slots,  # a replica more where slots are not enough
    )
    deployment = serve.deployment(Pictures).options(
        name=APP,
        num_replicas="auto" if most > options.replicas else options.replicas,
        autoscaling_config=scaling if most > options.replicas else None,
        max_ongoing_requests=options.slots + options.queue,
        max_queued_requests=most * (options.slots + options.queue),
        graceful_shutdown_timeout_s=options.drain_seconds,
        health_check_period_s=5,
        ray_actor_options={"num_cpus": options.cpus},
    )
    return deployment.bind(options)


class Pictures:
    """One replica. It takes requests once it has drawn a first picture.

    ``POST /`` draws; ``GET /healthz`` says that this replica runs, and what it has counted.
    """

    def __init__(self, options: ServeOptions) -> None:
        self._pipeline = BatchedPipeline.open(
            options.bundle,
            slots=options.slots,
            queue=options.queue,
            presets=options.presets.split(",") if options.presets else None,
            height=options.height or None,
            width=options.width or None,
            threads=options.cpus,
        )
        self._pipeline.warm_up()
        self._metrics = _Metrics()

    async def __call__(self, request: Request) -> Response:
        """Answer one request of HTTP."""
        if request.url.path.rstrip("/").endswith("/healthz"):
            counted = self._pipeline.counters().to_json()
            return JSONResponse({"running": self._pipeline.running, **counted})
        if request.method != "POST":
            return JSONResponse({"error": "Expected POST with a JSON body."}, 405)
        try:
            response = await self._draw(request)
        except asyncio.CancelledError:  # the client went away
            self._metrics.ended(499, self._pipeline.counters())
            raise
        except Exception as error:
            response = _refused(error)
        self._metrics.ended(response.status_code, self._pipeline.counters())
        return response

    def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        if not self._pipeline.running:
            raise RuntimeError("The pipeline's thread has ended.")

    def __del__(self) -> None:
        """Ray has drained the replica: what is left after ``drain_seconds`` is cancelled."""
        with contextlib.suppress(AttributeError):  # it was never opened
            self._pipeline.close(drain=False)

    async def _draw(self, request: Request) -> Response:
        asked = await asyncio.to_thread(read_request, await _body(request))
        if asked.format == "stream":
            return self._stream(asked)
        picture = await asyncio.wrap_future(self._submit(asked))
        self._metrics.drawn(picture)
        if asked.format == "json":
            return JSONResponse(await asyncio.to_thread(answer_of, picture))
        png = await asyncio.to_thread(png_of, picture.image)
        return Response(png, media_type="image/png", headers=headers_of(picture))

    def _submit(self, asked: PictureRequest, **others: Any) -> PictureFuture:
        return self._pipeline.submit(**asked.arguments, **others)

    def _stream(self, asked: PictureRequest) -> Response:
        """Lines of JSON: previews, then the picture or an error."""
        loop, lines = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None]()

        def put(line: dict[str, Any] | None) -> None:
            loop.call_soon_threadsafe(lines.put_nowait, line)

        def preview(done: BatchProgress) -> None:
            (image,) = self._pipeline.decode(done.latents)
            put(preview_of(done.step, done.steps, image))

        def end(done: Future[BatchedPicture]) -> None:
            error = done.exception()
            put(answer_of(done.result()) if error is None else {"error": message_of(error)})
            put(None)

        future = self._submit(asked, callback=preview)
        future.add_done_callback(end)
        return StreamingResponse(_sent(lines, future), media_type="application/x-ndjson")


async def _sent(
    lines: asyncio.Queue[dict[str, Any] | None], future: PictureFuture
) -> AsyncIterator[bytes]:
    """What is put in the queue, a line each; where the client goes away, the request ends."""
    try:
        while (line := await lines.get()) is not None:
            yield json.dumps(line).encode() + b"\n"
    finally:
        future.cancel()  # False where it has ended


async def _body(request: Request) -> bytes:
    """The body, read no further than it may be long."""
    read = bytearray()
    async for part in request.stream():
        read += part
        if len(read) > MOST_BYTES:
            raise too_large()
    return bytes(read)


def _refused(error: Exception) -> Response:
    status = status_of(error)
    if status == 500:  # its kind and ours alone: a message may quote what the client sent
        _log.error("A request failed: %s", type(error).__name__)
    again = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse({"error": message_of(error)}, status, headers=again)


class _Metrics:
    """What Ray exports for Prometheus, as ``ray_blockcache_...``."""

    def __init__(self) -> None:
        self._requests = Counter("blockcache_requests", "Ended requests.", tag_keys=("status",))
        self._seconds = Histogram(
            "blockcache_seconds",
            "Of pictures, by part: text, waiting, denoising, decode.",
            boundaries=[0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100],
            tag_keys=("part",),
        )
        self._pending = Gauge("blockcache_pending", "Requests that have not ended.")
        self._shared = Gauge("blockcache_images_a_launch", "The mean batch of a launch.")
        self._sums = {
            name: Counter(f"blockcache_{name}", f"{name} of the continuous batch.")
            for name in ("ticks", "steps", "launches", "launches_saved")
        }
        self._before = dict.fromkeys(self._sums, 0)

    def drawn(self, picture: BatchedPicture) -> None:
        """Note the times of a picture."""
        for name, value in picture.summary().items():
            if name.endswith("_ms"):
                self._seconds.observe(value / 1e3, tags={"part": name.removesuffix("_ms")})

    def ended(self, status: int, counters: PipelineCounters) -> None:
        """Note the end of a request, and what the pipeline has counted by now."""
        self._requests.inc(tags={"status": str(status)})
        self._pending.set(counters.pending)
        self._shared.set(counters.batch.images_a_launch)
        now = counters.batch.to_json()
        for name, metric in self._sums.items():
            total = now[name]
            assert isinstance(total, int)
            if total > self._before[name]:
                metric.inc(total - self._before[name])
                self._before[name] = total


def _number(name: str, value: object) -> int:
    try:
        return int(str(value))
    except ValueError as error:
        raise ConfigError(f"{name}: expected a whole number, got {str(value)[:80]!r}.") from error
