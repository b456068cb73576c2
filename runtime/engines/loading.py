"""Loads engines once a process: sessions share them, and the last session frees them."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.bundles.bundle_files import FileIdentity
from blockcache.runtime.engines.engine import Backend, Engine
from blockcache.runtime.plan import Segment

_Content: TypeAlias = tuple[tuple[str, FileIdentity], ...]  # of a graph and of its weights
_Key: TypeAlias = tuple[str, str, _Content]  # backend, path and content of a segment
_shared: weakref.WeakValueDictionary[_Key, Engine] = weakref.WeakValueDictionary()
_key_locks: weakref.WeakValueDictionary[_Key, threading.Lock] = weakref.WeakValueDictionary()
_key_locks_guard = threading.Lock()  # held for a look-up, never while something loads
_serial_lock = threading.Lock()


def load_engines(
    backend: Backend, bundle: Bundle, segments: Sequence[Segment], plans: Bundle | None = None
) -> dict[str, Engine]:
    """The engines of ``segments`` by name, in that order; where several fail, the first's error.

    Where ``plans`` is given, its engines are refitted with the weights of ``bundle``.
    """
    load = functools.partial(load_shared, backend, bundle, plans=plans)
    workers = backend.loads_at_once
    if workers < 2:  # without a pool: a GPU's context belongs to the caller's thread
        return {segment.name: load(segment) for segment in segments}
    with ThreadPoolExecutor(workers, "blockcache-load") as pool:
        loads = [pool.submit(load, segment) for segment in segments]
        try:
            return {s.name: done.result() for s, done in zip(segments, loads, strict=True)}
        finally:
            for waiting in loads:  # after an error nobody needs the rest
                waiting.cancel()
            loads.clear()  # an error that is kept must not keep the other engines


def load_shared(
    backend: Backend, bundle: Bundle, segment: Segment, plans: Bundle | None = None
) -> Engine:
    """The engine of a segment, loaded once a process and freed with its last session.

    Raises:
        EngineError: the library refuses the segment.
        BundleIntegrityError: its files are not those that were checked when the bundle opened.
    """
    path = bundle.segment_path(segment).resolve()
    files = bundle.segment_files(segment)
    content = tuple((bundle.manifest.files[name].sha256, bundle.files[name]) for name in files)
    key = (backend.name, str(path), content)
    with _key_lock(key) if backend.loads_at_once > 1 else _serial_lock:
        engine = _shared.get(key)
        if engine is None:
            engine = (
                backend.load(bundle, segment)
                if plans is None
                else backend.load_refitted(plans, bundle, segment)
            )
            bundle.require_unchanged(segment)  # the library opened the files by their paths
            _shared[key] = engine
        return engine


def _key_lock(key: _Key) -> threading.Lock:
    """The lock of one engine, which lives as long as a thread holds it or waits for it."""
    with _key_locks_guard:
        lock = _key_locks.get(key)
        if lock is None:
            lock = _key_locks[key] = threading.Lock()
        return lock


def _begin_anew() -> None:
    """In a forked child: its engines are its own, and locks that others held stay in the parent."""
    global _key_locks_guard, _serial_lock
    _shared.clear()
    _key_locks.clear()
    _key_locks_guard, _serial_lock = threading.Lock(), threading.Lock()


os.register_at_fork(after_in_child=_begin_anew)
