"""Commands that are killed at random moments, a few times; and that each fault would be seen.

The kills themselves are marked slow: every start of a command traces a model. That a compile may
stop anywhere is shown without processes, too: ``tests/export/test_pipeline.py``.
"""

from __future__ import annotations

import random
import shutil
import signal
import sys

import pytest

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("torch")

from blockcache.runtime.bundles.manifest import MANIFEST
from blockcache.tools.dev import kills
from blockcache.tools.dev.kills import SIGNALS, Outcome, table, try_kills

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def works(tmp_path_factory):
    return kills.make_works(tmp_path_factory.mktemp("works"))


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_what_is_killed_leaves_the_old_or_the_new_and_resumes(works, tmp_path, index):
    rng = random.Random(0)
    outcomes = list(try_kills(works[index], SIGNALS, rng, tmp_path))
    assert [outcome for outcome in outcomes if outcome.faults] == []
    assert [o.killed_by for o in outcomes if o.killed_by] == [s.name for s in SIGNALS]


# -- every fault is seen ---------------------------------------------------------------------------


def program(monkeypatch, tmp_path, text):
    """Let a program of our own stand for the command; returns its run."""
    (tmp_path / "stand_in.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(kills, "PROGRAM", "stand_in")
    monkeypatch.setattr(kills, "PATIENCE_S", 1)
    return kills._Run.start(("compile", "{folder}"), tmp_path)


WAITS = """
import signal, subprocess, sys, time
def stop(number, frame):
    {stop}
{start}
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
time.sleep(60)
"""
WORKER = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(8)'])"


@pytest.mark.parametrize(
    ("stop", "start", "faults"),
    [
        ("sys.exit(143)", "", ["last words ''"]),
        ("raise KeyError", "", ["exit code 1", "last words 'KeyError'", "said Traceback"]),
        ("pass", "", ["exit code -9", "last words ''"]),
        (
            f"print('{kills.MESSAGE}', file=sys.stderr); sys.exit(143)", WORKER, ["left running"],
        ),
    ],
)  # fmt: skip
def test_a_bad_end_is_a_fault(monkeypatch, tmp_path, stop, start, faults):
    run = program(monkeypatch, tmp_path, WAITS.format(stop=stop, start=start))
    run.send(signal.SIGTERM)
    found = run.faults(signal.SIGTERM)
    assert len(found) == len(faults), found
    assert all(said.startswith(wanted) for said, wanted in zip(found, faults, strict=True)), found


@pytest.mark.slow
def test_a_damaged_bundle_is_a_fault(works, tmp_path):
    work = works[1]
    folder = shutil.copytree(work.after, tmp_path / "bundle")
    assert kills._differences(work, folder) == []
    (folder / "segments" / ".0.partial").touch()
    assert kills._differences(work, folder) == ["left over: ['segments/.0.partial']"]
    plan = next(folder.glob("engines/sm80/*.plan"))
    plan.write_bytes(b"")
    (found,) = kills._faults_of_bundle(folder, [work.after])
    assert found.startswith("does not open: Expected ")
    manifest = folder / MANIFEST
    manifest.write_bytes(manifest.read_bytes()[:-3])
    (found,) = kills._faults_of_bundle(folder, [work.after])
    assert found.startswith("does not open")


@pytest.mark.slow
def test_another_bundle_is_a_fault(works, tmp_path):
    folder = shutil.copytree(works[0].after, tmp_path / "bundle")
    wrong = kills._faults_of_bundle(folder, [works[0].before])
    assert wrong == ["opens, but as neither the old bundle nor the new one"]


def test_the_table_counts_kills_and_faults():
    outcomes = [
        Outcome("build", "SIGINT", 1.0, ()),
        Outcome("build", "SIGINT", 2.0, ("left running: ['7 sleep']",)),
        Outcome("build", "", 0.0, ()),
    ]
    assert table(outcomes).splitlines()[2:] == [
        "| build | SIGINT | 2 | 1 |",
        "| build | SIGTERM | 0 | 0 |",
        "| build | SIGKILL | 0 | 0 |",
        "| build | none: got through | 1 | 0 |",
    ]
