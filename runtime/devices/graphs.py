"""CUDA graphs of the denoising loop: which graph to use, capture once, replay.

A static schedule makes it possible: what a step launches depends on the preset, the shape and the
first step alone. The choice of graph is a key, made without a device; capture and replay are the
device's. The first run of a key goes launch by launch, which also lets the engine library compile
what it compiles late; then it is captured, and from then on replayed.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from blockcache.runtime.devices.device import Device, StepFunction
from blockcache.runtime.devices.tensor import Tensor
from blockcache.runtime.errors import BlockCacheError, ConfigError, EngineError

MODES = ("auto", "off", "check")
"""``auto`` replays graphs, ``check`` also compares addresses before each replay, ``off`` never."""

ATTEMPTS = 3
"""How often the capture of one graph is tried."""

RUNS = 16
"""How many shapes, first steps and modes a session keeps graphs for."""

WHOLE_LOOP = -1
"""In place of a step: the graph holds every step."""

Enqueue: TypeAlias = Callable[[], None]


@dataclass(frozen=True)
class GraphKey:
    """Everything that decides what a graph launches, within one session (one preset)."""

    shape: tuple[
        Hashable, ...
    ]  # sizes, images, first executed step, guidance: one set of addresses
    step: int  # or WHOLE_LOOP
    scratch: int  # generation of the shared activation memory


@dataclass(frozen=True)
class _Captured:
    replay: Enqueue
    addresses: Mapping[str, int]  # of every bound tensor, at capture


@dataclass
class _Run:
    """The graphs of one shape: that of its whole loop, or those of its steps."""

    captured: dict[GraphKey, _Captured] = field(default_factory=dict)
    launched: set[GraphKey] = field(default_factory=set)
    failures: Counter[GraphKey] = field(default_factory=Counter)


class GraphPlayer:
    """The graphs of one session; ``settled`` is called after the first run of each key.

    A capture may fail for a passing reason, such as another library of the process that waits for
    the whole device meanwhile: it is tried ``ATTEMPTS`` times. ``RUNS`` bounds the memory.
    """

    def __init__(
        self,
        device: Device,
        mode: str = "auto",
        settled: Callable[[], None] = lambda: None,
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"Expected graphs of {MODES}, got {mode!r}.")
        self.device, self._mode, self._settled = device, mode, settled
        self._runs: dict[tuple[tuple[Hashable, ...], bool], _Run] = {}  # the last used at the end
        self.why_not = "" if mode != "off" else "switched off"
        """Why the last launches were not captured."""

    def __len__(self) -> int:
        return sum(len(run.captured) for run in self._runs.values())

    def play(self, key: GraphKey, enqueue: Enqueue, addresses: Mapping[str, int]) -> bool:
        """Replay the graph of ``key``, or run launch by launch and capture; True if replayed."""
        run = self._run_of(key)
        captured = run.captured.get(key)
        if captured is not None:
            if self._mode == "check":
                check_addresses(captured.addresses, addresses)
            captured.replay()
            return True
        enqueue()
        if self._mode != "off" and run.failures[key] < ATTEMPTS:
            self._capture(run, key, enqueue, addresses)
        if key not in run.launched:
            run.launched.add(key)
            self._settled()
        return False

    def forget(self, sizes: tuple[Hashable, ...]) -> None:
        """Drop the graphs of shapes that begin with ``sizes``: their memory is about to go."""
        for kind in [kind for kind in self._runs if kind[0][: len(sizes)] == sizes]:
            del self._runs[kind]

    def _run_of(self, key: GraphKey) -> _Run:
        """The run that a key belongs to; the one unused for longest is let go for a new one."""
        kind = (key.shape, key.step == WHOLE_LOOP)
        run = self._runs.pop(kind, None)
        if run is None and len(self._runs) >= RUNS:
            del self._runs[next(iter(self._runs))]
        self._runs[kind] = run or _Run()
        return self._runs[kind]

    def _capture(
        self, run: _Run, key: GraphKey, enqueue: Enqueue, addresses: Mapping[str, int]
    ) -> None:
        """Capture for the next time; where it cannot be done, launches go on one by one."""
        for each in self._runs.values():
            for old in [k for k in each.captured if k.scratch != key.scratch]:
                del each.captured[old]
        try:
            replay = self.device.capture(enqueue)
        except BlockCacheError as error:
            run.failures[key] += 1
            reason = str(error)  # the error itself would keep the device, wherever it is logged
            if reason != self.why_not:
                logging.getLogger("blockcache").warning(
                    "No CUDA graph, launching one by one: %s", reason
                )
            self.why_not = reason
            return
        run.captured[key] = _Captured(replay, dict(addresses))
        self.why_not = ""


class LoopGraphs:
    """The graphs of one shape and first step: what ``Session`` drives a request with."""

    def __init__(
        self,
        player: GraphPlayer,
        shape: tuple[Hashable, ...],
        tensors: Mapping[str, Tensor],
    ) -> None:
        self._player, self._shape = player, shape
        self._addresses = {name: tensor.pointer for name, tensor in tensors.items()}

    def play_loop(self, steps: range, do_step: StepFunction) -> None:
        """All steps in one graph: nobody looks in between."""

        def enqueue() -> None:
            for step in steps:
                do_step(step)

        self._play(WHOLE_LOOP, enqueue)

    def play_step(self, step: int, do_step: StepFunction) -> None:
        """One step in a graph of its own: a callback or a cancellation may come in between."""
        self._play(step, functools.partial(do_step, step))

    def _play(self, step: int, enqueue: Enqueue) -> None:
        # Read now: what a request binds may move the scratch memory.
        key = GraphKey(self._shape, step, self._player.device.scratch_generation)
        self._player.play(key, enqueue, self._addresses)


def check_addresses(captured: Mapping[str, int], now: Mapping[str, int]) -> None:
    """Raise EngineError where a tensor is not where it was at capture."""
    moved = [name for name in captured if captured[name] != now.get(name)]
    moved += [name for name in now if name not in captured]
    if moved:
        raise EngineError(
            f"Expected every tensor where it was when the CUDA graph was captured, these moved: "
            f"{', '.join(sorted(moved)[:5])} ({len(moved)} in all). Open the session anew, and "
            f"please report it."
        )
