"""Each host kernel beside numpy, float32."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from blockcache import kernels
from blockcache.tools.bench.kernels.medians import Row, Work, medians

LATENTS = [(1, 4, 16, 16), (2, 4, 64, 64), (8, 4, 128, 128)]
"""N, C, H, W of the demo model, of Stable Diffusion, and of SDXL with eight images."""

FEATURES = [(2, 96, 16, 16), (2, 320, 64, 64)]
"""A block's output with both halves of guidance: the demo model's and Stable Diffusion's."""

ROW = (0.9, 0.1, 0.2, 0.0, 0.5, -0.5, 0.7, 0.0)
GUIDANCE, PHI = 5.0, 0.7


class HostCase(NamedTuple):
    """One host kernel at one shape beside numpy; ``results`` are (ours, numpy's)."""

    kernel: str
    shape: tuple[int, ...]
    ours: Callable[[], object]
    unfused: Callable[[], object]
    results: tuple[tuple[np.ndarray, np.ndarray], ...]


def host_cases() -> list[HostCase]:
    """Every kernel at every shape."""
    cases = [solver_step(shape, rescaled) for shape in LATENTS for rescaled in (False, True)]
    return cases + [make(shape) for shape in FEATURES for make in (change, residual)]


def solver_step(shape: tuple[int, ...], rescaled: bool) -> HostCase:
    """As a session binds it."""
    N, rng = shape[0], np.random.default_rng(0)
    x, h0 = rng.standard_normal((2, *shape), np.float32)
    m = rng.standard_normal((2 * N, *shape[1:]), np.float32)
    ours, theirs = ([np.empty_like(each) for each in (x, x, m)] for _ in "ab")
    table = np.array([ROW], np.float32)
    row, factors = table[0], np.empty(N, np.float32)
    step = kernels.bind_guided_solver_step(
        ours[0],
        sample=x,
        model_out=m,
        table=table,
        x0_out=ours[1],
        next_input=ours[2],
        previous_x0=h0,
        guidance=GUIDANCE,
        rescale=factors if rescaled else None,
    )
    find = kernels.bind_guidance_rescale_factors(factors, model_out=m, guidance=GUIDANCE, phi=PHI)

    def fused() -> None:
        if rescaled:
            find()
        step(0)

    def in_numpy() -> None:
        u, c = m[:N], m[N:]
        g = u + np.float32(GUIDANCE) * (c - u)
        if rescaled:
            axes = (1, 2, 3)
            spread = c.std(axes, keepdims=True) / g.std(axes, keepdims=True)
            g = g * (PHI * spread + (1 - PHI))
        theirs[0][...] = row[0] * x + row[1] * g + row[2] * h0
        theirs[1][...] = row[4] * x + row[5] * g
        theirs[2][:N] = theirs[2][N:] = row[6] * theirs[0]

    name = "guided_solver_step" + (" + rescale" if rescaled else "")
    return HostCase(name, shape, fused, in_numpy, tuple(zip(ours, theirs, strict=True)))


def change(shape: tuple[int, ...]) -> HostCase:
    """As a monitor measures one image."""
    now, before = np.random.default_rng(1).standard_normal((2, *shape), np.float32)
    ours, theirs = np.empty(1), np.empty(1)

    def fused() -> None:
        ours[0] = kernels.relative_change(now, before, images=1)[1]

    def in_numpy() -> None:
        theirs[0] = np.abs(now - before).sum() / np.abs(now).sum()

    return HostCase("relative_change", shape, fused, in_numpy, ((ours, theirs),))


def residual(shape: tuple[int, ...]) -> HostCase:
    """Scale-shift in NCHW."""
    rng = np.random.default_rng(2)
    x, last = rng.standard_normal((2, *shape), np.float32)
    scale, shift = rng.standard_normal((2, shape[1]), np.float32)
    ours, theirs = np.empty_like(x), np.empty_like(x)

    def fused() -> None:
        kernels.scale_shift_residual(ours, x=x, last=last, scale=scale, shift=shift)

    def in_numpy() -> None:
        theirs[...] = x + scale[:, None, None] * last + shift[:, None, None]

    return HostCase("scale_shift_residual", shape, fused, in_numpy, ((ours, theirs),))


def wall_us(work: Work) -> float:
    """Microseconds of one call on the CPU."""
    start = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - start) / 1000


def host_rows(runs: int) -> list[Row]:
    """Host kernels against numpy."""
    return [
        {"kernel": case.kernel, "shape": case.shape}
        | medians({"ours": case.ours, "unfused": case.unfused}, wall_us, runs)
        for case in host_cases()
    ]
