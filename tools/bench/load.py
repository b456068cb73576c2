"""Many requests at once: one after the other, in static batches, and in a continuous batch.

    python -m blockcache.tools.bench.load BUNDLE --preset dpm-20 --preset dpm-20-x2 --out DIRECTORY

Each way serves the same arrivals, in one process and without a network: a burst, all at once, and
Poisson arrivals at a share of what one after the other can do with the first preset. A request's
latency is from its arrival to its latents. A static batch takes what waits, up to the number of
slots, and nothing joins it; one guidance scale serves all of it. The text encoder is not run.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

import numpy as np
import typer

from blockcache.runtime import Bundle, ConfigError, ContinuousBatch, Session
from blockcache.runtime.files import write_text
from blockcache.tools.report.errors import one_line_errors
from blockcache.tools.report.machine import machine_facts
from blockcache.tools.report.tables import markdown_table

GUIDANCE = 3.0

Prompts: TypeAlias = tuple[np.ndarray, np.ndarray]  # with a prompt and without, float32 [1, T, D]
Submit: TypeAlias = Callable[[int], "Future[object]"]


@dataclass(frozen=True, kw_only=True)
class Served:
    """How one way served some arrivals."""

    way: str
    preset: str
    arrivals: str
    requests: int
    images_per_second: float  # from the first arrival to the last result
    cpu_s_an_image: float  # of this process: what others on the machine do matters less to it
    p50_s: float
    p95_s: float
    images_a_launch: float


class SessionQueue:
    """Requests in the order of arrival, up to ``most`` of those that wait at a time."""

    def __init__(self, session: Session, most: int, prompts: Prompts) -> None:
        self._session, self._most, self._prompts = session, most, prompts
        self._waiting: list[tuple[int, Future[object]]] = []
        self._changed = threading.Condition()
        self._closed = False
        self.batches: list[int] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

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
            self._changed.notify()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                taken = self._waiting[: self._most]
                del self._waiting[: self._most]
            if not taken:
                return
            self.batches.append(len(taken))
            noise = self._session.noise([seed for seed, _ in taken])
            made = self._session.denoise(noise, *self._prompts, guidance_scale=GUIDANCE).latents
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


def measure(
    bundle: Bundle, way: str, preset: str, slots: int, kind: str, offsets: Sequence[float]
) -> Served:
    """One way, warm, on one kind of arrivals."""
    prompts = _prompts(bundle)
    if way == "continuous":
        with ContinuousBatch.open(bundle, slots=slots, presets=[preset], threads=1) as batch:

            def submit(seed: int) -> Future[object]:
                noise = batch.noise([seed])
                return batch.submit(noise, *prompts, guidance_scale=GUIDANCE)  # type: ignore[return-value]

            serve(submit, [0.0] * slots)
            before = batch.counters()
            span, cpu, latencies = serve(submit, offsets)
            after = batch.counters()
        launches = after.launches - before.launches
        shared = (launches + after.launches_saved - before.launches_saved) / launches
    else:
        most = 1 if way == "one by one" else slots
        with Session.open(bundle, preset=preset, backend="ort", threads=1) as session:
            for images in range(1, most + 1):
                session.warm_up(images)
            queue = SessionQueue(session, most, prompts)
            span, cpu, latencies = serve(queue.submit, offsets)
            queue.close()
        shared = len(offsets) / len(queue.batches)
    p50, p95 = np.percentile(latencies, [50, 95])
    return Served(
        way=way,
        preset=preset,
        arrivals=kind,
        requests=len(offsets),
        images_per_second=len(offsets) / span,
        cpu_s_an_image=cpu / len(offsets),
        p50_s=float(p50),
        p95_s=float(p95),
        images_a_launch=float(shared),
    )


def arrivals(requests: int, rate: float, seed: int = 0) -> list[float]:
    """Poisson arrivals: offsets in seconds, the first at 0."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, requests - 1)
    offsets: list[float] = np.append(0.0, np.cumsum(gaps)).tolist()
    return offsets


def _prompts(bundle: Bundle) -> Prompts:
    """Numbers in the place of text states: speed does not depend on them."""
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


def table(served: Sequence[Served]) -> str:
    """One row a way, preset and kind of arrivals."""
    figures = {
        "images/s": "images_per_second",
        "CPU s an image": "cpu_s_an_image",
        "p50 s": "p50_s",
        "p95 s": "p95_s",
        "images a launch": "images_a_launch",
    }
    rows = [
        [s.arrivals, s.preset, s.way, *(f"{getattr(s, name):.2f}" for name in figures.values())]
        for s in served
    ]
    columns = ["arrivals", "preset", "way", *figures]
    return markdown_table(columns, rows, words=3)


def plot(served: Sequence[Served], file: Path) -> None:
    """Images a second and p95, one bar a way, grouped by arrivals and preset."""
    from blockcache.tools.report.plots import pyplot, save_figure

    groups = list(dict.fromkeys((s.arrivals, s.preset) for s in served))
    ways = list(dict.fromkeys(s.way for s in served))
    figure, sides = pyplot().subplots(1, 2, figsize=(11, 4))
    width = 0.8 / len(ways)
    for axes, field in zip(sides, ("images_per_second", "p95_s"), strict=True):
        for place, way in enumerate(ways):
            found = {(s.arrivals, s.preset): getattr(s, field) for s in served if s.way == way}
            at = [g + place * width for g, key in enumerate(groups) if key in found]
            axes.bar(at, [found[key] for key in groups if key in found], width, label=way)
        ticks = [f"{kind}\n{preset}" for kind, preset in groups]
        axes.set_xticks(np.arange(len(groups)) + 0.4 - width / 2, ticks, fontsize=7)
        axes.set_title({"images_per_second": "images a second", "p95_s": "p95 latency, s"}[field])
    sides[0].legend(fontsize=8)
    save_figure(figure, file)


def main(
    bundle: Annotated[str, typer.Argument(help="Of a model that takes a prompt alone.")],
    preset: Annotated[
        list[str] | None, typer.Option(help="Repeatable; the first sets rates.")
    ] = None,
    slots: Annotated[list[int] | None, typer.Option(help="Repeatable. Default 4, 8.")] = None,
    requests: Annotated[int, typer.Option(min=4, max=2000, help="Of each measurement.")] = 24,
    load: Annotated[float, typer.Option(min=0.05, max=2.0, help="Of the Poisson arrivals.")] = 0.7,
    out: Annotated[Path | None, typer.Option(help="For load.json and load.svg.")] = None,
) -> None:
    """Measure and print."""
    opened = Bundle.open(bundle)
    names = [opened.preset(name).name for name in preset or opened.preset_names]
    served: list[Served] = []
    alone = {
        name: measure(opened, "one by one", name, 1, "burst", [0.0] * requests) for name in names
    }
    served += alone.values()
    rate = load * alone[names[0]].images_per_second
    spread = arrivals(requests, rate)
    kind = f"Poisson {load:.0%}"
    for name in names:
        served.append(measure(opened, "one by one", name, 1, kind, spread))
        for most in slots or [4, 8]:
            for way in ("static", "continuous"):
                for which, offsets in (("burst", [0.0] * requests), (kind, spread)):
                    made = measure(opened, way, name, most, which, offsets)
                    served.append(Served(**{**asdict(made), "way": f"{way} {most}"}))
    served.sort(key=lambda s: (s.arrivals != "burst", names.index(s.preset)))
    print(table(served))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        found = {"machine": machine_facts(), "served": [asdict(each) for each in served]}
        write_text(out / "load.json", json.dumps(found, indent=1) + "\n")
        plot(served, out / "load.svg")


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
