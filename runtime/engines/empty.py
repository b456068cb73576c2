"""Engines that do nothing: what remains is the cost of the runtime's own loop."""

from __future__ import annotations

from collections.abc import Mapping

from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.devices.device import Device
from blockcache.runtime.devices.host import HostDevice
from blockcache.runtime.devices.tensor import Tensor
from blockcache.runtime.engines.engine import Engine, Launch
from blockcache.runtime.plan import Segment


class EmptyBackend:
    """Engines that do nothing, on the host; also a base class with a default for each member."""

    name = "empty"
    loads_at_once = 1
    graphs: str | None = None

    def __init__(self) -> None:
        self.device: Device = HostDevice()

    def load(self, bundle: Bundle, segment: Segment) -> Engine:
        """An engine without a library."""
        return EmptyEngine()

    def load_refitted(self, plans: Bundle, bundle: Bundle, segment: Segment) -> Engine:
        """Nothing is built that could be refitted: the segment is loaded from its own bundle."""
        return self.load(bundle, segment)

    def settled(self) -> None:
        """Nothing was compiled."""


class EmptyEngine:
    """Binds anything and launches nothing."""

    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        """A launch that returns at once."""
        return _nothing


def _nothing() -> None:
    pass
