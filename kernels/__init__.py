"""The work between two runs of the U-Net: solver step, relative change, scale-shift residual.

The host functions take numpy arrays and run on the CPU. The CUDA library is handed out as a
`ctypes.CDLL` with its signatures set, for callers that hold device addresses. Importing this
package loads neither: a missing library is first met by the call that needs it.

Letters: N samples, M elements of one sample (C * H * W), S steps, C channels, L pixels.
"""

from blockcache.kernels._host import (
    bind_guidance_rescale_factors,
    bind_guided_solver_step,
    guidance_rescale_factors,
    guided_solver_step,
    relative_change,
    scale_shift_residual,
)
from blockcache.kernels._library import (
    ABI_VERSION,
    DTYPES,
    LAYOUTS,
    ROW,
    GuidedSolverStepArgs,
    KernelError,
    ScaleShiftResidualArgs,
    check,
    cuda_library,
    host_available,
    host_library,
)

__all__ = [
    "ABI_VERSION",
    "DTYPES",
    "LAYOUTS",
    "ROW",
    "GuidedSolverStepArgs",
    "KernelError",
    "ScaleShiftResidualArgs",
    "bind_guidance_rescale_factors",
    "bind_guided_solver_step",
    "check",
    "cuda_library",
    "guidance_rescale_factors",
    "guided_solver_step",
    "host_available",
    "host_library",
    "relative_change",
    "scale_shift_residual",
]
