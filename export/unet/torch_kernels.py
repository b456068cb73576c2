"""blockcache's CUDA kernels on torch tensors: for the reference and the profile on a GPU.

Each function returns None where the kernels cannot do it (no CUDA tensors, no CUDA library, a
gradient is wanted, an odd memory order): the caller then uses torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from blockcache import kernels


def relative_change(fresh: torch.Tensor, previous: torch.Tensor, images: int) -> np.ndarray | None:
    """Eq. 6 per image, in one pass over [images or 2 images, ...]: float64 [images]."""
    library = _library_for(fresh, previous)
    if library is None:
        return None
    samples, M, T = len(fresh), fresh[0].numel(), _number_of(fresh)
    change = torch.empty(images, device=fresh.device)
    size = library.bc_cuda_relative_change_workspace_bytes(samples, M)
    workspace = torch.empty(size, dtype=torch.uint8, device=fresh.device)
    tensors = (fresh.data_ptr(), previous.data_ptr(), images, samples, M, T)
    stream = _stream(fresh)
    code = library.bc_cuda_relative_change(
        change.data_ptr(), None, *tensors, workspace.data_ptr(), size, stream
    )
    kernels.check(library, "relative_change", code)
    per_image: np.ndarray = change.double().cpu().numpy()
    return per_image


def scale_shift_residual(
    x: torch.Tensor, outputs: Sequence[torch.Tensor], coefficients: torch.Tensor | None
) -> torch.Tensor | None:
    """``x + scale * last (+ before * earlier) + shift``, in one pass (section 3.4).

    Args:
        x: [N, C, H, W].
        outputs: the computed outputs of the block, the last one first, like ``x``.
        coefficients: float32 [2 or 3, C], rows scale (, before), shift; None: a plain sum, for
            which torch needs one pass too.
    """
    if coefficients is None or (torch.is_grad_enabled() and coefficients.requires_grad):
        return None
    two = len(coefficients) == 3
    blocks = [outputs[0], outputs[-1]] if two else [outputs[0]]
    library = _library_for(x, *blocks)
    if library is None:
        return None
    N, C, H, W = x.shape
    layout = "nchw" if x.is_contiguous() else "nhwc"
    rows = coefficients.to(x.device, torch.float32).contiguous()
    y = torch.empty_like(x)
    args = kernels.ScaleShiftResidualArgs(
        y=y.data_ptr(),
        x=x.data_ptr(),
        last=blocks[0].data_ptr(),
        before=blocks[1].data_ptr() if two else None,
        scale=rows[0].data_ptr(),
        before_scale=rows[1].data_ptr() if two else None,
        shift=rows[-1].data_ptr(),
        N=N,
        C=C,
        L=H * W,
        layout=kernels.LAYOUTS[layout],
        dtype=_number_of(x),
    )
    code = library.bc_cuda_scale_shift_residual(args, _stream(x))
    kernels.check(library, "scale_shift_residual", code)
    return y


@contextmanager
def on_gpu(module: torch.nn.Module) -> Iterator[torch.device]:
    """The module on the GPU for the length of a ``with``, where there is one; gives its device.

    Where the GPU is too small, hide it: ``CUDA_VISIBLE_DEVICES=``.
    """
    home = next(module.parameters()).device
    away = torch.device("cuda") if torch.cuda.is_available() else home
    module.to(away)
    try:
        yield away
    finally:
        module.to(home)


def _library_for(*tensors: torch.Tensor) -> ctypes.CDLL | None:
    """The CUDA library where it can work on these tensors: on the current device."""
    place = tensors[0].device
    if place.type != "cuda" or place.index != torch.cuda.current_device() or not _fits(*tensors):
        return None
    return kernels.cuda_library()


def _fits(*tensors: torch.Tensor) -> bool:
    """Whether all have one shape, a dtype the kernels know and one memory order without gaps."""
    first = tensors[0]
    gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    dense = first.is_contiguous() or (
        first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last)
    )
    alike = all(
        (each.shape, each.dtype, each.device, each.stride())
        == (first.shape, first.dtype, first.device, first.stride())
        for each in tensors
    )
    return dense and alike and not gradient and _name_of(first) in kernels.DTYPES


def _name_of(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _number_of(tensor: torch.Tensor) -> int:
    return kernels.DTYPES[_name_of(tensor)]


def _stream(tensor: torch.Tensor) -> int:
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)
