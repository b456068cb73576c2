"""One segment of a bundle, its engine bound to memory of its own."""

from __future__ import annotations

from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.devices.tensor import Tensor
from blockcache.runtime.engines.engine import Backend, Launch
from blockcache.runtime.engines.loading import load_shared
from blockcache.runtime.plan import LOOP_ROLES, Segment, Sizes


def checked_segments(bundle: Bundle) -> tuple[Segment, ...]:
    """The segments that a session runs, and the parts that a pipeline runs beside it."""
    of_loop = [s for s in bundle.segments if s.role in (*LOOP_ROLES, "prompt")]
    return (*of_loop, *bundle.manifest.parts)


def bound_segment(
    backend: Backend, bundle: Bundle, segment: Segment, sizes: Sizes
) -> tuple[dict[str, Tensor], Launch]:
    """A segment's engine bound to memory of its own."""
    device, tensors = backend.device, {}
    for spec in (*segment.inputs, *segment.outputs):
        memory = device.allocate(spec.bytes(sizes))
        tensors[spec.name] = device.tensor(memory, 0, spec.shape(sizes), spec.dtype)
    return tensors, load_shared(backend, bundle, segment).bind(tensors)
