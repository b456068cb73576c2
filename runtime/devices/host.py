"""Host memory through numpy. The solver step runs in the compiled kernel, else in numpy."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from time import perf_counter_ns

import numpy as np

from blockcache import kernels
from blockcache.runtime.devices.device import Guidance, StepFunction, modes_of
from blockcache.runtime.devices.device_view import DeviceView
from blockcache.runtime.devices.kernel_errors import kernel_errors
from blockcache.runtime.devices.tensor import NUMPY_DTYPES, Tensor, Window, item_bytes
from blockcache.runtime.solvers.philox import standard_normal
from blockcache.runtime.solvers.solver import solver_step_numpy


class HostDevice:
    """Host memory; a ``Device`` as runtime/devices/device.py has it."""

    name = "cpu"
    index = 0
    stream = 0

    def allocate(self, count: int) -> np.ndarray:
        """``count`` zeroed bytes at an address that is a multiple of 256."""
        raw = np.zeros(count + 256, np.uint8)
        start = -raw.ctypes.data % 256
        return raw[start : start + count]

    def tensor(self, memory: np.ndarray, offset: int, shape: Sequence[int], dtype: str) -> Tensor:
        """A numpy view into ``memory``."""
        count = math.prod(shape) * item_bytes(dtype)
        array = memory[offset : offset + count].view(NUMPY_DTYPES[dtype]).reshape(shape)
        return Tensor(array.ctypes.data, tuple(shape), dtype, memory, array)

    def upload(self, target: Tensor, values: np.ndarray) -> None:
        """Copy into the view."""
        np.copyto(_view(target), values, casting="same_kind")

    def copy_from(self, target: Tensor, pointer: int) -> None:
        """Copy host memory."""
        ctypes.memmove(target.pointer, pointer, target.bytes)

    def copy(self, target: Window, source: Window) -> None:
        """Between two views."""
        assert target.array is not None
        assert source.array is not None
        np.copyto(target.array, source.array.reshape(target.array.shape))

    def synchronize(self) -> None:
        """Nothing is pending."""

    def download(self, source: Tensor) -> np.ndarray:
        """A copy of the view."""
        values: np.ndarray = _view(source).copy()
        return values

    def row_loader(self, row: Tensor, table: Tensor) -> StepFunction:
        """One contiguous copy."""
        target, rows = _view(row), list(_view(table))

        def load(step: int) -> None:
            np.copyto(target, rows[step])

        return load

    def solver(
        self,
        coefficients: np.ndarray,
        guidance: Guidance | None,
        seeds: np.ndarray | None,
        latents: Tensor,
        past_x0: Tensor,
        model_output: Tensor,
        model_input: Tensor,
    ) -> StepFunction:
        """The compiled kernel, or numpy."""
        images = latents.shape[0]
        sample, past = _view(latents).reshape(images, -1), _view(past_x0).reshape(2, images, -1)
        output, following = (_view(t).reshape(t.shape[0], -1) for t in (model_output, model_input))
        bind = _bind_kernels if kernels.host_available() else _bind_numpy
        given = (coefficients, guidance, seeds, sample)
        with kernel_errors():  # two, as the x0 of two steps ago gives way to the step's own
            even = bind(*given, past[1], past[0], output, following)
            odd = bind(*given, past[0], past[1], output, following)

        def step_with_our_errors(step: int) -> None:
            with kernel_errors():
                (odd if step % 2 else even)(step)

        return step_with_our_errors

    def model_input(self, scales: np.ndarray, latents: Tensor, model_input: Tensor) -> StepFunction:
        """In numpy."""
        sample = _view(latents)
        halves = _view(model_input).reshape(-1, *sample.shape)

        def scale(step: int) -> None:
            np.multiply(sample, scales[step], out=halves[0])
            halves[1:] = halves[0]

        return scale

    def change(self, target: Tensor, now: Tensor, before: Tensor) -> Callable[[], None]:
        """The compiled kernel."""
        result, fresh, previous = map(_view, (target, now, before))

        def measure() -> None:
            images, dtype = len(result), now.dtype
            with kernel_errors():
                result[:], _ = kernels.relative_change(fresh, previous, images=images, dtype=dtype)

        return measure

    def view(self, tensor: Tensor) -> DeviceView | None:
        """None: ``Denoised.latents`` is in host memory already."""
        return None

    def session_lock(self) -> AbstractContextManager[object]:
        """A lock of its own for each session."""
        return threading.RLock()

    @property
    def scratch_generation(self) -> int:
        """Engines on the host keep their own activation memory."""
        return 0

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """The host records nothing: to replay is to launch again."""
        return enqueue

    def times_ms(self, launches: Sequence[Callable[[], None]]) -> list[float]:
        """By the host's clock."""
        clock = [perf_counter_ns()]
        for launch in launches:
            launch()
            clock.append(perf_counter_ns())
        return [(end - begin) / 1e6 for begin, end in pairwise(clock)]


def _bind_kernels(
    coefficients: np.ndarray,
    guidance: Guidance | None,
    seeds: np.ndarray | None,
    sample: np.ndarray,
    previous: np.ndarray,
    earlier: np.ndarray,
    output: np.ndarray,
    following: np.ndarray,
) -> StepFunction:
    """The solver step as one pass of compiled code, and one before it for the rescale's factors."""
    is_multistep = bool(coefficients[:, 2:6].any())
    factors = np.empty(len(sample), np.float32) if modes_of(guidance)[1] else None
    solver_step = kernels.bind_guided_solver_step(
        sample,
        sample=sample,
        model_out=output,
        table=coefficients,
        x0_out=earlier if is_multistep else None,
        previous_x0=previous if is_multistep else None,
        earlier_x0=earlier if is_multistep else None,
        next_input=following,
        guidance=None if guidance is None else guidance.scale,
        image_guidance=guidance.image_scale if guidance and guidance.rows == 3 else None,
        rescale=factors,
        seeds=seeds,
    )
    if guidance is None or factors is None:
        return solver_step
    find_factors = kernels.bind_guidance_rescale_factors(
        factors, model_out=output, guidance=guidance.scale, phi=guidance.rescale
    )

    def rescaled_step(step: int) -> None:
        find_factors()
        solver_step(step)

    return rescaled_step


def _bind_numpy(
    coefficients: np.ndarray,
    guidance: Guidance | None,
    seeds: np.ndarray | None,
    sample: np.ndarray,
    previous: np.ndarray,
    earlier: np.ndarray,
    output: np.ndarray,
    following: np.ndarray,
) -> StepFunction:
    """The same in numpy, several passes."""
    scratch = np.empty_like(sample)
    scale = None if guidance is None else guidance.scale

    def step_in_numpy(step: int) -> None:
        if guidance is not None and guidance.rescale:
            _rescale_in_numpy(output, guidance)
        row, noise = coefficients[step], None
        if row[7]:
            assert seeds is not None
            noise = standard_normal(seeds, step, sample.shape[1])
        past = (previous, earlier)
        if guidance is not None and guidance.rows == 3:
            guided = _guided_by_image_too(output, guidance)
            solver_step_numpy(row, None, sample, *past, guided, following, scratch, noise)
        else:
            solver_step_numpy(row, scale, sample, *past, output, following, scratch, noise)

    return step_in_numpy


def _guided_by_image_too(output: np.ndarray, guidance: Guidance) -> np.ndarray:
    """[N, M] of the thirds of ``output`` [3N, M], as InstructPix2Pix combines them."""
    nothing, image, both = output.reshape(3, -1, output.shape[1])
    scales = np.float32(guidance.image_scale), np.float32(guidance.scale)
    guided: np.ndarray = nothing + scales[0] * (image - nothing) + scales[1] * (both - image)
    return guided


def _rescale_in_numpy(output: np.ndarray, guidance: Guidance) -> None:
    """Scale both halves of ``output`` [2N, M] alike: their guided output is the rescaled one."""
    unconditional, conditional = output.reshape(2, -1, output.shape[1])
    guided = unconditional + np.float32(guidance.scale) * (conditional - unconditional)
    spread = conditional.std(axis=1, keepdims=True) / guided.std(axis=1, keepdims=True)
    factors = guidance.rescale * spread + (1 - guidance.rescale)
    output *= np.tile(factors.astype(np.float32), (2, 1))


def _view(tensor: Tensor) -> np.ndarray:
    assert tensor.array is not None, "a device tensor reached the host device"
    return tensor.array
