"""Loading: engines are shared, each is loaded once, several load at once where a library can."""

from __future__ import annotations

import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from blockcache.runtime import EmptyBackend, EngineError
from blockcache.runtime.engines import loading
from blockcache.runtime.engines.loading import load_engines, load_shared
from blockcache.runtime.engines.ort import MAX_LOADS, OrtBackend
from blockcache.runtime.engines.trt import TrtBackend

NAMES = ("prompt", "trunk_00", "block_00", "trunk_01", "block_01", "trunk_02")
SEGMENTS = tuple(SimpleNamespace(name=name, file=f"{name}.onnx") for name in NAMES)
SECONDS = 2  # that a thread waits for another before the test fails


@pytest.fixture
def bundle(tmp_path):
    """Of a bundle, what the cache of engines looks at."""
    files = {s.file: SimpleNamespace(sha256=s.name) for s in SEGMENTS}
    return SimpleNamespace(
        manifest=SimpleNamespace(files=files),
        files=dict.fromkeys(files, "as it was when the bundle opened"),
        segment_path=lambda s: Path(tmp_path, s.file),
        segment_files=lambda s: (s.file,),
        require_unchanged=lambda s: None,
    )


class LoadedEngine:
    def __init__(self, name):
        self.name = name


class SerialBackend(EmptyBackend):
    """Loads one segment at a time, and notes how many it had to."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.loaded, self.threads, self.active, self.most = [], set(), 0, 0
        self._lock = threading.Lock()

    def load(self, bundle, segment):
        with self._lock:
            self.loaded.append(segment.name)
            self.threads.add(threading.current_thread())
            self.active += 1
            self.most = max(self.most, self.active)
        try:
            return self.made(segment)
        finally:
            with self._lock:
                self.active -= 1

    def made(self, segment):
        time.sleep(0.02)  # long enough for a second thread to come in, if it may
        return LoadedEngine(segment.name)


class ParallelBackend(SerialBackend):
    """Loads several segments at once; ``after`` makes a segment wait for others to be through."""

    loads_at_once = len(SEGMENTS)

    def __init__(self, name, after=None, broken=()):
        super().__init__(name)
        self.after, self.broken = after or {}, broken
        self.through = {name: threading.Event() for name in NAMES}

    def made(self, segment):
        for other in self.after.get(segment.name, ()):
            assert self.through[other].wait(SECONDS), f"{segment.name} waits for {other}"
        self.through[segment.name].set()
        if segment.name in self.broken:
            raise EngineError(f"cannot load segment {segment.name!r}")
        return super().made(segment)


def cached(backend):
    """Names of a backend's segments in the cache, and of those whose locks are kept."""

    def names(table):
        return sorted(Path(path).stem for name, path, _ in table if name == backend.name)

    return names(loading._shared), names(loading._key_locks)


@pytest.mark.parametrize("kind", [SerialBackend, ParallelBackend])
def test_threads_that_ask_for_one_engine_load_it_once(bundle, kind):
    backend, together = kind(f"once-{kind.__name__}"), threading.Barrier(8)

    def ask():
        together.wait(SECONDS)
        return load_shared(backend, bundle, SEGMENTS[0])

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask) for _ in range(8)]
        engines = {done.result() for done in asked}
    assert len(engines) == 1
    assert backend.loaded == ["prompt"]


@pytest.mark.parametrize("kind", [SerialBackend, ParallelBackend])
def test_two_sessions_that_open_at_once_share_every_engine(bundle, kind):
    backend = kind(f"sessions-{kind.__name__}")
    with ThreadPoolExecutor(2) as pool:
        opened = [pool.submit(load_engines, backend, bundle, SEGMENTS) for _ in range(2)]
        first, second = (done.result() for done in opened)
    assert first == second
    assert sorted(backend.loaded) == sorted(NAMES)


def test_engines_come_in_the_order_of_the_segments(bundle):
    backwards = {name: NAMES[i + 1 : i + 2] for i, name in enumerate(NAMES)}
    backend = ParallelBackend("order", after=backwards)  # all wait: they must load at once
    engines = load_engines(backend, bundle, SEGMENTS)
    assert tuple(engines) == NAMES
    assert [loaded.name for loaded in engines.values()] == list(NAMES)
    assert backend.most > 1


def test_a_backend_loads_one_segment_at_a_time_unless_it_says_otherwise(bundle):
    backend = SerialBackend("serial")
    load_engines(backend, bundle, SEGMENTS[:2])
    assert backend.threads == {threading.current_thread()}
    halves = SEGMENTS[2:4], SEGMENTS[4:]
    with ThreadPoolExecutor(2) as pool:
        opened = [pool.submit(load_engines, backend, bundle, half) for half in halves]
        assert [len(done.result()) for done in opened] == [2, 2]
    assert backend.most == 1


@pytest.mark.parametrize("waits", [True, False])
def test_the_first_segment_that_fails_is_named_and_nothing_stays(bundle, waits):
    """Also where a later one fails before it; and while somebody still holds the error."""
    after = {"block_00": ["trunk_02", "block_01"]} if waits else {}
    backend = ParallelBackend(f"broken-{waits}", after, broken=("block_00", "trunk_02"))
    with pytest.raises(EngineError) as caught:
        load_engines(backend, bundle, SEGMENTS)
    assert str(caught.value) == "cannot load segment 'block_00'"
    assert cached(backend) == ([], [])
    assert not any(thread.name.startswith("blockcache-load") for thread in threading.enumerate())
    backend.broken, backend.loaded = (), []
    engines = load_engines(backend, bundle, SEGMENTS)
    assert tuple(engines) == NAMES
    assert sorted(backend.loaded) == sorted(NAMES)
    assert cached(backend) == (sorted(NAMES), [])


def test_after_a_failure_waiting_segments_are_not_loaded(bundle, monkeypatch):
    backend = ParallelBackend("cancelled", broken=("prompt", "trunk_00"))
    backend.loads_at_once = 2
    backend.after = {name: ["trunk_02"] for name in ("block_00", "trunk_01")}
    cancel, asked = Future.cancel, []

    def count(future):
        asked.append(cancel(future))
        if len(asked) == len(SEGMENTS):
            backend.through["trunk_02"].set()  # lets go what was already loading
        return asked[-1]

    monkeypatch.setattr(Future, "cancel", count)
    with pytest.raises(EngineError, match="'prompt'"):
        load_engines(backend, bundle, SEGMENTS)
    assert set(backend.loaded) <= set(NAMES[:4])


def test_a_failed_engine_is_tried_again_by_those_who_wait_for_it(bundle):
    backend, together = ParallelBackend("again", broken=("prompt",)), threading.Barrier(3)

    def ask():
        together.wait(SECONDS)
        with pytest.raises(EngineError, match="'prompt'"):
            load_shared(backend, bundle, SEGMENTS[0])

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(ask) for _ in range(3)]:
            done.result()
    assert backend.loaded == ["prompt"] * 3


def test_engines_are_freed_with_their_last_user(bundle):
    backend = ParallelBackend("freed")
    engines = load_engines(backend, bundle, SEGMENTS)
    kept = weakref.ref(engines["prompt"])
    del engines
    assert kept() is None
    assert cached(backend) == ([], [])


def test_onnxruntime_loads_side_by_side_and_names_the_first_graph_it_refuses(bundle):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    bundle.model = SimpleNamespace(precision="float32")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([], "copy", [value], [value])
    for segment in SEGMENTS:
        onnx.save(onnx.helper.make_model(graph, ir_version=9), bundle.segment_path(segment))
    backend = OrtBackend(threads=1)
    backend.name, backend.loads_at_once = "ort-side-by-side", 3
    assert tuple(load_engines(backend, bundle, SEGMENTS)) == NAMES
    for segment in SEGMENTS[3:]:
        bundle.segment_path(segment).write_bytes(b"\xff")
    with pytest.raises(EngineError, match="cannot load segment 'trunk_01': "):
        load_engines(backend, bundle, SEGMENTS)
    assert cached(backend) == ([], [])


def test_the_cpu_loads_within_its_threads_and_tensorrt_one_by_one(monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    loads = [OrtBackend(threads=threads).loads_at_once for threads in (None, 1, 3, 64)]
    assert loads == [4, 1, 3, MAX_LOADS]
    assert TrtBackend.loads_at_once == 1
