"""Ctrl-C and SIGTERM end a command in one line, with the exit code that shells expect."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN_S = 3.0
"""After so many seconds an interrupt that a library swallowed is raised again."""

AT_ONCE_S = 0.02
"""The same for a destructor, which Python itself reports."""


class Interrupted(BaseException):
    """A signal asked the command to end; no ``except Exception`` on the way may swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number  # 130 for Ctrl-C, 143 for SIGTERM


@contextmanager
def interruptible() -> Iterator[None]:
    """Within it, both signals raise ``Interrupted``; a second one ends the process at once.

    An interrupt may come anywhere, also where it is lost: Python drops what is raised in a
    destructor, and an extension module that is being imported turns it into an ImportError, which
    its importer may expect. So it is raised again until it leaves the block, and whatever else
    leaves the block after a signal is ``Interrupted`` too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    came: list[int] = []

    def first(number: int, frame: FrameType | None) -> NoReturn:
        came.append(number)
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        again(number, frame)

    def again(number: int, frame: FrameType | None) -> NoReturn:
        signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
        raise Interrupted(came[0])

    def dropped(lost: Any) -> None:
        if isinstance(lost.exc_value, Interrupted):
            signal.setitimer(signal.ITIMER_REAL, AT_ONCE_S)
        else:
            report(lost)

    report, sys.unraisablehook = sys.unraisablehook, dropped
    before = {number: signal.signal(number, first) for number in SIGNALS}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, again)
    try:
        yield
    except BaseException as error:
        if came and not isinstance(error, Interrupted):
            raise Interrupted(came[0]) from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = report
