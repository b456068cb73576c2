"""What takes part in a benchmark, and the turns they take.

A contestant denoises the same images over and over, in one way, on one engine, or runs what stands
before the denoising or behind it. They take turns (A B C A B C ...), so that a noisy machine
disturbs all alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from blockcache.export import Observer
from blockcache.export.observer import unobserved
from blockcache.runtime import BlockCacheError, RunRecord, Session

PartKind: TypeAlias = Literal["text", "decoding"]
"""What runs before the denoising and behind it; see ``pictures``."""

PARTS: tuple[PartKind, ...] = ("text", "decoding")

Kind: TypeAlias = Literal["whole", "split", "cached", "fewer steps", "peer"] | PartKind
"""How it denoises:

- "whole": by the uncut model
- "split": by the model's segments, every block recomputed at every step
- "cached": by the segments that a preset's schedule names
- "fewer steps": by the uncut model in fewer steps
- "peer": by the cache of another project
"""

OTHER = " @"
"""Between an engine and the folder of another bundle that runs on it."""


@dataclass(eq=False)
class Contestant:
    """One way to denoise, or a part. ``run`` does one call; a session returns a record of it."""

    engine: str  # "ort", "trt", "torch", ...
    kind: Kind
    preset: str  # whose solver, steps and schedule it follows
    base: str  # the group it is compared in: solver and steps of the uncached run
    steps: int
    images: int
    run: Callable[[], RunRecord | None]
    session: Session | None = None  # where the runtime runs it
    computed_fraction: float = 1.0  # of the blocks' FLOPs
    memory: dict[str, int] = field(default_factory=dict)  # bytes by use
    open_s: float = 0.0  # from nothing to ready
    first_s: float = 0.0  # the first call: what is bound, compiled or captured late
    seconds: list[float] = field(default_factory=list)  # of every timed round
    records: list[RunRecord] = field(default_factory=list)

    @property
    def name(self) -> str:
        """One line of a table."""
        return f"{self.engine} {self.kind} {self.preset}"

    @property
    def library(self) -> str:
        """The engine without another bundle's folder."""
        return self.engine.partition(OTHER)[0]

    @property
    def other(self) -> str:
        """The folder of the other bundle that it runs; "" for the bundle that is timed."""
        return self.engine.partition(OTHER)[2]

    def take_turn(
        self, clock: Callable[[], float] = time.perf_counter
    ) -> tuple[float, RunRecord | None]:
        """One timed call. The first one also sets ``first_s``, in wall time whatever the clock."""
        entered, begin = time.perf_counter(), clock()
        record = self.run()
        seconds = clock() - begin
        self.first_s = self.first_s or time.perf_counter() - entered
        return seconds, record


class Entry(NamedTuple):
    """A contestant that has not been opened yet."""

    name: str
    open: Callable[[], Contestant]


@dataclass
class Lineup:
    """The contestants that run, and why the others do not."""

    contestants: list[Contestant] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)  # who: why
    tried: bool = True  # whether untimed calls come first: one on entering, then one round

    def admit(self, engine: str, entries: Callable[[], Iterable[Entry]]) -> None:
        """Open what can run here and try it once; note why the rest cannot.

        An engine that is not installed has no contestants. An engine that lacks one model, such as
        TensorRT without the uncut one, still runs the others.
        """
        try:
            for entry in entries():
                self._enter(entry)
        except BlockCacheError as error:
            self._note(engine, str(error))

    def _enter(self, entry: Entry) -> None:
        try:
            begin = time.perf_counter()
            made = entry.open()
            made.open_s = time.perf_counter() - begin
            if self.tried:
                made.take_turn()
            self.contestants.append(made)
        except BlockCacheError as error:
            self._note(entry.name, str(error))

    def take_turns(
        self,
        rounds: int,
        between: Callable[[], None] = lambda: None,
        observer: Observer = unobserved,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Fill in seconds and records of ``rounds`` rounds, after an untimed one if ``tried``.

        A contestant that fails leaves, and is noted as absent with the reason: a ratio needs every
        round of both sides.
        """
        untimed = int(self.tried)
        for turn in range(rounds + untimed):
            if not self.contestants:
                break
            observer("bench", turn, rounds + untimed)
            between()
            for contestant in list(self.contestants):
                try:
                    seconds, record = contestant.take_turn(clock)
                except BlockCacheError as error:
                    self.contestants.remove(contestant)
                    self._note(contestant.name, str(error))
                    continue
                if turn >= untimed:
                    contestant.seconds.append(seconds)
                    if record is not None:
                        contestant.records.append(record)
        observer("bench", rounds + untimed, rounds + untimed)

    def _note(self, who: str, why: str) -> None:
        """Contestants that are absent for the same reason share a line."""
        same = [name for name, reason in self.absent.items() if reason == why]
        for name in same:
            del self.absent[name]
        self.absent[", ".join([*same, who])] = why
