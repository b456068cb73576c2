"""Finds the two shared libraries and declares their C ABI (`blockcache_kernels.h`) to ctypes."""

import ctypes
import functools
import importlib.resources
import os
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any, Final

ABI_VERSION: Final = 4
"""`BC_ABI_VERSION` of the header this file was written against."""

ROW: Final = 8
"""Columns of a solver table (`BC_ROW`)."""

DTYPES: Final = {"float32": 0, "float16": 1, "bfloat16": 2}
"""Element types by name, with their `BC_*` number."""

LAYOUTS: Final = {"nchw": 0, "nhwc": 1}
"""Memory layouts by name, with their `BC_*` number."""

DIRECTORY_VARIABLE: Final = "BLOCKCACHE_KERNELS_DIR"
"""Environment variable: the only folder to look in for the libraries, where it is set."""


class KernelError(RuntimeError):
    """A kernel refused its arguments, CUDA reported an error, or a library cannot be used.

    Attributes:
        code: the C ABI's return code; None where no kernel was called.
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class GuidedSolverStepArgs(ctypes.Structure):
    """`bc_guided_solver_step_args`: addresses and sizes; see the header for each field."""

    _fields_ = (
        ("next_sample", c_void_p),  # float32 [N, M]
        ("x0_out", c_void_p),  # float32 [N, M] or None
        ("next_input", c_void_p),  # T, shaped as model_out, or None
        ("sample", c_void_p),  # float32 [N, M]
        ("model_out", c_void_p),  # T [3N, 2N or N, M]
        ("previous_x0", c_void_p),  # float32 [N, M] or None
        ("earlier_x0", c_void_p),  # float32 [N, M] or None
        ("table", c_void_p),  # float32 [S, ROW]
        ("step_counter", c_void_p),  # int32 [1] or None
        ("guidance", c_void_p),  # float32 [N] or None
        ("image_guidance", c_void_p),  # float32 [N] or None
        ("rescale", c_void_p),  # float32 [N] or None
        ("seeds", c_void_p),  # uint64 [N] or None
        ("N", c_int64),
        ("M", c_int64),
        ("S", c_int32),
        ("dtype", c_int32),
    )


class ScaleShiftResidualArgs(ctypes.Structure):
    """`bc_scale_shift_residual_args`: addresses and sizes; see the header for each field."""

    _fields_ = (
        ("y", c_void_p),  # T [N, C, L] or [N, L, C]
        ("x", c_void_p),  # T
        ("last", c_void_p),  # T
        ("before", c_void_p),  # T or None
        ("scale", c_void_p),  # float32 [C]
        ("before_scale", c_void_p),  # float32 [C] or None
        ("shift", c_void_p),  # float32 [C]
        ("N", c_int64),
        ("C", c_int64),
        ("L", c_int64),
        ("layout", c_int32),
        ("dtype", c_int32),
    )


# Name after bc_host_ or bc_cuda_, and the parameters both share.
_KERNELS: Final[dict[str, list[Any]]] = {
    "guided_solver_step": [POINTER(GuidedSolverStepArgs), c_int32],
    "guidance_rescale_factors": [
        *(c_void_p, c_void_p, c_void_p, c_void_p),  # factors, model_out, guidance, phi
        *(c_int64, c_int64, c_int32),  # N, M, dtype
    ],
    "relative_change": [
        *(c_void_p, c_void_p, c_void_p, c_void_p),  # per_image, whole, now, before
        *(c_int64, c_int64, c_int64, c_int32),  # images, N, M, dtype
    ],
    "scale_shift_residual": [POINTER(ScaleShiftResidualArgs)],
}


def _find(file_name: str) -> Path | None:
    """The library's path: beside this package once installed, also in an editable install.

    An editable install keeps this source in the checkout and the library in site-packages, so
    `__file__` would be the wrong place to start from.
    """
    directory = os.environ.get(DIRECTORY_VARIABLE)
    if directory is not None:
        path = Path(directory) / file_name
        return path if path.is_file() else None
    resource = importlib.resources.files("blockcache.kernels") / file_name
    return Path(str(resource)) if resource.is_file() else None


def _open(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(
            f"expected a library this machine can load, got {path} ({error}); "
            "reinstall blockcache on this machine"
        ) from error
    version = library.bc_abi_version() if hasattr(library, "bc_abi_version") else "none"
    if version != ABI_VERSION:
        raise KernelError(
            f"expected kernels of ABI version {ABI_VERSION}, got {version} in {path}; "
            "reinstall blockcache so that its library and its Python source match"
        )
    library.bc_error_string.argtypes = [c_int32]
    library.bc_error_string.restype = c_char_p
    return library


@functools.cache
def _load_host() -> ctypes.CDLL | None:
    path = _find("libblockcache_host.so")
    if path is None:
        return None
    library = _open(path)
    for name, parameters in _KERNELS.items():
        getattr(library, f"bc_host_{name}").argtypes = parameters
    return library


def host_available() -> bool:
    """Whether the host library is installed.

    Raises:
        KernelError: it is there but cannot be loaded or has another ABI version.
    """
    return _load_host() is not None


def host_library() -> ctypes.CDLL:
    """The host library with its signatures set.

    Raises:
        KernelError: it is not installed, cannot be loaded or has another ABI version.
    """
    library = _load_host()
    if library is None:
        raise KernelError(
            "expected libblockcache_host.so in the package blockcache.kernels, found none; "
            f"run `pip install .` in the checkout, or set {DIRECTORY_VARIABLE} to its folder"
        )
    return library


@functools.cache
def cuda_library() -> ctypes.CDLL | None:
    """The CUDA library with its signatures set, or None where it was not built.

    Its functions take device addresses as integers and a stream as the last argument (None: the
    default stream); `check` turns their return code into an error.

    Raises:
        KernelError: it is there but cannot be loaded or has another ABI version.
    """
    path = _find("libblockcache_cuda.so")
    if path is None:
        return None
    library = _open(path)
    for name, parameters in _KERNELS.items():
        workspace = [c_void_p, c_size_t] if name == "relative_change" else []
        getattr(library, f"bc_cuda_{name}").argtypes = [*parameters, *workspace, c_void_p]
    library.bc_cuda_relative_change_workspace_bytes.argtypes = [c_int64, c_int64]
    library.bc_cuda_relative_change_workspace_bytes.restype = c_size_t
    return library


def check(library: ctypes.CDLL, kernel: str, code: int) -> None:
    """Raises the error that a return code stands for.

    Args:
        library: the library whose function returned `code`.
        kernel: the function's name, for the message.
        code: 0 done, negative a refused argument, positive a cudaError_t.

    Raises:
        KernelError: `code` is not 0.
    """
    if code != 0:
        text = library.bc_error_string(code).decode()
        raise KernelError(f"{kernel}: {text} (code {code})", code)
