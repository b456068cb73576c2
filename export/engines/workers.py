"""Build engines in processes of their own, side by side within a memory budget.

The library has one logger a process, and a crash of its builder (TensorRT-RTX 1.7 has some) or an
out-of-memory kill then costs one engine and names it, instead of ending everything. No process
outlives the build: whatever ends the parent, an exception or SIGKILL, ends its workers too.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from blockcache.export.engines.engine import BuiltEngine, Recipe, build_engine
from blockcache.runtime.errors import EngineError

PR_SET_PDEATHSIG = 1
"""From Linux' ``sys/prctl.h``."""


@dataclass(frozen=True)
class Job:
    """An engine to build."""

    recipe: Recipe
    plan: Path
    key: str
    weight_bytes: int

    @property
    def memory_bytes(self) -> int:
        """What building takes: measured at up to 3.5 times the weights, and the library itself."""
        return 500_000_000 + self.weight_bytes * 7 // 2


Finished = Callable[[Job, BuiltEngine], None]


def next_job(waiting: Sequence[Job], running: Sequence[Job], jobs: int, budget: int) -> int | None:
    """Index of the first waiting job that may start beside those running, or None.

    A job larger than the whole budget runs alone.
    """
    if not waiting or len(running) >= jobs:
        return None
    if not running:
        return 0
    used = sum(job.memory_bytes for job in running)
    return next((i for i, job in enumerate(waiting) if used + job.memory_bytes <= budget), None)


def run_jobs(jobs: Sequence[Job], count: int, budget: int, finished: Finished) -> None:
    """Build all, ``count`` at a time; ``finished`` hears each one in this thread as it ends.

    A count of 0 builds in this process.

    Raises:
        EngineError: a build failed or its process died.
        ExportError: a node that the parser does not understand.
    """
    if count == 0 or not jobs:
        for job in jobs:
            finished(job, build_engine(job.recipe, job.plan))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        max_workers=count, mp_context=context, initializer=_end_with, initargs=(os.getpid(),)
    ) as pool:
        try:
            _run_side_by_side(pool, list(jobs), count, budget, finished)
        except BaseException:  # leaving the pool waits until its workers end: else minutes
            for worker in list((pool._processes or {}).values()):  # public from Python 3.14 on
                worker.kill()
            pool.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """What interrupts comes after the block; workers that are started in it never get a Ctrl-C.

    A worker whose start is interrupted prints a traceback. Workers inherit what this thread blocks;
    but a blocked signal still reaches the process's other threads, and Python's handler then runs
    in the main thread. So both are held.
    """
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    handlers = {n: signal.signal(n, lambda number, frame: came.append(number)) for n in numbers}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for held in came[:1]:
            signal.raise_signal(held)


def _end_with(parent: int) -> None:
    """In a worker: end when the parent ends.

    Linux sends SIGKILL to a process whose parent is gone (PR_SET_PDEATHSIG); the parent may have
    gone before this was asked for.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _run_side_by_side(
    pool: ProcessPoolExecutor, waiting: list[Job], count: int, budget: int, finished: Finished
) -> None:
    running: dict[Future[BuiltEngine], Job] = {}
    try:
        while waiting or running:
            while (i := next_job(waiting, list(running.values()), count, budget)) is not None:
                job = waiting.pop(i)
                with _signals_held():
                    future = pool.submit(build_engine, job.recipe, job.plan)
                running[future] = job
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job = running[future]
                finished(job, future.result())
                del running[future]
    except BrokenProcessPool as error:
        names = ", ".join(job.recipe.segment.name for job in running.values())
        raise EngineError(
            f"Expected engines of {names}, their build process died: killed for memory, or the "
            f"builder crashed. Run the same command with --jobs 1, it resumes: where it dies again "
            f"with one engine, that one crashes the builder. Try another --level or precision, or "
            f"narrow it down with 'polygraphy debug reduce'."
        ) from error
