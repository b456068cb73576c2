"""What the runtime does on a GPU with PyTorch for an engine library: a page of figures.

    python -m blockcache.tools.bench.gpu_figures BUNDLE... --json FILE

It needs torch, onnx and the CUDA kernels, and neither TensorRT nor a network. Of every bundle: CUDA
graphs on and off, the split model against the whole one, a cached run against the sum of what it
ran, two sessions side by side, and what the host does for a step. PyTorch launches every operator
by itself, so that the times are not those of an engine; the ratios are the runtime's own.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

from blockcache.runtime import Bundle, Preset, Session
from blockcache.runtime.devices.cuda_driver import device_label, driver_version
from blockcache.runtime.devices.device import Device
from blockcache.runtime.engines.empty import EmptyBackend
from blockcache.runtime.files import write_text
from blockcache.tools.bench.contestants import Lineup
from blockcache.tools.bench.made_up import made_up
from blockcache.tools.bench.promises import promises
from blockcache.tools.bench.segment_times import segment_times
from blockcache.tools.bench.sessions import bundle_contestants, denoiser
from blockcache.tools.bench.torch_backend import CudaPlace, Place, TorchBackend
from blockcache.tools.report.spread import Spread
from blockcache.tools.report.tables import markdown_table

PlaceOf: TypeAlias = Callable[[], Place]
"""A place on the GPU, with a stream of its own."""

MODES = {"auto": "graphs", "off": "launches"}
"""How the loop runs, by mode of ``runtime/devices/graphs.py``."""


@dataclass(frozen=True)
class Time:
    """How long one way to denoise an image takes."""

    how: str  # "graphs", "launches"
    what: str  # "whole", "split", "cached"
    ms: Spread


@dataclass(frozen=True)
class Ratio:
    """A ratio of times, and what it should be at most."""

    name: str
    value: Spread
    goal: float | None


@dataclass(frozen=True)
class Figures:
    """Of one bundle."""

    bundle: str
    precision: str
    steps: int
    segments: int  # of the loop
    times: tuple[Time, ...]
    ratios: tuple[Ratio, ...]
    host_us_per_step: dict[str, float]  # with engines that do nothing, by how the loop runs
    absent: dict[str, str]  # what did not run, and why


def measure(bundle: Bundle, place_of: PlaceOf, rounds: int) -> Figures:
    """Time a bundle on the GPU, all ways in turns.

    Args:
        bundle: its first preset runs uncached, and once more with a made-up schedule.
        place_of: where.
        rounds: timed ones.
    """
    preset = bundle.preset(bundle.preset_names[0])
    cached = made_up(preset)
    lineup = Lineup()
    for mode, how in MODES.items():
        backend = TorchBackend(place_of(), mode)
        ways = functools.partial(bundle_contestants, bundle, (preset, cached), backend, how, 1)
        lineup.admit(how, ways)
    lineup.take_turns(rounds)
    made = lineup.contestants
    segments = {each.engine: segment_times(each) for each in made if each.kind == "split"}
    found = [Ratio(f"{p.name}, {p.engine}", p.ratio, p.goal) for p in promises(made, segments)]
    return Figures(
        bundle=bundle.model.name,
        precision=bundle.model.precision,
        steps=preset.schedule.steps,
        segments=len(next(iter(segments.values())).segment_ms) if segments else 0,
        times=tuple(Time(m.engine, m.kind, _ms(m.seconds)) for m in made),
        ratios=(*found, _two_sessions(bundle, cached, place_of, rounds)),
        host_us_per_step={
            how: _host_us(bundle, preset, place_of().device, mode, rounds)
            for mode, how in MODES.items()
        },
        absent=lineup.absent,
    )


def _ms(seconds: Sequence[float]) -> Spread:
    return Spread.of([1e3 * each for each in seconds])


def _two_sessions(bundle: Bundle, preset: Preset, place_of: PlaceOf, rounds: int) -> Ratio:
    """Two requests at the same time on two streams, over the same two one after the other."""
    sessions = [Session(bundle, preset, TorchBackend(place_of())) for _ in range(2)]
    runs = [denoiser(session, 1) for session in sessions]

    def together(pool: ThreadPoolExecutor) -> None:
        for running in [pool.submit(run) for run in runs]:
            running.result()

    with ThreadPoolExecutor(2) as pool:
        for run in (*runs, *runs):  # launched and captured, then replayed
            run()
        both, apart = [], []
        for _ in range(rounds):
            both.append(_seconds(lambda: together(pool)))
            apart.append(_seconds(lambda: [run() for run in runs]))
    return Ratio("two sessions at once / in turn", Spread.of_ratio(both, apart), None)


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


class _Nothing(EmptyBackend):
    """Engines that do nothing, on a GPU: the kernels and copies of the loop remain."""

    def __init__(self, device: Device, graphs: str) -> None:
        self.device, self.graphs = device, graphs


def _host_us(bundle: Bundle, preset: Preset, device: Device, mode: str, rounds: int) -> float:
    """Microseconds a step from the call to its result, the median."""
    run = denoiser(Session(bundle, preset, _Nothing(device, mode)), 1)
    for _ in range(2):
        run()
    times = [_seconds(run) for _ in range(rounds)]
    return 1e6 * statistics.median(times) / preset.schedule.steps


# -- pages -----------------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """The GPU and its driver."""
    import torch

    version = ".".join(map(str, driver_version()))
    return {"device": device_label(), "CUDA of the driver": version, "torch": torch.__version__}


def page(found: Sequence[Figures]) -> str:
    """Everything, in Markdown."""
    return "\n\n".join(text for each in found for text in _page_of(each))


def _page_of(figures: Figures) -> list[str]:
    title = (
        f"### {figures.bundle}, {figures.precision}, {figures.steps} steps, "
        f"{figures.segments} segments"
    )
    times = [[f"{time.what}, by {time.how}", str(time.ms)] for time in figures.times]
    ratios = [[r.name, str(r.value), f"<= {r.goal:g}" if r.goal else ""] for r in figures.ratios]
    host = [[how, f"{us:.1f}"] for how, us in figures.host_us_per_step.items()]
    return [
        title,
        markdown_table(["an image", "ms"], times),
        markdown_table(["ratio", "measured", "goal"], ratios),
        markdown_table(["host time a step, engines that do nothing, by", "us"], host),
        *(f"Not run: {who}: {why}" for who, why in figures.absent.items()),
    ]


def report(folders: Sequence[Path], place_of: PlaceOf, rounds: int, json_file: Path) -> str:
    """Measure bundles; write their figures as JSON and return the page."""
    found = [measure(Bundle.open(folder), place_of, rounds) for folder in folders]
    facts = machine()
    data = {"machine": facts, "bundles": [asdict(each) for each in found]}
    write_text(json_file, json.dumps(data, indent=1) + "\n")
    head = "; ".join(f"{name} {value}" for name, value in facts.items())
    return f"{head}\n\n{page(found)}\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+", help="folders")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=9, help="timed ones")
    options = parser.parse_args()
    print(report(options.bundles, CudaPlace, options.rounds, options.json))


if __name__ == "__main__":
    main()
