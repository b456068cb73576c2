"""Signals end a command in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

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


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as stop, interruptible():
        signal.raise_signal(signal.SIGTERM)
    assert stop.value.exit_code == 143
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
