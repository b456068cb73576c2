// The CUDA library: every kernel file as one translation unit, which halves the time of a build for
// several architectures.

#include "guidance_rescale_factors.cu"
#include "guided_solver_step.cu"
#include "relative_change.cu"
#include "scale_shift_residual.cu"
#include "status.cu"
