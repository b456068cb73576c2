// bc_abi_version and bc_error_string, the same in both libraries.

#include "common.cuh"

int32_t bc_abi_version(void) { return BC_ABI_VERSION; }

const char *bc_error_string(int32_t code) {
  switch (code) {
    case BC_OK: return "done";
    case BC_ERROR_NULL: return "a required pointer is NULL";
    case BC_ERROR_DTYPE:
      return "dtype must be BC_FLOAT32 (0), BC_FLOAT16 (1) or BC_BFLOAT16 (2)";
    case BC_ERROR_SIZE:
      return "every size must be at least 1, their product at most 2^48, and a number of images "
             "must divide the number of samples";
    case BC_ERROR_ALIGNMENT: return "a pointer is not aligned to its element";
    case BC_ERROR_STEP: return "the step must lie in 0..S-1 of the solver table";
    case BC_ERROR_OVERLAP:
      return "an output shares memory with another tensor and is not exactly one of the inputs it "
             "may replace";
    case BC_ERROR_WORKSPACE:
      return "the workspace is NULL, not 8-byte aligned or smaller than "
             "bc_cuda_relative_change_workspace_bytes";
    case BC_ERROR_LAYOUT: return "layout must be BC_NCHW (0) or BC_NHWC (1)";
    case BC_ERROR_TERM:
      return "the step's row has a coefficient for a model output, x0 or noise whose pointer is NULL";
    default: break;
  }
#ifdef __CUDACC__
  if (code > 0) return cudaGetErrorString(static_cast<cudaError_t>(code));
#endif
  return "unknown code";
}
