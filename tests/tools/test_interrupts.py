"""Signals end a command in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from blockcache.tools import interrupts
from blockcache.tools.interrupts import Interrupted, interruptible

COMMAND = """
import os, signal, sys
from blockcache.tools import cli
def app():
    def run(prog_name):
        try:
            os.kill(os.getpid(), signal.{name})
            import time
            time.sleep(60)
        except Exception:  # a library on the way that catches too much
            pass
    return run
cli._app = app
sys.argv = ["blockcache", *"{command}".split()]
cli.main()
"""


@pytest.mark.parametrize(
    ("name", "command", "code", "message"),
    [
        ("SIGINT", "compile", 130, "interrupted; the same command resumes\n"),
        ("SIGTERM", "build", 143, "interrupted; the same command resumes\n"),
        ("SIGTERM", "run compile", 143, "interrupted\n"),
    ],
)
def test_a_signal_is_one_line_and_an_exit_code(tmp_path, name, command, code, message):
    made = subprocess.run(
        [sys.executable, "-c", COMMAND.format(name=name, command=command)],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (made.returncode, made.stdout, made.stderr) == (code, "", message)


def test_ctrl_c_is_one_line_while_the_command_is_imported(tmp_path):
    """numpy, which takes longest at the start, is where the signal comes."""
    (tmp_path / "numpy.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    made = subprocess.run(
        [sys.executable, "-m", "blockcache.tools.cli", "compile"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (made.returncode, made.stderr) == (130, "interrupted; the same command resumes\n")


@pytest.mark.parametrize("disguise", [ImportError("initialization failed"), SystemExit(1)])
def test_a_signal_that_a_library_turns_into_an_error_of_its_own_stays_one(disguise):
    def library():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Interrupted:
            raise disguise from None

    with pytest.raises(Interrupted) as stop, interruptible():
        library()
    assert stop.value.exit_code == 143
    with pytest.raises(type(disguise)), interruptible():
        raise disguise  # without a signal it is what it says


def hours_of_work(seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
    return "nobody stopped it"


def test_a_signal_that_a_destructor_drops_comes_again(capsys):
    class Dropped:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def work():
        Dropped()
        return hours_of_work()

    with pytest.raises(Interrupted) as stop, interruptible():
        work()
    assert stop.value.exit_code == 130
    assert capsys.readouterr().err == ""


def test_a_signal_that_a_library_swallows_comes_again(monkeypatch):
    monkeypatch.setattr(interrupts, "AGAIN_S", 0.05)

    def optional_import():
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            return

    def work():
        optional_import()
        return hours_of_work()

    with pytest.raises(Interrupted) as stop, interruptible():
        work()
    assert stop.value.exit_code == 143
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_other_faults_of_destructors_are_reported_as_ever():
    class Faulty:
        def __del__(self):
            raise KeyError("faulty")

    def work():
        Faulty()

    seen, before = [], sys.unraisablehook
    sys.unraisablehook = seen.append
    try:
        with interruptible():
            work()
        assert sys.unraisablehook == seen.append
    finally:
        sys.unraisablehook = before
    assert [type(lost.exc_value) for lost in seen] == [KeyError]


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as stop, interruptible():
        signal.raise_signal(signal.SIGTERM)
    assert stop.value.exit_code == 143
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
