"""What draws: a replica with a batched pipeline for each bundle that was asked of it."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ray import serve
from ray.serve.metrics import Counter, Gauge, Histogram

from blockcache.runtime import (
    BatchedPicture,
    BatchedPipeline,
    BatchProgress,
    PictureFuture,
    PipelineCounters,
)
from blockcache.tools.serve.ray_options import ServeOptions
from blockcache.tools.serve.requests import (
    PictureRequest,
    RequestError,
    answer_of,
    headers_of,
    message_of,
    png_of,
    preview_of,
    read_request,
    status_of,
)

JSON = "application/json"
PNG = "image/png"
LINES = "application/x-ndjson"

_log = logging.getLogger("blockcache")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The head of an answer over HTTP, and its content."""

    status: int
    content: bytes
    media: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)
    goes_on: bool = False  # more of the content follows, as bytes


def no_bundle(names: Sequence[str]) -> RequestError:
    """Of a request for a bundle that is not there."""
    return RequestError(f"Expected a bundle of {list(names)}, got another.", 404)


class Pictures:
    """One replica. It takes requests once it has drawn a first picture with the first bundle."""

    async def __init__(self, options: ServeOptions) -> None:  # type: ignore[misc]  # Ray awaits it
        self._bundles = tuple(options.bundles)
        self._open: dict[str, _Opened] = {}

        async def opened(name: str) -> _Opened:
            self._open[name] = made = await asyncio.to_thread(_Opened, name, options)
            return made

        # Ray sends a bundle's requests where it is open, and closes the one used longest ago.
        self._opened = serve.multiplexed(max_num_models_per_replica=options.open_bundles)(opened)
        await self._opened(self._bundles[0])

    async def answer(self, bundle: str, body: bytes) -> AsyncIterator[Answer | bytes]:
        """Answer a request of HTTP: an answer, and what follows it.

        Args:
            bundle: its name; "" is the first. While an application is replaced by another, the
                ingress may know names that are not there any more.
            body: JSON, as ``read_request`` takes it.
        """
        try:
            asked = await asyncio.to_thread(read_request, body)
            name = bundle or self._bundles[0]
            if name not in self._bundles:
                raise no_bundle(self._bundles)
            opened: _Opened = await self._opened(name)
            # Until the submit nothing is awaited, in which Ray could close the bundle again.
            parts = _lines if asked.format == "stream" else _picture
            async for part in parts(opened, asked):
                yield part
        except Exception as error:
            yield _refused(error)

    async def counters(self) -> dict[str, Any]:
        """What was counted, by bundle."""
        found = {name: each.pipeline.counters().to_json() for name, each in self._at_work()}
        return {"running": self._running, "bundles": found}

    def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        if not self._running:
            raise RuntimeError("A pipeline's thread has ended.")

    def __del__(self) -> None:
        """Ray has drained the replica: what is left after ``drain_seconds`` is cancelled."""
        for _, opened in self._at_work():
            opened.close(drain=False)

    @property
    def _running(self) -> bool:
        return all(opened.pipeline.running for _, opened in self._at_work())

    def _at_work(self) -> list[tuple[str, _Opened]]:
        return [each for each in self._open.items() if not each[1].closed]


class _Opened:
    """A bundle that a replica has open, and its metrics."""

    closed = True  # unless it was opened

    def __init__(self, name: str, options: ServeOptions) -> None:
        self.pipeline = BatchedPipeline.open(
            options.bundles[name],
            slots=options.slots,
            queue=options.queue,
            presets=options.presets.split(",") if options.presets else None,
            height=options.height or None,
            width=options.width or None,
            threads=options.cpus,
        )
        self.closed = False
        self.pipeline.warm_up()
        self.metrics = _Metrics(name)

    def submit(self, asked: PictureRequest, **others: Any) -> PictureFuture:
        """Ask for the picture; what comes of it is counted."""
        future = self.pipeline.submit(**asked.arguments, **others)
        future.add_done_callback(lambda _: self.metrics.note(self.pipeline.counters()))
        return future

    def close(self, drain: bool) -> None:
        """Free it; once."""
        if not self.closed:
            self.closed = True
            self.pipeline.close(drain)

    def __del__(self) -> None:
        """Ray calls this where it makes room for another bundle."""
        self.close(drain=True)


async def _picture(opened: _Opened, asked: PictureRequest) -> AsyncIterator[Answer]:
    """The picture, once it is there."""
    future = opened.submit(asked)
    try:
        picture = await asyncio.wrap_future(future)
    finally:
        future.cancel()  # the client went away; nothing where it has ended
    opened.metrics.drawn(picture)
    if asked.format == "json":
        content = await asyncio.to_thread(lambda: json.dumps(answer_of(picture)).encode())
        yield Answer(status=200, content=content)
    else:
        png = await asyncio.to_thread(png_of, picture.image)
        yield Answer(status=200, content=png, media=PNG, headers=headers_of(picture))


async def _lines(opened: _Opened, asked: PictureRequest) -> AsyncIterator[Answer | bytes]:
    """Lines of JSON: previews, then the picture or an error."""
    loop, lines = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None]()

    def put(line: dict[str, Any] | None) -> None:
        loop.call_soon_threadsafe(lines.put_nowait, line)

    def preview(done: BatchProgress) -> None:
        (image,) = opened.pipeline.decode(done.latents)
        put(preview_of(done.step, done.steps, image))

    def end(done: Future[BatchedPicture]) -> None:
        error = done.exception()
        if error is None:
            opened.metrics.drawn(done.result())
        put(answer_of(done.result()) if error is None else {"error": message_of(error)})
        put(None)

    future = opened.submit(asked, callback=preview)
    future.add_done_callback(end)
    yield Answer(status=200, content=b"", media=LINES, goes_on=True)
    try:
        while (line := await lines.get()) is not None:
            yield json.dumps(line).encode() + b"\n"
    finally:
        future.cancel()  # the client went away; nothing where it has ended


def _refused(error: Exception) -> Answer:
    status = status_of(error)
    if status == 500:  # its kind and ours alone: a message may quote what the client sent
        _log.error("A request failed: %s", type(error).__name__)
    again = {"Retry-After": "1"} if status in (429, 503) else {}
    content = json.dumps({"error": message_of(error)}).encode()
    return Answer(status=status, content=content, headers=again)


class _Metrics:
    """What Ray exports of a bundle for Prometheus, as ``ray_blockcache_...``."""

    def __init__(self, bundle: str) -> None:
        tags = ("bundle",)
        self._seconds = Histogram(
            "blockcache_seconds",
            "Of pictures, by part: text, waiting, denoising, decode.",
            boundaries=[0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100],
            tag_keys=("bundle", "part"),
        )
        self._pending = Gauge("blockcache_pending", "Requests that have not ended.", tags)
        self._shared = Gauge("blockcache_images_a_launch", "The mean batch of a launch.", tags)
        self._sums = {
            name: Counter(f"blockcache_{name}", f"{name} of the continuous batch.", tags)
            for name in ("ticks", "steps", "launches", "launches_saved")
        }
        for metric in (self._seconds, self._pending, self._shared, *self._sums.values()):
            metric.set_default_tags({"bundle": bundle})
        self._lock = threading.Lock()  # requests end in several threads
        self._before = dict.fromkeys(self._sums, 0)

    def drawn(self, picture: BatchedPicture) -> None:
        """Note the times of a picture."""
        for name, value in picture.summary().items():
            if name.endswith("_ms"):
                self._seconds.observe(value / 1e3, tags={"part": name.removesuffix("_ms")})

    def note(self, counters: PipelineCounters) -> None:
        """Note what the pipeline has counted by now."""
        self._pending.set(counters.pending)
        self._shared.set(counters.batch.images_a_launch)
        now = counters.batch.to_json()
        with self._lock:
            for name, metric in self._sums.items():
                total = now[name]
                assert isinstance(total, int)
                if total > self._before[name]:
                    metric.inc(total - self._before[name])
                    self._before[name] = total
