"""ONNX Runtime does not phone home because of us: seen by strace, and by what it leaves on disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

BARE = "import onnxruntime as ort\n"
OURS = "from blockcache.runtime.engines.onnxruntime_library import ort\n"
A_SESSION = """
session = ort.InferenceSession("relu.onnx", providers=["CPUExecutionProvider"])
assert session.run(None, {"x": [-1.0, 2.0]})[0].tolist() == [0.0, 2.0]
"""
LOOKED_UP = ("socket(AF_INET", "connect(", "resolv.conf", "nsswitch.conf")
"""What a look-up of a host's name cannot do without."""


@pytest.fixture
def place(tmp_path):
    """A working folder with a model, and an empty home folder."""
    made = onnx.helper.make_tensor_value_info
    x, y = (made(name, onnx.TensorProto.FLOAT, [2]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "relu", [x], [y])
    onnx.save(onnx.helper.make_model(graph, ir_version=9), tmp_path / "relu.onnx")
    (tmp_path / "home").mkdir()
    return tmp_path


def run(place, script, *before, **environment):
    """The script in a process without the switch, and without what tells it that this is a CI."""
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "LD_LIBRARY_PATH")}
    homes = {"HOME": str(place / "home"), "XDG_CACHE_HOME": str(place / "home/.cache")}
    command = [*before, sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=place, env={**kept, **homes, **environment}, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()


def left_behind(place):
    return sorted(path.name for path in (place / "home").rglob("*") if path.is_file())


def test_nothing_is_written_into_the_users_home(place):
    run(place, OURS + A_SESSION)
    assert left_behind(place) == []


def test_the_users_own_choice_stands(place):
    """Where this version of ONNX Runtime has telemetry: it is on when the user says so."""
    run(place, BARE + A_SESSION)
    bare = left_behind(place)
    shutil.rmtree(place / "home")
    (place / "home").mkdir()
    run(place, OURS + A_SESSION, ORT_DISABLE_TELEMETRY="0")
    assert left_behind(place) == bare


def test_a_version_with_telemetry_is_seen_to_write(place):
    import onnxruntime

    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 32):
        pytest.skip("this ONNX Runtime has no telemetry on Linux")
    run(place, BARE + A_SESSION)
    assert "onnxruntime.db" in left_behind(place)


def traced(place, script):
    """Lines of the script's network calls and opened files."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace: apt-get install strace")
    trace = place / "trace.txt"
    run(place, script, "strace", "-f", "-e", "trace=network,openat", "-o", str(trace))
    return [line for line in trace.read_text().splitlines() if "ENOENT" not in line]


def test_no_host_is_looked_up(place):
    lines = traced(place, OURS + A_SESSION + "import time; time.sleep(1)")
    assert len(lines) > 100  # it was traced
    assert [line for line in lines if any(sign in line for sign in LOOKED_UP)] == []


def test_a_look_up_is_seen(place):
    script = (
        "import socket\ntry:\n    socket.getaddrinfo('host.invalid', 443)\nexcept OSError: pass"
    )
    lines = traced(place, script)
    assert any(sign in line for line in lines for sign in LOOKED_UP)
