"""Many requests at once on a GPU that is not here, by the roofline: what batches of each kind give.

    python -m blockcache.tools.bench.throughput BUNDLE --gpu a100 --preset ddim-20 --requests 8

Predicted for a service that never idles. A launch of more images reads its weights once and fills
the GPU better, which is all that a batch can gain. In a static batch all images are at the same
step. In a continuous batch each request is at a step of its own, here at any with equal
probability, and a segment runs on those requests whose step asks for it; where requests happen to
be in step, it does what the static batch does. Bringing rows together is not counted, nor are text
encoder and decoder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb
from typing import Annotated

import numpy as np
import typer

from blockcache.export import Processor, gpu
from blockcache.export.costs.roofline import segment_work
from blockcache.runtime import Bundle, Schedule
from blockcache.runtime.plan import LOOP_ROLES, Segment
from blockcache.runtime.run_table import run_table
from blockcache.tools.report.errors import one_line_errors
from blockcache.tools.report.tables import markdown_table


@dataclass(frozen=True)
class SharedTimes:
    """Milliseconds of a bundle's segments by the images that share a launch, guided.

    Row 0, without an image, is 0.
    """

    loop: Sequence[Segment]  # M of them
    launch_ms: np.ndarray  # float64 [N + 1, M]
    prompt_ms: np.ndarray  # float64 [N + 1], of what runs once a request

    @classmethod
    def predict(cls, bundle: Bundle, processor: Processor, most: int) -> SharedTimes:
        """By the roofline, for 1 to ``most`` images.

        Raises:
            ConfigError, ExportError: see ``segment_work``.
        """
        timed = [s for s in bundle.segments if s.role in LOOP_ROLES or s.role == "prompt"]
        times = np.zeros((most + 1, len(timed)))
        for images in range(1, most + 1):
            sizes = bundle.model.sizes.for_images(images, guided=True)
            works = segment_work(timed, bundle.folder, processor, sizes)
            times[images] = [processor.milliseconds(work) for work in works]
        looped = np.array([segment.role in LOOP_ROLES for segment in timed])
        loop = [segment for segment in timed if segment.role in LOOP_ROLES]
        return cls(loop, times[:, looped], times[:, ~looped].sum(axis=1))


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What a service draws that never idles, images a second; and for how long one denoises, ms."""

    preset: str
    requests: int  # at a time
    one_by_one: float
    static: float
    continuous: float
    images_a_launch: float  # of the continuous batch; of the static one it is ``requests``
    static_ms: float
    continuous_ms: float


def throughput(times: SharedTimes, preset: str, schedule: Schedule, requests: int) -> Throughput:
    """The three ways to serve ``requests`` at a time by a schedule."""
    runs = run_table(times.loop, schedule)  # bool [S, M]
    alone = times.prompt_ms[1] + (runs @ times.launch_ms[1]).sum()
    together = times.prompt_ms[requests] + (runs @ times.launch_ms[requests]).sum()
    asking = asking_probability(runs.mean(axis=0), requests)
    tick = (asking * times.launch_ms[: requests + 1]).sum()
    # A slot's request pays for its ticks and, while the others wait, for all prompts of that time.
    mixed = schedule.steps * tick + requests * times.prompt_ms[1]
    return Throughput(
        preset=preset,
        requests=requests,
        one_by_one=1e3 / alone,
        static=1e3 * requests / together,
        continuous=1e3 * requests / mixed,
        images_a_launch=float(requests * runs.mean(axis=0).sum() / (1 - asking[0]).sum()),
        static_ms=float(together),
        continuous_ms=float(mixed),
    )


def asking_probability(share: np.ndarray, requests: int) -> np.ndarray:
    """How probable it is that 0 to ``requests`` of them ask for each segment: [requests + 1, M].

    Args:
        share: of the steps that run each segment, float64 [M].
        requests: each at any step with equal probability, whatever the others are at.
    """
    counts = range(requests + 1)
    return np.stack([comb(requests, n) * share**n * (1 - share) ** (requests - n) for n in counts])


def throughput_text(model: str, processor: str, found: Sequence[Throughput]) -> str:
    """A row a preset and number of requests; the gain is over one by one."""
    columns = ["preset", "requests", "one by one", "static", "continuous", "images a launch"]
    columns += ["ms, static", "ms, continuous"]
    rows = [
        [
            f.preset,
            str(f.requests),
            f"{f.one_by_one:.2f}",
            f"{f.static:.2f} = {f.static / f.one_by_one:.2f}x",
            f"{f.continuous:.2f} = {f.continuous / f.one_by_one:.2f}x",
            f"{f.images_a_launch:.2f}",
            f"{f.static_ms:.0f}",
            f"{f.continuous_ms:.0f}",
        ]
        for f in found
    ]
    return f"**{model} on {processor}**, images a second, predicted\n\n" + markdown_table(
        columns, rows
    )


def main(
    bundle: Annotated[str, typer.Argument(help="A bundle.")],
    names: Annotated[
        list[str] | None, typer.Option("--gpu", help="a100, h100, ...; repeatable.")
    ] = None,
    preset: Annotated[list[str] | None, typer.Option(help="Repeatable. Default all.")] = None,
    requests: Annotated[
        list[int] | None, typer.Option(min=1, max=64, help="At a time; repeatable. Default 1 4 8.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As data.")] = False,
) -> None:
    """Predict and print."""
    opened = Bundle.open(bundle, verify=False)
    counts = requests or [1, 4, 8]
    made = {}
    for name in names or ["a100"]:
        times = SharedTimes.predict(opened, gpu(name), max(counts))
        made[name] = [
            throughput(times, each.name, each.schedule, count)
            for each in map(opened.preset, preset or opened.preset_names)
            for count in counts
        ]
    if as_json:
        print(json.dumps({name: [asdict(f) for f in found] for name, found in made.items()}))
        return
    texts = [throughput_text(opened.model.name, name, found) for name, found in made.items()]
    print("\n\n".join(texts))


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
