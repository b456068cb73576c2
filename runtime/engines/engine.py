"""What an engine library must offer: a ``Backend`` that loads segments as ``Engine`` objects.

An ``Engine`` is one loaded segment, shared by every session of the process. ``bind`` fixes the
addresses of its tensors and returns a ``Launch``: a callable without arguments, all that the
denoising loop ever sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.devices.device import Device
from blockcache.runtime.devices.tensor import Tensor
from blockcache.runtime.plan import Segment

Launch: TypeAlias = Callable[[], None]
"""Run a segment on the tensors it was bound to."""


class Engine(Protocol):
    """One loaded segment."""

    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        """Fix the addresses of all inputs and outputs; EngineError where they do not fit."""


class Backend(Protocol):
    """An engine library on a device. ``EmptyBackend`` is a base with a default for each member."""

    @property
    def name(self) -> str:
        """Library, device and options: backends of equal names load the same engines."""

    @property
    def device(self) -> Device:
        """Where the engines' tensors live."""

    @property
    def loads_at_once(self) -> int:
        """In how many threads ``load`` may run.

        With 1, segments load one at a time in the whole process, in the thread that asks.
        """

    @property
    def graphs(self) -> str | None:
        """A mode of ``runtime/devices/graphs.py``; None where launches are never captured."""

    def load(self, bundle: Bundle, segment: Segment) -> Engine:
        """Load a segment's engine; EngineError where the library refuses it."""

    def load_refitted(self, plans: Bundle, bundle: Bundle, segment: Segment) -> Engine:
        """Load a segment with the weights of ``bundle``, whose graphs are those of ``plans``.

        A library that builds engines refits those of ``plans``, and leaves them as they are;
        EngineError where it refuses the weights.
        """

    def settled(self) -> None:
        """Called after the first run of a shape: keep what the library compiled during it."""
