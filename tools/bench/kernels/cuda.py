"""Each CUDA kernel beside the torch operations that it replaces, and beside a copy.

Both sides of a case work on the same inputs and write to outputs of their own, so that they can be
compared before they are timed. bfloat16 is the model's type, latents are float32.

Everything is captured in a CUDA graph, so that the device's work is timed and not Python's, and
every run starts with a cold second-level cache. The copy is of as many bytes within the device,
half read and half written; "of copy" is the kernel's bandwidth as a share of its.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from blockcache import kernels
from blockcache.tools.bench.kernels.medians import Row, Work, medians

LATENTS = [(2, 4, 64, 64), (8, 4, 128, 128), (256, 4, 128, 128)]
"""N, C, H, W of Stable Diffusion, of SDXL, and where only bandwidth counts (403 MB)."""

FEATURES = [(2, 320, 64, 64), (16, 640, 64, 64), (32, 1280, 64, 64)]
"""A block's output: SD at 512 pixels, SDXL with eight images, and where only bandwidth counts."""

GUIDANCE, PHI = 5.0, 0.7
ROW = (0.9, 0.1, 0.2, 0.0, 0.5, -0.5, 0.7, 0.0)
"""DPM-Solver++ 2M as numbers of its order of size: sample, model output, one x0."""


@dataclass(frozen=True)
class Case:
    """One kernel at one shape beside what it replaces."""

    kernel: str
    shape: tuple[int, ...]
    bytes: int  # that the kernel must move, as its file counts them
    ours: Callable[[], None]
    unfused: Callable[[], None]
    results: tuple[tuple[torch.Tensor, torch.Tensor], ...]  # ours, unfused
    tolerance: float  # relative to the largest result


class Maker:
    """Makes cases for tensors of one device."""

    def __init__(self, library: Any, device: str, stream: Callable[[], int]) -> None:
        self._library, self._device, self._stream = library, device, stream

    def cases(self) -> Iterator[Case]:
        """All cases, one at a time: a large one's memory is held while it is timed."""
        for shape in LATENTS:
            yield from self.latent_cases(shape)
        for shape in FEATURES:
            yield from self.feature_cases(shape)

    def latent_cases(self, shape: tuple[int, ...]) -> Iterator[Case]:
        """The solver step, without and with rescale."""
        for rescaled in (False, True):
            yield self._solver_step(shape, rescaled)

    def feature_cases(self, shape: tuple[int, ...]) -> Iterator[Case]:
        """Change and residual."""
        yield self._change(shape)
        for layout, two in (("nchw", False), ("nhwc", False), ("nchw", True)):
            yield self._residual(shape, layout, two)

    def _normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, device=self._device).to(dtype)

    def _launch(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, f"bc_cuda_{name}")(*arguments, self._stream())
        kernels.check(self._library, name, code)

    def _solver_step(self, shape: tuple[int, ...], rescaled: bool) -> Case:
        N, M, T = shape[0], math.prod(shape[1:]), torch.bfloat16
        x, h0 = self._normal(*shape), self._normal(*shape)
        m = self._normal(2 * N, *shape[1:], dtype=T)
        table, scale = torch.tensor([ROW], device=self._device), self._filled(N, GUIDANCE)
        phi, factors = self._filled(N, PHI), self._filled(N, 0.0)
        ours, theirs = (tuple(map(torch.empty_like, (x, x, m))) for _ in "ab")
        named = dict(zip(("next_sample", "x0_out", "next_input"), ours, strict=True))
        named |= {"sample": x, "model_out": m, "previous_x0": h0, "table": table, "guidance": scale}
        named |= {"rescale": factors} if rescaled else {}
        number = kernels.DTYPES["bfloat16"]
        args = kernels.GuidedSolverStepArgs(N=N, M=M, S=1, dtype=number)
        for name, tensor in named.items():
            setattr(args, name, tensor.data_ptr())
        pointers = [tensor.data_ptr() for tensor in (factors, m, scale, phi)]

        def fused(_alive: object = (named, phi)) -> None:
            if rescaled:
                self._launch("guidance_rescale_factors", *pointers, N, M, number)
            self._launch("guided_solver_step", args, 0)

        def unfused() -> None:
            u, c = m.float().chunk(2)
            g = u + GUIDANCE * (c - u)
            if rescaled:
                axes = (1, 2, 3)
                g = g * (PHI * c.std(axes, keepdim=True) / g.std(axes, keepdim=True) + 1 - PHI)
            theirs[0].copy_(ROW[0] * x + ROW[1] * g + ROW[2] * h0)
            theirs[1].copy_(ROW[4] * x + ROW[5] * g)
            theirs[2].copy_(torch.cat([ROW[6] * theirs[0]] * 2))

        name = "guided_solver_step" + (" + rescale" if rescaled else "")
        moved = (28 if rescaled else 24) * N * M
        return Case(name, shape, moved, fused, unfused, _pairs(ours, theirs), 2.0**-8)

    def _filled(self, count: int, value: float) -> torch.Tensor:
        return torch.full((count,), value, device=self._device)

    def _change(self, shape: tuple[int, ...]) -> Case:
        N, M, T = shape[0], math.prod(shape[1:]), kernels.DTYPES["bfloat16"]
        now, before = (self._normal(*shape, dtype=torch.bfloat16) for _ in "ab")
        ours, theirs = self._filled(N + 1, 0.0), self._filled(N + 1, 0.0)
        size = self._library.bc_cuda_relative_change_workspace_bytes(N, M)
        workspace = torch.empty(size, dtype=torch.uint8, device=self._device)
        outputs = (ours.data_ptr(), ours.data_ptr() + 4 * N)
        inputs = (now.data_ptr(), before.data_ptr(), N, N, M, T, workspace.data_ptr(), size)

        def fused(_alive: object = workspace) -> None:
            self._launch("relative_change", *outputs, *inputs)

        def unfused() -> None:
            difference = (now.float() - before.float()).abs().flatten(1).sum(1)
            magnitude = now.float().abs().flatten(1).sum(1)
            torch.div(difference, magnitude, out=theirs[:N])
            torch.div(difference.sum(), magnitude.sum(), out=theirs[N])

        results = ((ours, theirs),)
        return Case("relative_change", shape, 4 * N * M, fused, unfused, results, 1e-4)

    def _residual(self, shape: tuple[int, ...], layout: str, two: bool) -> Case:
        N, C, H, W = shape
        order = torch.contiguous_format if layout == "nchw" else torch.channels_last
        x, last, before, ours, theirs = (
            self._normal(*shape, dtype=torch.bfloat16).to(memory_format=order) for _ in range(5)
        )
        scale, shift, before_scale = (self._normal(C) for _ in range(3))
        named = {"y": ours, "x": x, "last": last, "scale": scale, "shift": shift}
        named |= {"before": before, "before_scale": before_scale} if two else {}
        args = kernels.ScaleShiftResidualArgs(N=N, C=C, L=H * W, layout=kernels.LAYOUTS[layout])
        args.dtype = kernels.DTYPES["bfloat16"]
        for name, tensor in named.items():
            setattr(args, name, tensor.data_ptr())
        rows = [row[:, None, None] for row in (scale, before_scale, shift)]

        def fused(_alive: object = named) -> None:
            self._launch("scale_shift_residual", args)

        def unfused() -> None:
            total = x + rows[0] * last
            theirs.copy_((total + rows[1] * before if two else total) + rows[2])

        name = f"scale_shift_residual {layout}" + (", two outputs" if two else "")
        moved = (8 if two else 6) * x.numel()
        return Case(name, shape, moved, fused, unfused, ((ours, theirs),), 2.0**-8)


def _pairs(
    ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    return tuple(zip(ours, theirs, strict=True))


def check(case: Case) -> None:
    """Run both sides once.

    Raises:
        kernels.KernelError: they differ by more than the case's tolerance.
    """
    case.ours()
    case.unfused()
    for ours, theirs in case.results:
        wanted = theirs.double()
        error = float((ours.double() - wanted).abs().max() / wanted.abs().max())
        if not error <= case.tolerance:
            raise kernels.KernelError(
                f"{case.kernel} {case.shape}: expected torch's result to {case.tolerance:g}, got "
                f"{error:g} away from it"
            )


def captured(work: Work) -> Work:
    """The work as a CUDA graph; returns its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is set up on first use must not be captured
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    replay: Work = graph.replay
    return replay


def cold_timer() -> Callable[[Work], float]:
    """A function that times a replay on the device, the second-level cache being cold."""
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    filler = torch.zeros(cache_bytes, device="cuda")  # float32: four times the cache
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time_us(replay: Work) -> float:
        filler.sum()  # reads: dirty lines would be written back during the measurement
        start.record()
        replay()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1000

    return time_us


def cuda_row(case: Case, time_us: Callable[[Work], float], runs: int) -> Row:
    """One case against torch and against a copy."""
    source, target = (
        torch.empty(case.bytes // 2, dtype=torch.uint8, device="cuda") for _ in range(2)
    )
    works = {"ours": case.ours, "unfused": case.unfused, "copy": lambda: target.copy_(source)}
    replays = {name: captured(work) for name, work in works.items()}
    facts = {"kernel": case.kernel, "shape": case.shape, "bytes": case.bytes}
    return facts | medians(replays, time_us, runs)


def cuda_rows(runs: int) -> tuple[str, list[Row]]:
    """The device's name, and the CUDA kernels checked and timed.

    Raises:
        kernels.KernelError: a device or the CUDA library is missing, or a result is wrong.
    """
    if not torch.cuda.is_available():
        raise kernels.KernelError("expected a CUDA device, found none; --host times the CPU's")
    library = kernels.cuda_library()
    if library is None:
        raise kernels.KernelError(
            "expected libblockcache_cuda.so, found none; put nvcc on PATH and install again"
        )
    maker = Maker(library, "cuda", lambda: torch.cuda.current_stream().cuda_stream)
    time_us, rows = cold_timer(), []
    for case in maker.cases():
        check(case)
        rows.append(cuda_row(case, time_us, runs))
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    return device, rows
