"""What speaks HTTP with clients: it reads a body, sends it to a replica, and gives the answer back.

A replica that dies takes no request with it: the ingress sends it to another. A picture depends on
its request alone, so drawing it again does no harm.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.metrics import Counter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from blockcache.tools.serve.ray_options import HEALTH
from blockcache.tools.serve.ray_replica import Answer, no_bundle
from blockcache.tools.serve.requests import MOST_BYTES, RequestError, too_large

TRIES = 3
"""How often a request is sent at most: one that kills replicas must not kill them all."""

_log = logging.getLogger("blockcache")


class Ingress:
    """``POST /`` draws with the first bundle, ``POST /NAME`` with that of this name.

    ``GET /healthz`` says that a replica runs, and what it has counted.
    """

    def __init__(self, pictures: Any, bundles: tuple[str, ...]) -> None:
        self._pictures, self._bundles = pictures, bundles
        self._requests = Counter("blockcache_requests", "Ended requests.", tag_keys=("status",))
        self._resent = Counter("blockcache_resent", "Sent again, as their replica had died.")

    async def __call__(self, request: Request) -> Response:
        """Answer one request of HTTP."""
        path = request.scope["path"].removeprefix(request.scope.get("root_path", "")).strip("/")
        if path == HEALTH:
            return JSONResponse(await self._pictures.counters.remote())
        try:
            response = await self._drawn(request, path)
        except asyncio.CancelledError:  # the client went away
            self._requests.inc(tags={"status": "499"})
            raise
        except RequestError as error:
            response = _refused(str(error), error.status)
        except (BackPressureError, DeploymentUnavailableError):
            response = _refused("Expected room for a request, too many wait. Try later.", 503)
        except RayActorError:
            response = _refused(f"Expected a picture, {TRIES} replicas died drawing it.", 503)
        self._requests.inc(tags={"status": str(response.status_code)})
        return response

    async def _drawn(self, request: Request, path: str) -> Response:
        if request.method != "POST":
            raise RequestError("Expected POST with a JSON body.", 405)
        if path and path not in self._bundles:
            raise no_bundle(self._bundles)
        parts = self._parts(path, await _body(request))
        first = await anext(parts)
        assert isinstance(first, Answer)
        head = {"status_code": first.status, "headers": first.headers, "media_type": first.media}
        if first.goes_on:
            return StreamingResponse(parts, **head)
        return Response(first.content, **head)

    async def _parts(self, bundle: str, body: bytes) -> AsyncIterator[Answer | bytes]:
        """What a replica answers; where it dies, what another does, from the beginning."""
        model = bundle or self._bundles[0]  # Ray sends it to a replica that has it open
        pictures = self._pictures.options(stream=True, multiplexed_model_id=model)
        begun = False
        for again in reversed(range(TRIES)):
            parts = pictures.answer.remote(bundle, body)
            try:
                async for part in parts:
                    if not (begun and isinstance(part, Answer)):  # the client has its head already
                        yield part
                    begun = True
                return
            except RayActorError as error:
                _log.warning("A replica died under a request: %s", type(error).__name__)
                if not again:
                    raise
                self._resent.inc()
            finally:
                parts.cancel()  # the client went away; nothing where it has ended


async def _body(request: Request) -> bytes:
    """The body, read no further than it may be long."""
    read = bytearray()
    async for part in request.stream():
        read += part
        if len(read) > MOST_BYTES:
            raise too_large()
    return bytes(read)


def _refused(message: str, status: int) -> Response:
    again = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse({"error": message}, status, headers=again)
