"""Ray Serve on this machine: ``python -m pytest -m serve tests/tools/serve/test_ray.py``.

Ray starts once: one service of two replicas and two bundles serves all tests, in their order. The
last of them gives it another bundle, and ends it.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

if importlib.util.find_spec("ray") is None:
    pytest.skip("the extra ray is not installed", allow_module_level=True)
psutil = pytest.importorskip("psutil")
pytest.importorskip("onnxruntime")

import blockcache.tools.serve.ray_local  # isort: skip  # noqa: E402, F401 (sets what Ray reads)
from blockcache import Pipeline, Session  # noqa: E402
from blockcache.tools.serve.ray_app import APP, application, build  # noqa: E402
from blockcache.tools.serve.ray_options import ServeOptions  # noqa: E402

pytestmark = pytest.mark.serve

SECONDS = 240
"""To come up; ten on a quiet machine."""

METRICS_SECONDS = 30
"""Until Ray exports what was counted; it collects once a second here."""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Service:
    """``ray_local`` in a process of its own."""

    def __init__(self, bundles, log):
        self.port, self.metrics_port = free_port(), free_port()
        options = {"slots": 2, "queue": 6, "replicas": 2, "port": self.port}
        options |= {"metrics-port": self.metrics_port, "open-bundles": 1}
        command = [sys.executable, "-m", "blockcache.tools.serve.ray_local", *bundles]
        command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        environment = {**os.environ, "RAY_metrics_report_interval_ms": "1000"}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment
            )
        self.log, until = log, time.monotonic() + SECONDS
        while "ready on" not in log.read_text():
            if self.process.poll() is not None or time.monotonic() > until:
                self.end()
                pytest.fail(log.read_text()[-3000:])
            time.sleep(0.1)
        self.address = re.search(r"ready on .*, Ray on (\S+)", log.read_text())[1]
        self.statuses = Counter()  # of all requests so far

    def call(self, body=None, path=""):
        """Status, headers and content."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{path}", data)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                found = answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            found = error.code, error.headers, error.read()
        if path != "healthz":
            self.statuses[found[0]] += 1
        return found

    def status(self, seed, path=""):
        """Of a request for a picture; 0 where the connection broke."""
        try:
            return self.call({"prompt": "abc", "seed": seed}, path)[0]
        except OSError:
            return 0

    def processes(self, title=""):
        """All that it started, of this title."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        alive = [each for each in found if each.status() != psutil.STATUS_ZOMBIE]
        return [each for each in alive if title in " ".join(each.cmdline())]

    def end(self):
        """Where a test has not ended it."""
        started = self.processes() if self.process.poll() is None else []
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for each in started:
            if each.is_running():
                each.kill()

    def metrics(self, name, tag):
        """What Ray exports of us: sums by a tag."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        found = Counter()
        for line in lines:
            if line.startswith(f"ray_blockcache_{name}{{"):
                found[re.search(rf'\b{tag}="([^"]*)"', line)[1]] += float(line.rsplit(" ", 1)[1])
        return found

    @contextmanager
    def load(self, clients):
        """Clients that ask one picture after the other while the body runs; gives statuses."""
        statuses, ended = [], threading.Event()

        def client(seed):
            while not ended.is_set():
                statuses.append(self.status(seed))

        with ThreadPoolExecutor(clients) as pool:
            running = [pool.submit(client, seed) for seed in range(clients)]
            try:
                yield statuses
            finally:
                ended.set()
            for each in running:
                each.result()


PARTS = ("text", "waiting", "denoising", "decode")


def until(done, seconds=METRICS_SECONDS):
    """Wait for it; what it was last."""
    end = time.monotonic() + seconds
    while not (found := done()) and time.monotonic() < end:
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def bundle(pipeline_bundle):
    return pipeline_bundle("sd")


@pytest.fixture(scope="module")
def service(bundle, tmp_path_factory):
    log = tmp_path_factory.mktemp("ray") / "service.log"
    made = Service([f"first={bundle.folder}", f"second={bundle.folder}"], log)
    yield made
    made.end()


def picture_of(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def test_pictures_are_those_of_the_pipeline(service, bundle):
    with Pipeline.open(bundle, threads=1) as pipeline:
        wanted = pipeline("abc", "x", seeds=[3], guidance_scale=4.0).images[0]
    asked = {"prompt": "abc", "negative_prompt": "x", "seed": 3, "guidance_scale": 4.0}
    status, headers, png = service.call(asked)
    assert (status, headers["Content-Type"], headers["X-Seed"]) == (200, "image/png", "3")
    assert np.abs(picture_of(png).astype(int) - wanted).max() <= 1
    answer = json.loads(service.call({**asked, "format": "json"})[2])
    assert answer["seed"] == 3
    lines = service.call({**asked, "format": "stream"})[2].splitlines()
    *previews, last = map(json.loads, lines)
    assert all(picture_of(base64.b64decode(p["preview"])).shape == (64, 64, 3) for p in previews)
    for each in (answer, last):
        image = picture_of(base64.b64decode(each["image"]))
        assert np.abs(image.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"nope", 400, "Expected JSON in UTF-8"),
        (b'{"prompt":"a","preset":"dpm-99"}', 400, "preset: expected one that the batch"),
        (b'{"prompt":"a","deadline":0}', 504, "Expected the picture within 0 s"),
        (b" " * (17 << 20), 413, "Expected a body of at most"),
        (None, 405, "Expected POST with a JSON body"),
        ("third", 404, "Expected a bundle of ['first', 'second'], got another."),
    ],
)
def test_what_is_wrong_has_a_status_and_a_message(service, body, status, text):
    path = body if isinstance(body, str) else ""
    found, _, content = service.call(b"{}" if path else body, path)
    assert found == status
    assert json.loads(content)["error"].startswith(text)


def test_health_and_counters(service):
    status, _, content = service.call(path="healthz")
    assert status == 200
    assert json.loads(content)["running"] is True


def test_several_bundles_take_turns_in_a_replica(service):
    """One is open at a time: what the other draws ends before it is closed."""
    with ThreadPoolExecutor(4) as pool:
        paths = ["first", "second", "second", "first"] * 3
        assert set(pool.map(service.status, range(12), paths)) == {200}


def test_prometheus_finds_what_was_counted(service):
    drawn = service.statuses[200]
    wanted = {
        ("requests_total", "status"): {str(s): count for s, count in service.statuses.items()},
        ("seconds_count", "part"): dict.fromkeys(PARTS, drawn),
        ("seconds_count", "bundle"): {"first": 4 * (drawn - 6), "second": 4 * 6},
    }

    def exported():
        return {key: dict(service.metrics(*key)) for key in wanted}

    until(lambda: exported() == wanted)  # each process sends its own, once a second
    assert exported() == wanted
    pictures, rest = divmod(service.metrics("steps_total", "bundle").total(), 4)
    assert rest == 0, "each picture takes 4"
    assert pictures > drawn, "one more for each bundle that was opened"


def test_only_the_ports_of_rays_replicas_listen_beyond_this_machine(service):
    """Ray binds them to all addresses, and refuses who has no token; nothing connects out."""
    import grpc

    listening, outside = {}, []
    for process in [psutil.Process(service.process.pid), *service.processes()]:
        for each in process.net_connections("inet"):
            local = each.laddr.ip.removeprefix("::ffff:")
            if each.status == psutil.CONN_LISTEN and local != "127.0.0.1":
                listening[each.laddr.port] = process.cmdline()[0].split(":")[2]
            if each.raddr and each.raddr.ip.removeprefix("::ffff:") != "127.0.0.1":
                outside.append((process.cmdline(), each.raddr))
    assert set(listening.values()) <= {"ServeReplica"}
    assert outside == []
    for port in listening:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as refused:
                call(b"", timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_replica_that_dies_takes_no_request_with_it(service):
    """What it had taken is sent again; a new one comes soon. One that had nothing shows nothing."""
    resent = 0
    with service.load(clients=6) as statuses:
        for _ in range(3):
            before = len(statuses)
            assert until(lambda before=before: len(statuses) > before + 12)
            service.processes(f"ServeReplica:{APP}:{APP}")[0].kill()
            before = len(statuses)
            assert until(lambda before=before: len(statuses) > before + 12)
            resent = until(lambda: service.metrics("resent_total", "deployment").total(), 5)
            if resent:
                break
    assert set(statuses) == {200}
    assert resent


def test_a_new_bundle_comes_without_downtime_and_sigterm_finishes_what_runs(service, bundle):
    import ray
    from ray import serve

    fresh = ServeOptions(bundle=f"third={bundle.folder}", slots=2, queue=6, replicas=2)
    ray.init(service.address, log_to_driver=False)
    try:
        with service.load(clients=3) as statuses:
            assert until(lambda: len(statuses) > 3)
            serve.run(application(fresh), name=APP, route_prefix="/")
            before = len(statuses)
            assert until(lambda: len(statuses) > before + 3)
    finally:
        ray.shutdown()
    assert set(statuses) == {200}
    assert service.status(1, "third") == 200
    assert service.status(1, "first") == 404
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(service.status, seed) for seed in range(4)]
        time.sleep(0.05)
        os.kill(service.process.pid, signal.SIGTERM)
        statuses = [each.result() for each in running]
    assert service.process.wait(120) == 0
    assert set(statuses) <= {200, 404}, "404: it came after the end"
    assert 200 in statuses
    assert "drained" in service.log.read_text()


def test_workers_draw_an_evaluations_batches(bundle):
    from blockcache.tools.evaluation.ray_workers import LOCAL, RayWorkers
    from blockcache.tools.evaluation.sampling import DrawTask, draw_batch

    rng = np.random.default_rng(0)
    shape = (2, *bundle.model.conditions[0].shape(bundle.model.sizes)[1:])
    tasks = [
        DrawTask(
            positive={"encoder_hidden_states": rng.standard_normal(shape, np.float32)},
            negative={"encoder_hidden_states": rng.standard_normal(shape, np.float32)},
            seeds=[seed, seed + 1],
            guidance_scale=2.0,
        )
        for seed in (0, 2, 4)
    ]
    preset = bundle.preset("ddim-4")
    with Session.open(bundle, preset="ddim-4", backend="ort", threads=1) as session:
        wanted = [draw_batch(session, task) for task in tasks]
    workers = RayWorkers(LOCAL, bundle)
    try:
        drawn = dict(workers.draw(preset, tasks))
    finally:
        workers.close()
    np.testing.assert_array_equal([drawn[place] for place in range(3)], wanted)


def test_the_builder_makes_an_application():
    made = build({"bundle": "b,other=c/d", "slots": "4", "most_replicas": 3})
    assert made._bound_deployment.name == f"{APP}-ingress"
