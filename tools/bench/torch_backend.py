"""Segments run by PyTorch: an engine library for GPUs that have torch and no other.

It is for tests and figures of the runtime itself: device, graphs, kernels and sessions are those
of every engine library, so that they can be tried on any GPU for which there is a PyTorch. It is
not fast: every operator of the graph is a launch of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch

from blockcache.runtime.bundles.bundle import Bundle
from blockcache.runtime.devices.cuda import CudaDevice
from blockcache.runtime.devices.cuda_driver import capture_lock
from blockcache.runtime.devices.device import Device
from blockcache.runtime.devices.device_view import DeviceView
from blockcache.runtime.devices.host import HostDevice
from blockcache.runtime.devices.tensor import Tensor
from blockcache.runtime.engines.engine import Launch
from blockcache.runtime.errors import EngineError
from blockcache.runtime.plan import Segment
from blockcache.tools.bench.onnx_in_torch import TorchGraph


class Place(Protocol):
    """Where PyTorch works for a device of the runtime."""

    @property
    def device(self) -> Device:
        """The runtime's device."""

    @property
    def torch_device(self) -> torch.device:
        """PyTorch's name for where it works."""

    def view(self, tensor: Tensor) -> torch.Tensor:
        """A tensor of the runtime at its address, without a copy."""

    def run(self, work: Callable[[], None]) -> None:
        """Put what ``work`` launches on the device's stream."""


class HostPlace:
    """The CPU: launches run at once."""

    def __init__(self) -> None:
        self.device: Device = HostDevice()
        self.torch_device = torch.device("cpu")

    def view(self, tensor: Tensor) -> torch.Tensor:
        """A view of the tensor's array."""
        assert tensor.array is not None
        return from_bits(torch.from_numpy(tensor.array), tensor.dtype)

    def run(self, work: Callable[[], None]) -> None:
        """Now."""
        work()


class CudaPlace:
    """A GPU: launches go on the stream of the runtime's device, where a graph can capture them.

    What an operator allocates comes from a memory pool that only these launches use. They run one
    after the other on one stream, so that a graph may hold addresses of the pool; and what the
    first run took from it serves the capture, in which nothing may be allocated.
    """

    def __init__(self, stream: Any = None, device: int | None = None) -> None:
        cuda = CudaDevice(stream, device)
        self.device: Device = cuda
        self.torch_device = torch.device("cuda", cuda.index)
        self._stream = torch.cuda.ExternalStream(cuda.stream, self.torch_device)
        self._pool = torch.cuda.MemPool()
        self._index = cuda.index

    def view(self, tensor: Tensor) -> torch.Tensor:
        """By DLPack where that has the type, else by ``__cuda_array_interface__``."""
        lent = DeviceView(tensor, self.device.stream, self._index)
        if tensor.dtype == "bfloat16":
            return torch.utils.dlpack.from_dlpack(lent)
        return torch.as_tensor(lent, device=self.torch_device)

    def run(self, work: Callable[[], None]) -> None:
        """On the stream, with memory of the pool."""
        with ExitStack() as inside:
            inside.enter_context(torch.cuda.device(self.torch_device))
            inside.enter_context(torch.cuda.stream(self._stream))
            inside.enter_context(torch.cuda.use_mem_pool(self._pool, self.torch_device))
            work()


def from_bits(bits: torch.Tensor, dtype: str) -> torch.Tensor:
    """A tensor as numpy sees it, where bfloat16 is uint16, in its own dtype."""
    return bits.view(torch.bfloat16) if dtype == "bfloat16" else bits


class TorchBackend:
    """PyTorch as an engine library, on a GPU or on the CPU."""

    loads_at_once = 1

    def __init__(self, place: Place, graphs: str = "auto") -> None:
        """Choose where.

        Args:
            place: a ``HostPlace`` or a ``CudaPlace``.
            graphs: a mode of ``runtime/devices/graphs.py``, for a GPU.
        """
        self.place, self.device = place, place.device
        self.graphs = None if self.device.name == "cpu" else graphs

    @property
    def name(self) -> str:
        """Engines are tied to a stream: only backends on the same one share them."""
        return f"torch {torch.__version__} {self.place.torch_device} {self.device.stream}"

    def load(self, bundle: Bundle, segment: Segment) -> TorchEngine:
        """Load a segment; EngineError where it has an operator that ours do not have."""
        with capture_lock:
            graph = TorchGraph(bundle.segment_path(segment), self.place.torch_device)
        return TorchEngine(segment, graph, self.place)

    def load_refitted(self, plans: Bundle, bundle: Bundle, segment: Segment) -> TorchEngine:
        """Nothing is built that could be refitted: the segment is loaded from its own bundle."""
        return self.load(bundle, segment)

    def settled(self) -> None:
        """Nothing is compiled at the first run."""


class TorchEngine:
    """One segment's graph."""

    def __init__(self, segment: Segment, graph: TorchGraph, place: Place) -> None:
        self._segment, self._graph, self._place = segment, graph, place

    def bind(self, tensors: Mapping[str, Tensor]) -> Launch:
        """Views of all inputs and outputs at their addresses."""
        views = {name: self._place.view(tensor) for name, tensor in tensors.items()}
        return functools.partial(self._launch, functools.partial(_run, self._graph, views))

    def _launch(self, work: Callable[[], None]) -> None:
        try:
            self._place.run(work)
        except RuntimeError as error:  # torch's own, out of memory too
            raise EngineError(
                f"PyTorch {torch.__version__} failed in segment {self._segment.name!r}: {error}"
            ) from error


def _run(graph: TorchGraph, views: Mapping[str, torch.Tensor]) -> None:
    with exactly():
        made = graph.run({name: views[name] for name in graph.inputs})
        for name, values in made.items():
            views[name].copy_(values)


@contextmanager
def exactly() -> Iterator[None]:
    """Convolutions in float32, where cuDNN would take TF32, and by the same algorithm each time.

    Products of matrices are in float32 by PyTorch's default.
    """
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    ):
        yield
