"""Many requests at once: one after the other, in static batches, and in a continuous batch.

    python -m blockcache.tools.bench.load BUNDLE --preset dpm-20 --preset dpm-20-x2 --out DIRECTORY

Each way serves the same arrivals, in one process and without a network: a burst, all at once, and
Poisson arrivals at a share of what one after the other can do with that preset. A request's latency
is from its arrival to its latents. A static batch takes what waits, up to the number of slots, and
nothing joins it; one guidance scale serves all of it. The text encoder is not run.

Every way has the same cores: its engines take ``--threads`` threads, or, where several sessions
serve one after the other beside each other, each of them one.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

import numpy as np
import typer

from blockcache.runtime import Bundle, ConfigError, ContinuousBatch, Session
from blockcache.tools.bench.load_report import LoadReport, Served, load_text, write_load
from blockcache.tools.report.errors import one_line_errors
from blockcache.tools.report.machine import Steadiness, machine_facts

GUIDANCE = 3.0
BURST = "burst"

Prompts: TypeAlias = tuple[np.ndarray, np.ndarray]  # with a prompt and without, float32 [1, T, D]
Submit: TypeAlias = Callable[[int], "Future[object]"]


@dataclass(frozen=True, kw_only=True)
class Way:
    """How requests are served."""

    name: str
    sessions: int = 0  # 0: a continuous batch
    images: int = 1  # of a batch at most

    @classmethod
    def every(cls, threads: int, slots: Sequence[int]) -> tuple[Way, ...]:
        """All that are compared; several sessions only where there are threads for them."""
        beside = [cls(name=f"{threads} sessions, one thread each", sessions=threads)]
        return (
            cls(name="one by one", sessions=1),
            *(beside if threads > 1 else []),
            *(cls(name=f"static {most}", sessions=1, images=most) for most in slots),
            *(cls(name=f"continuous {most}", images=most) for most in slots),
        )


class SessionQueue:
    """Requests in the order of arrival; each session takes up to ``most`` of those that wait."""

    def __init__(self, sessions: Sequence[Session], most: int, prompts: Prompts) -> None:
        self._most, self._prompts = most, prompts
        self._waiting: list[tuple[int, Future[object]]] = []
        self._changed = threading.Condition()
        self._closed = False
        self.batches: list[int] = []
        self._threads = [threading.Thread(target=self._serve, args=(s,)) for s in sessions]
        for thread in self._threads:
            thread.start()

    def submit(self, seed: int) -> Future[object]:
        """Ask for one image."""
        future: Future[object] = Future()
        with self._changed:
            self._waiting.append((seed, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Finish what waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _serve(self, session: Session) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                taken = self._waiting[: self._most]
                del self._waiting[: self._most]
                if not taken:
                    return
                self.batches.append(len(taken))
            noise = session.noise([seed for seed, _ in taken])
            made = session.denoise(noise, *self._prompts, guidance_scale=GUIDANCE).latents
            for (_, future), latents in zip(taken, made, strict=True):
                future.set_result(latents)


def serve(submit: Submit, offsets: Sequence[float]) -> tuple[float, float, np.ndarray]:
    """Submit requests at the offsets (seconds); the span, CPU seconds, and each one's latency."""
    ends = np.zeros(len(offsets))
    futures = []
    begin, cpu = time.perf_counter(), time.process_time()
    for i, offset in enumerate(offsets):
        time.sleep(max(0.0, begin + offset - time.perf_counter()))

        def note(_: Future[object], i: int = i) -> None:
            ends[i] = time.perf_counter() - begin

        futures.append(submit(i))
        futures[-1].add_done_callback(note)
    for future in futures:
        future.result()
    while not ends.all():  # a callback may run after its result is there
        time.sleep(0.001)
    return float(ends.max()), time.process_time() - cpu, ends - np.asarray(offsets)


@contextmanager
def opened(
    bundle: Bundle, way: Way, preset: str, threads: int
) -> Iterator[tuple[Submit, Callable[[], float]]]:
    """A way to serve, warm: its submit, and what tells the mean batch of a launch since then."""
    prompts = prompts_of(bundle)
    if not way.sessions:
        batch = ContinuousBatch.open(bundle, slots=way.images, presets=[preset], threads=threads)

        def submit(seed: int) -> Future[object]:
            noise = batch.noise([seed])
            return batch.submit(noise, *prompts, guidance_scale=GUIDANCE)  # type: ignore[return-value]

        with batch:
            serve(submit, [0.0] * way.images)
            before = batch.counters()

            def shared() -> float:
                now = batch.counters()
                launches = now.launches - before.launches
                return (launches + now.launches_saved - before.launches_saved) / launches

            yield submit, shared
        return
    each = threads // way.sessions
    with ExitStack() as stack:
        sessions = [
            stack.enter_context(
                Session.open(bundle, preset=preset, backend="ort", threads=each, verify=False)
            )
            for _ in range(way.sessions)
        ]
        for session in sessions:
            for images in range(1, way.images + 1):
                session.warm_up(images)
        queue = SessionQueue(sessions, way.images, prompts)
        stack.callback(queue.close)
        yield queue.submit, lambda: sum(queue.batches) / len(queue.batches)


def measure(
    bundle: Bundle,
    way: Way,
    preset: str,
    arrivals: str,
    offsets: Sequence[float],
    *,
    threads: int,
) -> Served:
    """One way, warm, on one kind of arrivals."""
    with opened(bundle, way, preset, threads) as (submit, shared):
        span, cpu, latencies = serve(submit, offsets)
        images_a_launch = shared()
    p50, p95 = np.percentile(latencies, [50, 95])
    return Served(
        way=way.name,
        preset=preset,
        arrivals=arrivals,
        requests=len(offsets),
        requests_per_second=(len(offsets) - 1) / offsets[-1] if offsets[-1] else None,
        images_per_second=len(offsets) / span,
        cpu_s_an_image=cpu / len(offsets),
        p50_s=float(p50),
        p95_s=float(p95),
        images_a_launch=float(images_a_launch),
    )


def poisson(requests: int, rate: float, seed: int = 0) -> list[float]:
    """Poisson arrivals: offsets in seconds, the first at 0."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, requests - 1)
    offsets: list[float] = np.append(0.0, np.cumsum(gaps)).tolist()
    return offsets


def prompts_of(bundle: Bundle) -> Prompts:
    """Numbers in the place of text states: speed does not depend on them.

    Raises:
        ConfigError: the model takes more than a prompt.
    """
    model = bundle.model
    others = [spec.name for spec in model.conditions if spec.name != "encoder_hidden_states"]
    if others:
        raise ConfigError(
            f"Expected a model that takes a prompt alone, {model.name} also takes {others}. Take "
            f"another bundle."
        )
    shape = (1, *model.conditions[0].shape(model.sizes)[1:])
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)


def run(
    bundle: Bundle,
    presets: Sequence[str],
    *,
    slots: Sequence[int],
    requests: int,
    load: float,
    threads: int,
    done: Callable[[Served], None] = lambda served: None,
) -> LoadReport:
    """Every way on both kinds of arrivals.

    Args:
        bundle: of a model that takes a prompt alone.
        presets: names; each is measured alone.
        slots: of the batches.
        requests: of each measurement.
        load: of the Poisson arrivals, as a share of one by one's images a second.
        threads: of the engines.
        done: hears of each measurement.
    """
    prompts_of(bundle)  # refused before anything is timed
    ways, steadiness, served = Way.every(threads, slots), Steadiness(), []
    for preset in presets:
        spread: list[float] = []
        for way in ways:
            for kind in (BURST, f"Poisson {load:.0%}"):
                steadiness.sample()
                offsets = [0.0] * requests if kind == BURST else spread
                made = measure(bundle, way, preset, kind, offsets, threads=threads)
                spread = spread or poisson(requests, load * made.images_per_second)
                served.append(made)
                done(made)
    steadiness.sample()
    return LoadReport(
        model=bundle.model.name,
        threads=threads,
        guidance=GUIDANCE,
        machine=machine_facts(),
        steadiness=steadiness.notes(),
        served=tuple(served),
    )


def main(
    bundle: Annotated[str, typer.Argument(help="Of a model that takes a prompt alone.")],
    preset: Annotated[list[str] | None, typer.Option(help="Repeatable. Default all.")] = None,
    slots: Annotated[list[int] | None, typer.Option(help="Repeatable. Default 4, 8.")] = None,
    requests: Annotated[int, typer.Option(min=4, max=2000, help="Of each measurement.")] = 24,
    load: Annotated[float, typer.Option(min=0.05, max=2.0, help="Of the Poisson arrivals.")] = 0.7,
    threads: Annotated[int, typer.Option(min=0, help="Of the engines. 0: one a core.")] = 0,
    out: Annotated[Path | None, typer.Option(help="For load.md, load.json and load.svg.")] = None,
) -> None:
    """Measure and print."""
    found = Bundle.open(bundle)
    names = [found.preset(name).name for name in preset or found.preset_names]
    report = run(
        found,
        names,
        slots=slots or (4, 8),
        requests=requests,
        load=load,
        threads=threads or len(os.sched_getaffinity(0)),
        done=lambda made: print(made, file=sys.stderr, flush=True),
    )
    print(load_text(report))
    if out is not None:
        write_load(report, out)


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
