"""Triton by PyTriton on this machine, where the extra ``triton`` is installed.

PyTriton wants numpy below 2, so this runs in an environment of its own::

    python -m pytest -m serve tests/tools/serve/test_triton.py

One server serves all tests; the last of them ends it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

pytest.importorskip("pytriton", reason="the extra triton is not installed")
psutil = pytest.importorskip("psutil")
pytest.importorskip("onnxruntime")

from blockcache import Pipeline  # noqa: E402

pytestmark = pytest.mark.serve

SECONDS = 240
"""To come up; fifteen on a quiet machine."""


class Server:
    """``triton_app`` in a process of its own."""

    def __init__(self, bundle, log):
        with socket.socket() as http, socket.socket() as grpc, socket.socket() as metrics:
            for each in (http, grpc, metrics):
                each.bind(("127.0.0.1", 0))
            self.http, self.grpc, self.metrics = (
                each.getsockname()[1] for each in (http, grpc, metrics)
            )
        command = [sys.executable, "-m", "blockcache.tools.serve.triton_app", str(bundle)]
        command += ["--slots", "2", "--http-port", str(self.http), "--grpc-port", str(self.grpc)]
        command += ["--metrics-port", str(self.metrics)]
        # Triton's Python backend must load this interpreter's libpython, not the system's.
        paths = [sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH", "")]
        environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment
            )
        until = time.monotonic() + SECONDS
        while not self.ready():
            assert self.process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.2)

    def ready(self):
        try:
            return self.get("v2/models/pictures/ready") is not None
        except OSError:
            return False

    def get(self, path, port=None):
        with urllib.request.urlopen(f"http://127.0.0.1:{port or self.http}/{path}") as answer:
            return answer.read().decode()

    def draw(self, client, **asked):
        """The picture uint8 [H, W, 3], and the answer."""
        request = np.array([json.dumps(asked).encode()])
        found = client.infer_sample(request=request)
        return found["image"], json.loads(found["answer"][0])


@pytest.fixture(scope="module")
def bundle(pipeline_bundle):
    return pipeline_bundle("sd")


@pytest.fixture(scope="module")
def server(bundle, tmp_path_factory):
    made = Server(bundle.folder, tmp_path_factory.mktemp("triton") / "server.log")
    yield made
    started = psutil.Process(made.process.pid).children(recursive=True) if made.ready() else []
    made.process.kill()
    for each in started:
        if each.is_running():
            each.kill()


@pytest.fixture(params=["http", "grpc"])
def client(server, request):
    from pytriton.client import ModelClient

    address = f"{request.param}://127.0.0.1:{getattr(server, request.param)}"
    with ModelClient(address, "pictures", init_timeout_s=60) as made:
        yield made


def draw(server, seed):
    """By a client of its own."""
    from pytriton.client import ModelClient

    with ModelClient(f"http://127.0.0.1:{server.http}", "pictures") as client:
        return server.draw(client, prompt="abc", seed=seed)[0]


def test_pictures_are_those_of_the_pipeline(server, client, bundle):
    with Pipeline.open(bundle, threads=1) as pipeline:
        wanted = pipeline("abc", "x", seeds=[3], guidance_scale=4.0).images[0]
    image, answer = server.draw(
        client, prompt="abc", negative_prompt="x", seed=3, guidance_scale=4.0
    )
    assert np.abs(image.astype(int) - wanted).max() <= 1
    assert answer["seed"] == 3


def test_what_is_wrong_is_told(server, client):
    from pytriton.client.exceptions import PyTritonClientInferenceServerError

    with pytest.raises(PyTritonClientInferenceServerError, match="Expected the fields"):
        server.draw(client, prompt="abc", steps=3)


def test_many_at_once_and_triton_counts_them(server, bundle):
    def counted():
        name = 'nv_inference_request_success{model="pictures"'
        lines = server.get("metrics", server.metrics).splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    before = counted()
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(partial(draw, server), range(6)))
    with Pipeline.open(bundle, threads=1) as pipeline:
        wanted = pipeline(["abc"] * 6, seeds=list(range(6))).images
    assert np.abs(np.stack(images).astype(int) - wanted).max() <= 1
    assert counted() - before == 6


def test_nothing_listens_beyond_this_machine(server):
    process = psutil.Process(server.process.pid)
    for each in [process, *process.children(recursive=True)]:
        for connection in each.net_connections("inet"):
            assert connection.laddr.ip.removeprefix("::ffff:") == "127.0.0.1"


def test_sigterm_finishes_what_runs(server):
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(draw, server, seed) for seed in range(2)]
        time.sleep(0.05)
        os.kill(server.process.pid, signal.SIGTERM)
        ended = [each.exception() for each in running]  # one that came after the end fails
    assert server.process.wait(60) == 0
    assert None in ended
