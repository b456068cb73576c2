"""Progress of long work on stderr, with the time left: bars on a terminal, else lines.

Without a terminal (a log file, a container) every finished stage is a line, and while a stage runs
a line every ten seconds says how far it is.
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

SECONDS_A_LINE = 10.0


@dataclass
class Stage:
    """How far one stage is, and when it was heard of."""

    name: str
    began: float  # seconds, as ``time.monotonic`` counts
    first: int  # units done at the first report: an earlier run's, they took no time
    done: int = 0
    total: int = 0  # 0: unknown
    heard: float = 0.0  # when ``done`` last changed
    reported: float = 0.0  # when it was last told of

    @property
    def finished(self) -> bool:
        """All units are done."""
        return 0 < self.total <= self.done

    def hear(self, done: int, total: int, now: float) -> None:
        """Take a report."""
        if done != self.done or not self.heard:
            self.heard = now
        self.done, self.total, self.reported = done, total, now

    def left(self, now: float) -> float | None:
        """Seconds to the end, at the mean pace of this run; None before its first unit.

        A unit that takes longer than those before slows the pace down while it is at work.
        """
        made = self.done - self.first
        if made <= 0 or self.total <= 0:
            return None
        pace = max((self.heard - self.began) / made, (now - self.began) / (made + 1))
        return max(0.0, pace * (self.total - self.done) - (now - self.heard))

    def line(self, now: float) -> str:
        """What a log shows: "profile dpm-20  5/16  0:00:50, 0:01:50 left"."""
        units = f"{self.done}/{self.total}" if self.total else str(self.done)
        if self.finished:
            return f"{self.name}  {units}  done in {clock(self.heard - self.began)}"
        left = self.left(now)
        end = "time left unknown" if left is None else f"{clock(left)} left"
        return f"{self.name}  {units}  {clock(now - self.began)}, {end}"


def clock(seconds: float) -> str:
    """Seconds as bars and lines show them: "0:01:50"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class StageProgress:
    """The observer of the command line: ``observer(stage, done, total)`` shows every stage.

    Use it as a context manager: it owns the terminal, or a thread that prints, until it is left.
    """

    def __init__(self, *, seconds_a_line: float = SECONDS_A_LINE) -> None:
        console = Console(stderr=True)
        self._stages: dict[str, Stage] = {}
        self._view: _Bars | _Lines = (
            _Bars(console, self._stages)
            if console.is_terminal
            else _Lines(sys.stderr, self._stages, seconds_a_line)
        )

    def __call__(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` units of ``stage`` are finished; a total of 0 means unknown."""
        now = time.monotonic()
        found = self._stages.get(stage)
        if found is None or done < found.done:  # the same stage again, of the next preset
            found = self._stages[stage] = Stage(stage, now, done)
        found.hear(done, total, now)
        self._view.show(found)

    def __enter__(self) -> StageProgress:
        self._view.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._view.stop()


class _Bars:
    """One bar a stage."""

    def __init__(self, console: Console, stages: dict[str, Stage]) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _TimeLeft(stages),
            console=console,
        )
        self._tasks: dict[str, tuple[Stage, TaskID]] = {}

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def show(self, stage: Stage) -> None:
        if stage.name not in self._tasks or self._tasks[stage.name][0] is not stage:
            self._tasks[stage.name] = (stage, self._progress.add_task(stage.name))
        _, task = self._tasks[stage.name]
        self._progress.update(task, completed=stage.done, total=stage.total or None)


class _TimeLeft(ProgressColumn):
    """Our own estimate: rich's looks back 30 seconds, and a unit of ours may take minutes."""

    def __init__(self, stages: dict[str, Stage]) -> None:
        super().__init__()
        self._stages = stages

    def render(self, task: Task) -> Text:
        left = self._stages[task.description].left(time.monotonic())
        return Text("-:--:--" if left is None else clock(left), style="progress.remaining")


class _Lines:
    """A line for a stage that ends, and one every few seconds for the one at work.

    Stages nest ("presets" while a preset's profile is measured): who reported last is at work.
    """

    def __init__(self, stream: TextIO, stages: dict[str, Stage], seconds: float) -> None:
        self._stream = stream
        self._stages = stages
        self._seconds = seconds
        self._ended: set[str] = set()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="progress", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def show(self, stage: Stage) -> None:
        if not stage.finished:
            self._ended.discard(stage.name)
        elif stage.name not in self._ended:
            self._ended.add(stage.name)
            self._print(stage.line(time.monotonic()))

    def _repeat(self) -> None:
        while not self._stopped.wait(self._seconds):
            now = time.monotonic()
            running = [stage for stage in list(self._stages.values()) if not stage.finished]
            if running:
                self._print(max(running, key=lambda stage: stage.reported).line(now))

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)
