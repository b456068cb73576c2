"""Bundles behind Ray Serve: a request in JSON, a PNG back; each replica a batched pipeline.

    serve run blockcache.tools.serve.ray_app:build bundle=BUNDLE slots=8

This is for a Ray cluster of yours; ``ray_local`` is for one machine. An ingress speaks HTTP
(``ray_ingress``), replicas draw (``ray_replica``). Routing, autoscaling, health and metrics are
Ray's. What a client sends is never logged.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before ray reads it: nothing phones home

from ray import serve
from ray.serve.config import AutoscalingConfig

from blockcache.tools.serve.ray_ingress import Ingress
from blockcache.tools.serve.ray_options import ServeOptions
from blockcache.tools.serve.ray_replica import Pictures

APP = "blockcache"
"""The name of the application, and of the deployment that draws."""


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application for ``serve run``; ``args`` are those of ``ServeOptions``.

    Raises:
        ConfigError: see ``ServeOptions.of``.
    """
    return application(ServeOptions.of(args))


def application(options: ServeOptions) -> serve.Application:
    """An ingress, and replicas that each take as many requests as they have room for."""
    room = options.slots + options.queue
    scaled = options.most > options.replicas
    scaling = AutoscalingConfig(
        min_replicas=options.replicas,
        max_replicas=options.most,
        target_ongoing_requests=options.slots,  # a replica more where slots are not enough
    )
    pictures = serve.deployment(Pictures).options(
        name=APP,
        num_replicas="auto" if scaled else options.replicas,
        autoscaling_config=scaling if scaled else None,
        max_ongoing_requests=room,
        max_queued_requests=options.most * room,
        graceful_shutdown_timeout_s=options.drain_seconds,
        health_check_period_s=5,
        ray_actor_options={"num_cpus": options.cpus},
    )
    ingress = serve.deployment(Ingress).options(
        name=f"{APP}-ingress",
        num_replicas=options.ingresses,
        max_ongoing_requests=4 * options.most * room,  # never the first to refuse
        graceful_shutdown_timeout_s=options.drain_seconds,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(pictures.bind(options), tuple(options.bundles))
