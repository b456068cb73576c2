"""Batches of an evaluation, drawn by the workers of a Ray cluster.

A worker opens the bundle and draws what it is given, by the same function as a process alone and
with as many threads, so that the latents are the same. It needs neither torch nor the subject.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from blockcache.runtime import Bundle, MissingExtraError, Preset, Session
from blockcache.runtime.engines.choice import make_backend
from blockcache.tools.evaluation.sampling import DrawTask, draw_batch

LOCAL = "local"
"""In place of an address: a Ray of this process's own."""

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before ray reads it: nothing phones home


class RayWorkers:
    """As many workers as the cluster has free cores, or fewer where each takes several threads.

    Args:
        address: of a cluster, or ``LOCAL``.
        bundle: in a folder that every node has.
        backend: as of ``Session.open``.
        threads: of a worker; default 1.

    Raises:
        MissingExtraError: Ray is not installed.
    """

    def __init__(
        self, address: str, bundle: Bundle, backend: str = "auto", threads: int | None = None
    ) -> None:
        if address == LOCAL:  # before ray reads it: its sockets on 127.0.0.1
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        try:
            import ray
            from ray.util import ActorPool
        except ImportError as error:
            raise MissingExtraError.of("ray", "ray", "Drawing on several machines") from error
        if address == LOCAL:
            ray.init(address=LOCAL, include_dashboard=False, log_to_driver=False)
        else:
            ray.init(address, log_to_driver=False)
        cores = threads or 1
        count = max(1, int(ray.available_resources().get("CPU", 1)) // cores)
        make = ray.remote(num_cpus=cores)(_Worker)
        folder = bundle.folder.absolute()
        self._ray = ray
        self._pool = ActorPool([make.remote(folder, backend, cores) for _ in range(count)])

    def draw(self, preset: Preset, tasks: Iterable[DrawTask]) -> Iterator[tuple[int, np.ndarray]]:
        """The place of each task and its latents, as they are ready."""
        shared = self._ray.put(preset)
        for numbered in enumerate(tasks):
            if not self._pool.has_free():  # no task is made before a worker can take it
                yield self._pool.get_next_unordered()
            self._pool.submit(lambda worker, given: worker.draw.remote(shared, *given), numbered)
        while self._pool.has_next():
            yield self._pool.get_next_unordered()

    def close(self) -> None:
        """End the workers; a cluster goes on."""
        self._ray.shutdown()


class _Worker:
    """A process of the cluster: one bundle, the session of the preset that it drew last."""

    def __init__(self, folder: Path, backend: str, threads: int) -> None:
        self._bundle = Bundle.open(folder)
        self._backend = make_backend(backend, threads=threads, bundle=self._bundle)
        self._preset: Preset | None = None

    def draw(self, preset: Preset, place: int, task: DrawTask) -> tuple[int, np.ndarray]:
        if preset != self._preset:
            self._preset = preset
            self._session = Session(self._bundle, preset, self._backend)
        return place, draw_batch(self._session, task)
