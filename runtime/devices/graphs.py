"""CUDA graphs of the denoising loop: which graph to use, capture once, replay.

A static schedule makes it possible: what a step launches depends on the preset, the shape and the
first step alone. The choice of graph is a key, made without a device; capture and replay are the
device's. The first run of a key goes launch by launch, which also lets the engine library compile
what it compiles late; then it is captured, and from then on replayed.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from blockcache.runtime.devices.device import Device, StepFunction
from blockcache.runtime.devices.tensor import Tensor
from blockcache.runtime.errors import BlockCacheError, ConfigError, EngineError

MODES = ("auto", "off", "check")
"""``auto`` replays graphs, ``check`` also compares addresses before each replay, ``off`` never."""

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


class GraphPlayer:
    """The graphs of one session; ``settled`` is called after the first run of each key."""

    def __init__(
        self,
        device: Device,
        mode: str = "auto",
        settled: Callable[[], None] = lambda: None,
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"Expected graphs of {MODES}, got {mode!r}.")
        self.device, self._mode, self._settled = device, mode, settled
        self._seen: set[GraphKey] = set()
        self._captured: dict[GraphKey, _Captured] = {}
        self.why_not = "" if mode != "off" else "switched off"  # why launches are not replayed

    def __len__(self) -> int:
        return len(self._captured)

    def play(self, key: GraphKey, enqueue: Enqueue, addresses: Mapping[str, int]) -> bool:
        """Replay the graph of ``key``, or run launch by launch and capture; True if replayed."""
        captured = self._captured.get(key)
        if captured is not None:
            if self._mode == "check":
                check_addresses(captured.addresses, addresses)
            captured.replay()
            return True
        enqueue()
        if not self.why_not:
            self._capture(key, enqueue, addresses)
        if key not in self._seen:
            self._seen.add(key)
            self._settled()
        return False

    def forget(self, sizes: tuple[Hashable, ...]) -> None:
        """Drop the graphs of shapes that begin with ``sizes``: their memory is about to go."""
        for key in [key for key in self._captured if key.shape[: len(sizes)] == sizes]:
            del self._captured[key]

    def _capture(self, key: GraphKey, enqueue: Enqueue, addresses: Mapping[str, int]) -> None:
        """Capture for the next time; where it cannot be done, launches go on one by one."""
        stale = [k for k in self._captured if k.scratch != key.scratch]
        for old in stale:
            del self._captured[old]
        try:
            replay = self.device.capture(enqueue)
        except BlockCacheError as error:
            self.why_not = str(error)
            logging.getLogger("blockcache").warning(
                "No CUDA graph, launching one by one: %s", error
            )
            return
        self._captured[key] = _Captured(replay, dict(addresses))


class LoopGraphs:
    """The graphs of one shape and first step: what ``Session`` drives a request with."""

    def __init__(
        self,
        player: GraphPlayer,
        shape: tuple[Hashable, ...],
        tensors: Mapping[str, Tensor],
    ) -> None:
        self._player, self._shape = player, shape
        self._generation = player.device.scratch_generation
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
        key = GraphKey(self._shape, step, self._generation)
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
