"""blockcache's CUDA kernels bound to tensors: arguments are made once, a call only launches.

What a request may change (coefficients, guidance, rescale) lies in device memory: a captured graph
keeps its arguments, and so serves every request of its shape.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from blockcache import kernels
from blockcache.runtime.devices.device import Device, Guidance, StepFunction, modes_of
from blockcache.runtime.devices.kernel_errors import kernel_errors
from blockcache.runtime.devices.tensor import Tensor
from blockcache.runtime.errors import EngineError

_C_SAMPLE, _NEXT_INPUT_SCALE = 0, 6  # columns of a row, see blockcache_kernels.h


def cuda_library() -> ctypes.CDLL:
    """The CUDA library, or EngineError where it was not built."""
    with kernel_errors():
        library = kernels.cuda_library()
    if library is None:
        raise EngineError(
            "Expected blockcache's CUDA kernels, they were not built. Install blockcache where "
            "nvcc is found (CUDA toolkit 12 or later), from source."
        )
    return library


class SolverKernels:
    """A device's solver kernels: kept, with their addresses, as long as the latents they work on.

    A captured graph holds these addresses, so the next request must find them where they were.
    """

    def __init__(self) -> None:
        self._kept: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], SolverKernel]]
        self._kept = weakref.WeakKeyDictionary()

    def bind(
        self,
        device: Device,
        stream: int,
        coefficients: np.ndarray,
        guidance: Guidance | None,
        seeds: np.ndarray | None,
        *tensors: Tensor,
    ) -> StepFunction:
        """The kernel of these tensors, latents first, with a request's numbers in place."""
        modes, steps = modes_of(guidance), len(coefficients)
        key = (*(tensor.pointer for tensor in tensors), steps, *modes)
        kept = self._kept.setdefault(tensors[0].owner, {})
        if key not in kept:
            kept[key] = SolverKernel(device, stream, steps, *modes, *tensors)
        kept[key].set(device, coefficients, guidance, seeds)
        return kept[key].step


class SolverKernel:
    """Guidance and solver update of a step; with rescale one launch more.

    It does not keep the tensors alive: who runs a request does.
    """

    def __init__(
        self,
        device: Device,
        stream: int,
        steps: int,
        rows: int,
        rescaled: bool,
        latents: Tensor,
        past_x0: Tensor,
        model_output: Tensor,
        model_input: Tensor,
    ) -> None:
        self._library, self._stream = cuda_library(), stream
        images, M = latents.shape[0], math.prod(latents.shape[1:])
        self._table = _floats(device, steps, kernels.ROW)
        self._guidance, self._image_guidance, self._phi, self._factors = (
            _floats(device, images) for _ in range(4)
        )
        dtype = kernels.DTYPES[model_output.dtype]
        self._rescale: tuple[int, ...] | None = None
        if rescaled:
            tensors = (self._factors, model_output, self._guidance, self._phi)
            self._rescale = (*(tensor.pointer for tensor in tensors), images, M, dtype)
        self._seeds = device.tensor(device.allocate(images * 8), 0, (images,), "int64")
        halves = (past_x0.pointer, past_x0.pointer + past_x0.bytes // 2)
        self._arguments = [  # of even steps and of odd ones: the x0 of two steps ago gives way
            kernels.GuidedSolverStepArgs(
                next_sample=latents.pointer,
                x0_out=earlier,
                next_input=model_input.pointer,
                sample=latents.pointer,
                model_out=model_output.pointer,
                previous_x0=previous,
                earlier_x0=earlier,
                table=self._table.pointer,
                guidance=self._guidance.pointer if rows > 1 else None,
                image_guidance=self._image_guidance.pointer if rows == 3 else None,
                rescale=self._factors.pointer if rescaled else None,
                seeds=self._seeds.pointer,
                N=images,
                M=M,
                S=steps,
                dtype=dtype,
            )
            for earlier, previous in (halves, halves[::-1])
        ]

    def set(
        self,
        device: Device,
        coefficients: np.ndarray,
        guidance: Guidance | None,
        seeds: np.ndarray | None,
    ) -> None:
        """Upload a request's coefficients, guidance, rescale and seeds."""
        device.upload(self._table, coefficients)
        if seeds is not None:
            device.upload(self._seeds, seeds.view(np.int64))  # the same bits
        if guidance is not None:
            for target, value in (
                (self._guidance, guidance.scale),
                (self._image_guidance, guidance.image_scale),
                (self._phi, guidance.rescale),
            ):
                device.upload(target, np.full(target.shape, value, np.float32))

    def step(self, step: int) -> None:
        """Guidance and solver update of ``step``."""
        if self._rescale is not None:
            code = self._library.bc_cuda_guidance_rescale_factors(*self._rescale, self._stream)
            if code:
                _fail(self._library, "bc_cuda_guidance_rescale_factors", code)
        arguments = self._arguments[step % 2]
        code = self._library.bc_cuda_guided_solver_step(arguments, step, self._stream)
        if code:
            _fail(self._library, "bc_cuda_guided_solver_step", code)


def bind_model_input(
    device: Device, stream: int, scales: np.ndarray, latents: Tensor, model_input: Tensor
) -> StepFunction:
    """The solver's kernel with rows that leave the sample as it is and write the model input.

    Their coefficients of model output and previous x0 are 0: the kernel reads neither.
    """
    library, images = cuda_library(), latents.shape[0]
    rows = np.zeros((len(scales), kernels.ROW), np.float32)
    rows[:, _C_SAMPLE], rows[:, _NEXT_INPUT_SCALE] = 1.0, scales
    table = _floats(device, *rows.shape)
    device.upload(table, rows)
    parts = model_input.shape[0] // images
    scales_of = _floats(
        device, images
    )  # not read: that they are there says how many rows there are
    arguments = kernels.GuidedSolverStepArgs(
        next_sample=latents.pointer,
        x0_out=None,
        next_input=model_input.pointer,
        sample=latents.pointer,
        model_out=None,
        previous_x0=None,
        earlier_x0=None,
        table=table.pointer,
        guidance=scales_of.pointer if parts > 1 else None,
        image_guidance=scales_of.pointer if parts == 3 else None,
        rescale=None,
        seeds=None,
        N=images,
        M=math.prod(latents.shape[1:]),
        S=len(rows),
        dtype=kernels.DTYPES[model_input.dtype],
    )

    def write(step: int, _keep_alive: object = (latents, model_input, table, scales_of)) -> None:
        code = library.bc_cuda_guided_solver_step(arguments, step, stream)
        if code:
            _fail(library, "bc_cuda_guided_solver_step", code)

    return write


def bind_change(
    device: Device, stream: int, target: Tensor, now: Tensor, before: Tensor
) -> Callable[[], None]:
    """A launch that puts eq. 6 per image into ``target``, as ``Device.change`` has it."""
    library, tensors = cuda_library(), (target, now, before)
    samples, M = now.shape[0], math.prod(now.shape[1:])
    size = library.bc_cuda_relative_change_workspace_bytes(samples, M)
    workspace = device.tensor(device.allocate(size), 0, (size,), "uint8")
    inputs = (now.pointer, before.pointer, target.shape[0], samples, M, kernels.DTYPES[now.dtype])
    arguments = (target.pointer, None, *inputs, workspace.pointer, size, stream)

    def measure(_keep_alive: object = (*tensors, workspace)) -> None:
        code = library.bc_cuda_relative_change(*arguments)
        if code:
            _fail(library, "bc_cuda_relative_change", code)

    return measure


def _fail(library: ctypes.CDLL, kernel: str, code: int) -> None:
    with kernel_errors():
        kernels.check(library, kernel, code)


def _floats(device: Device, *shape: int) -> Tensor:
    return device.tensor(device.allocate(math.prod(shape) * 4), 0, shape, "float32")
