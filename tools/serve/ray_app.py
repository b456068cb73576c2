"""Bundles behind Ray Serve: a request in JSON, a PNG back; each replica a batched pipeline.

    serve run blockcache.tools.serve.ray_app:build bundle=BUNDLE slots=8

This is for a Ray cluster of yours; ``ray_local`` is for one machine. An ingress speaks HTTP
(``ray_ingress``), replicas draw (``ray_replica``). Routing, autoscaling, health and metrics are
Ray's. What a client sends is never logged.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before ray reads it: nothing phones home

from ray import serve
from ray.serve.config import AutoscalingConfig

from blockcache.runtime import ConfigError
from blockcache.runtime.arguments import whole_number
from blockcache.tools.serve.ray_ingress import HEALTH, Ingress
from blockcache.tools.serve.ray_replica import Pictures

APP = "blockcache"
"""The name of the application, and of the deployment that draws."""

_LEAST = dict.fromkeys(("slots", "queue", "replicas", "ingresses", "open_bundles", "cpus"), 1)


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How bundles are served; what ``build`` takes by name."""

    bundle: str  # a folder, or several by commas, each as FOLDER or NAME=FOLDER
    slots: int = 8  # of a bundle in a replica
    queue: int = 32  # requests that wait at a replica, beyond its slots
    presets: str = ""  # by commas, the default first; "" takes all
    height: int = 0  # in pixels; 0 is the model's
    width: int = 0
    replicas: int = 1
    most_replicas: int = 0  # more than replicas: as many as the queue asks for, up to these
    ingresses: int = 1  # processes that speak HTTP with clients and send to replicas
    open_bundles: int = 3  # in a replica at a time; the one used longest ago is closed
    cpus: int = 1  # of a replica, and threads of its engines
    drain_seconds: int = 60  # what runs may take so long to end when a replica stops

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.type == "int":
                value = getattr(self, each.name)
                whole_number(each.name, value, _LEAST.get(each.name, 0), error=ConfigError)
        _ = self.bundles  # checked

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

    @property
    def bundles(self) -> dict[str, str]:
        """Folders by name, the default first; without a name the folder's own.

        Raises:
            ConfigError: two of one name, or one without a name or a folder.
        """
        found: dict[str, str] = {}
        for text in self.bundle.split(","):
            given, _, folder = text.strip().rpartition("=")
            name = given or PurePath(folder).name
            if not name or not folder or "/" in name or name in (*found, HEALTH):
                raise ConfigError(
                    f"bundle: expected folders by commas, each FOLDER or NAME=FOLDER with a name "
                    f"of its own, got {self.bundle!r}."
                )
            found[name] = folder
        return found

    @property
    def most(self) -> int:
        """Replicas there may be."""
        return max(self.replicas, self.most_replicas)


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


def _number(name: str, value: object) -> int:
    try:
        return int(str(value))
    except ValueError as error:
        raise ConfigError(f"{name}: expected a whole number, got {str(value)[:80]!r}.") from error
