"""Progress in a log file: a line a finished stage, one now and then for the others, time left."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("rich")

from blockcache.tools.report.progress import Stage, StageProgress, clock


def test_time_left_is_known_after_the_first_unit_however_long_it_took():
    stage = Stage("profile", began=0.0, first=0)
    stage.hear(0, 16, 0.0)
    assert stage.left(100.0) is None
    assert stage.line(100.0) == "profile  0/16  0:01:40, time left unknown"
    stage.hear(1, 16, 200.0)
    assert stage.left(200.0) == 15 * 200
    assert stage.line(260.0) == "profile  1/16  0:04:20, 0:49:00 left"  # it counts down
    stage.hear(16, 16, 3000.0)
    assert stage.line(3001.0) == "profile  16/16  done in 0:50:00"


def test_units_of_an_earlier_run_took_no_time():
    stage = Stage("engines", began=10.0, first=30)
    stage.hear(30, 33, 10.0)
    stage.hear(31, 33, 70.0)
    assert stage.left(70.0) == 120


@given(
    st.integers(1, 1000), st.integers(1, 1000), st.floats(0.1, 1e5), st.floats(0, 1e5)
)  # fmt: skip
def test_time_left_is_never_negative_and_ends_at_zero(done, more, seconds, later):
    stage = Stage("s", began=0.0, first=0)
    stage.hear(done, done + more, seconds)
    assert stage.left(seconds + later) >= 0
    assert stage.left(seconds) == pytest.approx(seconds / done * more)
    stage.hear(done + more, done + more, 2 * seconds)
    assert stage.finished
    assert stage.left(2 * seconds) == 0


def test_a_unit_that_takes_long_is_not_almost_done():
    stage = Stage("presets", began=0.0, first=0)
    stage.hear(2, 10, 2.0)  # two quick ones; the third is slow
    assert stage.left(2.0) == 8
    assert stage.left(180.0) == 60 * 8 - 178


def test_an_unknown_length_is_counted():
    stage = Stage("download", began=0.0, first=0)
    stage.hear(3, 0, 5.0)
    assert not stage.finished
    assert stage.line(5.0) == "download  3  0:00:05, time left unknown"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01")]
)
def test_a_time_reads_as_a_clock(seconds, text):
    assert clock(seconds) == text


def test_without_a_terminal_a_finished_stage_is_a_line_once(capsys):
    with StageProgress() as progress:
        for done in range(3):
            progress("profile dpm-20", done, 2)
        progress("profile dpm-20", 2, 2)
    assert capsys.readouterr().err == "profile dpm-20  2/2  done in 0:00:00\n"


def test_without_a_terminal_a_running_stage_is_heard_of(monkeypatch):
    written, lines = threading.Event(), []

    class Stream:
        def write(self, text):
            lines.append(text)
            if "left" in text:
                written.set()

        def flush(self):
            pass

        def isatty(self):
            return False

    monkeypatch.setattr("sys.stderr", Stream())
    with StageProgress(seconds_a_line=0.01) as progress:
        progress("presets", 0, 1)
        progress("profile", 0, 2)
        assert written.wait(30)
    assert "profile  0/2  0:00:00, time left unknown" in lines
    assert not any("presets" in line for line in lines)  # it waits for what runs inside it


def test_on_a_terminal_stages_are_bars_with_our_time_left(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("blockcache.tools.report.progress.Stage.left", lambda self, now: 754.0)
    with StageProgress() as progress:
        progress("profile", 1, 2)
    assert "0:12:34" in capsys.readouterr().err


def test_a_stage_that_begins_again_is_told_from_its_own_beginning(capsys):
    with StageProgress(seconds_a_line=60) as progress:
        for _ in range(2):  # of two presets
            progress("align", 0, 2)
            progress("align", 2, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("align")]
    assert lines == ["align  2/2  done in 0:00:00"] * 2
