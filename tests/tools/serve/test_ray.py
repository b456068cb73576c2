"""Ray Serve on this machine: ``python -m pytest -m serve tests/tools/serve/test_ray.py``.

One service for all tests, of two replicas; the last test ends it.
"""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("ray.serve", reason="the extra ray is not installed")
psutil = pytest.importorskip("psutil")
pytest.importorskip("onnxruntime")

from blockcache import Pipeline  # noqa: E402
from blockcache.runtime import ConfigError  # noqa: E402

pytestmark = pytest.mark.serve

SECONDS = 240
"""To come up; ten on a quiet machine."""


class Service:
    """``ray_local`` in a process of its own."""

    def __init__(self, bundle, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        options = ["--slots", "2", "--queue", "6", "--replicas", "2", "--port", str(self.port)]
        command = [sys.executable, "-m", "blockcache.tools.serve.ray_local", str(bundle), *options]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        self.log, until = log, time.monotonic() + SECONDS
        while "ready on" not in log.read_text():
            assert self.process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.2)

    def call(self, body=None, path=""):
        """Status, headers and content."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{path}", data)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def status(self, seed):
        """Of a request for a picture; 0 where the connection broke."""
        try:
            return self.call({"prompt": "abc", "seed": seed})[0]
        except OSError:
            return 0

    def processes(self, title=""):
        """All that it started, of this title."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [each for each in found if title in " ".join(each.cmdline())]


@pytest.fixture(scope="module")
def bundle(pipeline_bundle):
    return pipeline_bundle("sd")


@pytest.fixture(scope="module")
def service(bundle, tmp_path_factory):
    made = Service(bundle.folder, tmp_path_factory.mktemp("ray") / "service.log")
    yield made
    started = made.processes() if made.process.poll() is None else []
    made.process.terminate()
    try:
        made.process.wait(60)
    except subprocess.TimeoutExpired:
        made.process.kill()
    for each in started:
        if each.is_running():
            each.kill()


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
    ],
)
def test_what_is_wrong_has_a_status_and_a_message(service, body, status, text):
    found, _, content = service.call(body)
    assert found == status
    assert json.loads(content)["error"].startswith(text)


def test_health_and_counters(service):
    status, _, content = service.call(path="healthz")
    assert status == 200
    assert json.loads(content)["running"] is True


def test_only_the_ports_of_rays_replicas_listen_beyond_this_machine(service):
    """Ray binds them to all addresses, and asks callers for its token; nothing connects out."""
    listening, outside = [], []
    for process in [psutil.Process(service.process.pid), *service.processes()]:
        for each in process.net_connections("inet"):
            local = each.laddr.ip.removeprefix("::ffff:")
            if each.status == psutil.CONN_LISTEN and local != "127.0.0.1":
                listening.append(process.cmdline()[0].split(":")[2])
            if each.raddr and each.raddr.ip.removeprefix("::ffff:") != "127.0.0.1":
                outside.append((process.cmdline(), each.raddr))
    assert set(listening) <= {"ServeReplica"}
    assert outside == []


def test_a_replica_that_dies_takes_no_others_requests_with_it(service):
    """Only what it had taken may fail; the rest is drawn, by the other, and soon by a new one."""
    statuses, dead = [], threading.Event()

    def client(first):
        for seed in range(first, first + 12):
            while (status := service.status(seed)) != 200:
                statuses.append(status)
                time.sleep(0.2)
            statuses.append(status)
            if len(statuses) > 12 and not dead.is_set():
                dead.set()
                service.processes("ServeReplica")[0].kill()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(client, range(0, 400, 100)))
    assert dead.is_set()
    assert statuses.count(200) == 48
    assert len(statuses) - 48 <= 4, "one a client at most: the one that the dead replica had"


def test_sigterm_finishes_what_runs(service):
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(service.status, seed) for seed in range(4)]
        time.sleep(0.05)
        os.kill(service.process.pid, signal.SIGTERM)
        statuses = [each.result() for each in running]
    assert service.process.wait(120) == 0
    assert set(statuses) <= {200, 404}, "404: it came after the end"
    assert 200 in statuses
    assert "drained" in service.log.read_text()


@pytest.mark.parametrize(
    ("given_", "text"),
    [
        ({"slots": "4"}, r"Expected bundle=FOLDER and any of .*, got no bundle\."),
        ({"bundle": "b", "slot": "4"}, "got 'slot'"),
        ({"bundle": "b", "slots": "four"}, "slots: expected a whole number, got 'four'"),
        ({"bundle": "b", "slots": "0"}, "slots: expected a whole number of 1 or more, got 0"),
    ],
)
def test_arguments_of_the_builder_are_checked(given_, text):
    from blockcache.tools.serve.ray_app import ServeOptions

    with pytest.raises(ConfigError, match=text):
        ServeOptions.of(given_)


def test_the_builder_makes_an_application():
    from blockcache.tools.serve.ray_app import APP, build

    made = build({"bundle": "b", "slots": "4", "most_replicas": 3})
    assert made._bound_deployment.name == APP
