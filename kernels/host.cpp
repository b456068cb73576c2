// The host library: every kernel file read by the host compiler, as one translation unit.

#include "guidance_rescale_factors.cu"
#include "guided_solver_step.cu"
#include "relative_change.cu"
#include "scale_shift_residual.cu"
#include "status.cu"
