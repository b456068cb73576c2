"""A continuous batch for a long time: 2,000 requests, a tenth cancelled, memory before and after.

    python -m blockcache.tools.bench.soak BUNDLE [--requests 2000]

Presets, guidance, first steps and moments are random. It fails where memory grows by more than a
tenth after the first quarter, a slot is lost, or the counters do not add up.
"""

from __future__ import annotations

import gc
import json
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from blockcache.runtime import BatchedResult, BlockCacheError, Cancelled, ContinuousBatch
from blockcache.tools.report.errors import one_line_errors

PAGE_BYTES = 4096


class SoakError(BlockCacheError):
    """What must not happen in a long run."""


def main(
    bundle: Annotated[str, typer.Argument(help="Of a model that takes a prompt alone.")],
    requests: Annotated[int, typer.Option(min=40, max=100_000)] = 2000,
    slots: Annotated[int, typer.Option(min=1)] = 4,
    preset: Annotated[list[str] | None, typer.Option(help="Repeatable; default all.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Run and print what came of it."""
    with ContinuousBatch.open(
        bundle, slots=slots, queue=4 * slots, presets=preset, threads=1
    ) as batch:
        print(json.dumps(soak(batch, requests, seed), indent=1))


def soak(batch: ContinuousBatch, requests: int, seed: int = 0) -> dict[str, Any]:
    """Send random requests, a few more than there are slots at a time.

    Raises:
        SoakError: memory grows, a slot is lost, or the counters do not add up.
    """
    rng = np.random.default_rng(seed)
    resident: list[int] = []
    pending: set[Future[BatchedResult]] = set()
    outcomes = {"finished": 0, "cancelled": 0}
    for number in range(requests):
        while len(pending) >= 2 * batch.slots:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            _count(done, outcomes)
        future = _submit(batch, rng, number)
        pending.add(future)
        if rng.random() < 0.1:
            list(pending)[rng.integers(len(pending))].cancel()
        if number % max(1, requests // 8) == 0:
            gc.collect()
            resident.append(_resident_bytes())
    _count(wait(pending).done, outcomes)
    counters = batch.counters()
    early, late = resident[len(resident) // 4], resident[-1]
    ended = counters.finished + counters.failed + counters.cancelled + counters.expired
    for right, what in (
        (late < 1.1 * early, f"memory that stays, got {early} and later {late} bytes"),
        (counters.active == counters.waiting == 0, "no request left in a slot or in the queue"),
        (ended == counters.submitted == requests, f"{requests} requests ended, got {counters}"),
        (outcomes["finished"] == counters.finished, f"as many results, got {outcomes}"),
        (_all_slots_work(batch), f"{batch.slots} slots that still take requests"),
    ):
        if not right:
            raise SoakError(f"Expected {what}. Please report it.")
    figures = {"resident_bytes": {"after a quarter": early, "at the end": late}}
    return {**outcomes, **figures, **counters.to_json()}


def _submit(batch: ContinuousBatch, rng: np.random.Generator, number: int) -> Future[BatchedResult]:
    model = batch.bundle.model
    shape = (1, *model.conditions[0].shape(model.sizes)[1:])
    prompt, negative = (rng.standard_normal(shape, np.float32) for _ in range(2))
    noise = batch.noise([number])
    late = int(rng.integers(0, 3)) if rng.random() < 0.3 else 0
    return batch.submit(
        noise,
        prompt,
        negative,
        preset=str(rng.choice(batch.presets)),
        guidance_scale=float(rng.choice([1.0, 3.0, 7.5])),
        image_latents=noise if late else None,
        start_step=late,
        seeds=[number],
    )


def _count(futures: set[Future[BatchedResult]], outcomes: dict[str, int]) -> None:
    for future in futures:
        error = future.exception()
        if error is not None and not isinstance(error, Cancelled):
            raise SoakError(f"Expected latents, got {error!r}. Please report it.") from error
        outcomes["finished" if error is None else "cancelled"] += 1


def _all_slots_work(batch: ContinuousBatch) -> bool:
    """Whether as many requests as there are slots run together."""
    rng = np.random.default_rng(0)
    futures = [_submit(batch, rng, number) for number in range(batch.slots)]
    most = 0
    while not all(future.done() for future in futures):
        most = max(most, batch.counters().active)
    return most == batch.slots


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
