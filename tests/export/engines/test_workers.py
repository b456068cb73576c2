"""Workers of a build end with it, whatever ends it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("onnx_ir")
if sys.platform != "linux":
    pytest.skip("parent-death signals and /proc are Linux'", allow_module_level=True)

from blockcache.export.engines import workers
from blockcache.tools.interrupts import Interrupted, interruptible

SLOW = """
import os, time
from pathlib import Path
def build(recipe, plan):
    (Path(plan) / str(os.getpid())).touch()
    time.sleep(120)
"""
PARENT = """
import sys
from pathlib import Path
import slow
from blockcache.export.engines import workers
from blockcache.tools.interrupts import Interrupted, interruptible
workers.build_engine = slow.build
if __name__ == "__main__":
    jobs = [workers.Job(None, Path(sys.argv[1]), str(i), 1) for i in range(3)]
    try:
        with interruptible():
            workers.run_jobs(jobs, 2, 10**12, lambda job, built: None)
    except Interrupted as stop:
        sys.exit(stop.exit_code)
"""


def alive(pid):
    """Whether a process runs; one that ended and was not collected does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def build(tmp_path):
    """A build at work in a session of its own: the process, and the numbers of its two workers."""
    pids = tmp_path / "pids"
    pids.mkdir()
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py", pids],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    until(lambda: len(list(pids.iterdir())) == 2 or parent.poll() is not None)
    workers = [int(path.name) for path in pids.iterdir()]
    assert len(workers) == 2
    assert all(alive(pid) for pid in workers)
    yield parent, workers
    parent.kill()
    parent.communicate()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)],
)
def test_no_worker_outlives_a_build(build, number, code):
    parent, workers = build
    parent.send_signal(number)
    assert parent.wait(30) == code
    until(lambda: not any(alive(pid) for pid in workers), seconds=10)
    assert "Traceback" not in parent.stderr.read()


def test_ctrl_c_is_the_parents_alone(build):
    """A terminal sends it to every process of the group; a worker that starts would say so."""
    parent, workers = build
    for pid in workers:
        blocked = re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
        assert int(blocked[1], 16) >> (signal.SIGINT - 1) & 1
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.wait(30) == 130
    assert parent.stderr.read() == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_signal_while_a_worker_starts_comes_afterwards(number, elsewhere):
    """Also where another thread of the process gets it."""
    begin, done = threading.Event(), []

    def send():
        begin.wait()
        signal.raise_signal(number)

    def start():
        with workers._signals_held():
            begin.set()
            thread.join()
            if not elsewhere:
                signal.raise_signal(number)
            done.append("started")
        done.append("went on")

    thread = threading.Thread(target=send if elsewhere else begin.wait)
    thread.start()
    with pytest.raises(Interrupted) as stop, interruptible():
        start()
    assert (stop.value.exit_code, done) == (128 + number, ["started"])
