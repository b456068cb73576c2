"""Latency of a bundle: whole model, split, cached; as ratios measured in one run.

The contestants take turns (A B C A B C ...), so that a noisy machine disturbs all alike; a ratio is
the median of the ratios of each round. The whole model runs in the same engine library and in the
same loop: it is one segment of trunk without blocks.
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from blockcache.runtime import (
    Alignment,
    Bundle,
    ConfigError,
    EmptyBackend,
    Preset,
    RunRecord,
    Schedule,
    Session,
)

WHOLE, SPLIT, CACHED = "whole", "split", "cached"


@dataclass(frozen=True)
class Spread:
    """Median and range of a figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median, minimum and maximum."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class LatencyReport:
    """Result of ``measure_latency``; seconds for one call of ``denoise``."""

    preset: str
    images: int
    rounds: int
    seconds: dict[str, Spread]  # by contestant: whole, split, cached
    split_over_whole: Spread
    cached_over_ran: Spread  # wall time over the sum of the segments that the schedule runs
    speedup: Spread  # split over cached
    computed_fraction: float
    host_us_per_launch: float  # on engines that do nothing
    machine: dict[str, str]


def measure_latency(
    bundle: Bundle,
    preset: str,
    *,
    images: int = 1,
    rounds: int = 7,
    threads: int | None = None,
    backend: str = "auto",
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> LatencyReport:
    """Time whole, split and cached denoising on random conditions, interleaved.

    Args:
        bundle: as compiled, with its ``whole`` segment.
        preset: a cached preset; split and whole run the same steps uncached.
        images: batch of one call, before guidance doubles it.
        rounds: timed rounds, after one to warm up.
        threads: CPU threads of the engine library.
        backend: as for ``Session.open``.
        progress: observer.
    """
    chosen = bundle.preset(preset)
    sessions = {
        WHOLE: _open(whole_bundle(bundle), _whole_preset(chosen), backend, threads),
        SPLIT: _open(bundle, uncached(chosen), backend, threads),
        CACHED: _open(bundle, chosen, backend, threads),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    records: dict[str, list[RunRecord]] = {name: [] for name in sessions}
    for turn in range(rounds + 1):
        progress("bench", turn, rounds + 1)
        for name, session in sessions.items():
            begin = time.perf_counter()
            record = _denoise(session, bundle, images)
            if turn:
                seconds[name].append(time.perf_counter() - begin)
                records[name].append(record)
    progress("bench", rounds + 1, rounds + 1)
    return LatencyReport(
        preset=preset,
        images=images,
        rounds=rounds,
        seconds={name: Spread.of(values) for name, values in seconds.items()},
        split_over_whole=_ratio(seconds[SPLIT], seconds[WHOLE]),
        cached_over_ran=_ratio(
            [record.total_ns / 1e9 for record in records[CACHED]],
            [
                _expected_seconds(full, part)
                for full, part in zip(records[SPLIT], records[CACHED], strict=True)
            ],
        ),
        speedup=_ratio(seconds[SPLIT], seconds[CACHED]),
        computed_fraction=records[CACHED][0].computed_fraction,
        host_us_per_launch=host_cost_us(bundle, preset),
        machine=machine_facts(),
    )


def whole_bundle(bundle: Bundle) -> Bundle:
    """The bundle as if it held the uncut model only: one trunk segment and no block."""
    uncut = [segment for segment in bundle.segments if segment.role == "whole"]
    if not uncut:
        raise ConfigError("This bundle holds no whole model to compare with. Compile it again.")
    model = dataclasses.replace(bundle.model, blocks=(), outputs=1)
    manifest = dataclasses.replace(
        bundle.manifest, model=model, segments=(dataclasses.replace(uncut[0], role="trunk"),)
    )
    return Bundle(bundle.folder, manifest)


def uncached(preset: Preset) -> Preset:
    """The preset with every block recomputed at every step."""
    channels = tuple(table.shape[2] for table in preset.alignment.tables)
    steps, blocks = preset.schedule.steps, preset.schedule.blocks
    return dataclasses.replace(
        preset,
        schedule=Schedule.uncached(steps, blocks),
        alignment=Alignment.identity(steps, channels, preset.alignment.outputs),
    )


def host_cost_us(bundle: Bundle, preset: str, images: int = 1, repeats: int = 9) -> float:
    """Host time per step and segment on engines that do nothing, in microseconds (median)."""
    session = Session.open(bundle, preset=preset, backend=EmptyBackend(), verify=False)
    segments = [s for s in bundle.segments if s.role in ("trunk", "block", "condition")]
    costs = []
    for _ in range(repeats):
        record = _denoise(session, bundle, images)
        costs.append(record.total_ns / 1e3 / (len(record.steps) * len(segments)))
    return statistics.median(costs)


def machine_facts() -> dict[str, str]:
    """What a reader needs to place the figures."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        model = f"{names[0]} x {len(names)}" if names else model
    except OSError:
        pass
    return {
        "cpu": model,
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "onnxruntime": version("onnxruntime"),
    }


def _whole_preset(preset: Preset) -> Preset:
    """The preset for ``whole_bundle``: the model reads the timestep itself."""
    from blockcache.runtime import SolverConfig
    from blockcache.runtime.solver import solver_tables

    timesteps = solver_tables(SolverConfig.from_json(preset.solver)).timesteps
    return dataclasses.replace(
        preset,
        schedule=Schedule.uncached(preset.schedule.steps, 1),
        alignment=Alignment.identity(preset.schedule.steps, (1,)),
        time_tables={"timestep": timesteps[:, None]},
    )


def _open(bundle: Bundle, preset: Preset, backend: str, threads: int | None) -> Session:
    from blockcache.runtime.engine import make_backend

    return Session(bundle, preset, make_backend(backend, threads=threads))


def _denoise(session: Session, bundle: Bundle, images: int) -> RunRecord:
    """One call on random conditions of the model's default sizes."""
    rng = np.random.default_rng(0)
    sizes = dict(bundle.model.sizes, batch=images)

    def conditions() -> dict[str, np.ndarray]:
        made = {}
        for spec in bundle.model.conditions:
            shape = spec.shape(sizes)
            whole = spec.dtype == "int64"
            made[spec.name] = (
                np.zeros(shape, np.int64)
                if whole
                else rng.standard_normal(shape).astype(np.float32)
            )
        return made

    positive, negative = conditions(), conditions()
    result = session.denoise(
        session.noise(range(images)),
        positive.pop("encoder_hidden_states"),
        negative.pop("encoder_hidden_states"),
        conditions=positive,
        negative_conditions=negative,
        guidance_scale=session.preset.guidance_scale if session.preset.guidance_scale != 1 else 5.0,
    )
    return result.record


def _expected_seconds(full: RunRecord, part: RunRecord) -> float:
    """Sum over the segments that ``part`` ran of their mean time in the uncached run."""
    mean_ns = full.segment_ns.sum(axis=0) / full.ran.sum(axis=0)
    return float((part.ran * mean_ns).sum() / 1e9)


def _ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    return Spread.of([a / b for a, b in zip(numerators, denominators, strict=True)])
