/* The C ABI of blockcache's kernels: what libblockcache_host.so and libblockcache_cuda.so export.
 *
 * Every function exists twice, from the same source: `bc_host_*` reads host memory and is done on
 * return; `bc_cuda_*` reads device memory, only enqueues on `stream`, and never synchronises,
 * allocates or keeps state. Both give the same bits wherever no sum is involved.
 *
 * Letters: N samples (images in the batch), M elements of one sample (C * H * W), S steps,
 * C channels, L pixels of one channel (H * W), T the element type named by a `dtype` argument.
 * Tensors are contiguous. Outputs come first, the stream last.
 *
 * Returns: 0 done; negative a refused argument (nothing was written); positive a cudaError_t.
 * `bc_error_string` has the text of each.
 *
 * Pointers must be aligned to their element. 16-byte alignment, and sizes that keep every sample
 * 16-byte aligned, are not required but let the CUDA kernels use 128-bit accesses.
 */
#ifndef BLOCKCACHE_KERNELS_H
#define BLOCKCACHE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BC_API __attribute__((visibility("default")))

/* Raised whenever a struct or a signature below changes; a loader refuses another number. */
#define BC_ABI_VERSION 4

/* Values of `dtype`. */
#define BC_FLOAT32 0
#define BC_FLOAT16 1
#define BC_BFLOAT16 2

/* Values of `layout`. */
#define BC_NCHW 0
#define BC_NHWC 1

/* Refused arguments. */
#define BC_OK 0
#define BC_ERROR_NULL (-1)
#define BC_ERROR_DTYPE (-2)
#define BC_ERROR_SIZE (-3)
#define BC_ERROR_ALIGNMENT (-4)
#define BC_ERROR_STEP (-5)
#define BC_ERROR_OVERLAP (-6)
#define BC_ERROR_WORKSPACE (-7)
#define BC_ERROR_LAYOUT (-8)
#define BC_ERROR_TERM (-9)

/* Columns of the solver table, float32 [S, BC_ROW]. */
#define BC_ROW 8
#define BC_C_SAMPLE 0
#define BC_C_MODEL 1
#define BC_C_PREVIOUS 2
#define BC_C_EARLIER 3
#define BC_D_SAMPLE 4
#define BC_D_MODEL 5
#define BC_NEXT_INPUT_SCALE 6
#define BC_C_NOISE 7

BC_API int32_t bc_abi_version(void);

/* Static text for any code returned here; never NULL. */
BC_API const char *bc_error_string(int32_t code);

/* ------------------------------------------------------------------------------------------------
 * guided_solver_step: guidance, solver update, x0 and the next model input in one pass.
 *
 *   g           = u + guidance * (c - u)     u, c the two halves of model_out, unconditional first
 *   g           = u + image_guidance * (i - u) + guidance * (c - i)
 *                                            with image guidance too: u, i, c the three thirds, i
 *                                            being conditioned on the image alone (InstructPix2Pix)
 *   g           = m                          without guidance
 *   g           = rescale * g                with rescale
 *   next_sample = c_sample * x + c_model * g + c_previous * h0 + c_earlier * h1
 *                 + c_noise * z
 *   x0_out      = d_sample * x + d_model * g
 *   next_input  = next_input_scale * next_sample, rounded to T, in every half or third with guidance
 *
 * z are standard normal numbers: Philox 4x32-10 under the sample's seed, counted by the step and the
 * element in groups of four, then Box and Muller.
 *
 * A model output, x0 or seed whose coefficients in the row are all 0 is not read: its pointer may
 * be NULL and its memory may hold anything. So one extra row (1, 0, 0, 0, 0, 0, scale, 0) makes
 * the first input. Everything else propagates NaN and infinity as the formula does.
 *
 * An output may be the very buffer of an input with elements of the same size (next_sample over
 * sample, x0_out over previous_x0 or earlier_x0); any other overlap is refused. */
typedef struct bc_guided_solver_step_args {
  float *next_sample;          /* float32 [N, M] */
  float *x0_out;               /* float32 [N, M], or NULL: not wanted */
  void *next_input;            /* T, shaped as model_out; or NULL: not wanted */
  const float *sample;         /* float32 [N, M] */
  const void *model_out;       /* T [2N, M] with guidance, [3N, M] with image guidance, else [N, M] */
  const float *previous_x0;    /* float32 [N, M], or NULL where its coefficient is 0 */
  const float *earlier_x0;     /* float32 [N, M], or NULL where its coefficient is 0 */
  const float *table;          /* float32 [S, BC_ROW] */
  const int32_t *step_counter; /* int32 [1]: read in place of `step`; or NULL */
  const float *guidance;       /* float32 [N], one scale per sample; or NULL: no guidance */
  const float *image_guidance; /* float32 [N], only with guidance; or NULL: two halves */
  const float *rescale;        /* float32 [N] of guidance_rescale_factors; or NULL: off */
  const uint64_t *seeds;       /* [N], one a sample; or NULL where no step adds noise */
  int64_t N;
  int64_t M;
  int32_t S;
  int32_t dtype; /* T of model_out and next_input */
} bc_guided_solver_step_args;

/* `step` in 0..S-1 picks the row, unless args->step_counter is given: a captured CUDA graph keeps
 * its arguments, so its step lives in device memory. On the device a counter outside 0..S-1, or
 * a NULL tensor whose coefficient is not 0, makes the affected outputs NaN. */
BC_API int32_t bc_host_guided_solver_step(const bc_guided_solver_step_args *args, int32_t step);
BC_API int32_t bc_cuda_guided_solver_step(const bc_guided_solver_step_args *args, int32_t step,
                                          void *stream);

/* ------------------------------------------------------------------------------------------------
 * guidance_rescale_factors: the `rescale` argument above (arXiv 2305.08891, section 3.4; diffusers'
 * rescale_noise_cfg).
 *
 *   factors[n] = phi[n] * std(c[n]) / std(g[n]) + (1 - phi[n])      factors float32 [N]
 *
 * model_out T [2N, M], guidance and phi float32 [N]: in memory, as a captured CUDA graph keeps its
 * arguments. */
BC_API int32_t bc_host_guidance_rescale_factors(float *factors, const void *model_out,
                                                const float *guidance, const float *phi, int64_t N,
                                                int64_t M, int32_t dtype);
BC_API int32_t bc_cuda_guidance_rescale_factors(float *factors, const void *model_out,
                                                const float *guidance, const float *phi, int64_t N,
                                                int64_t M, int32_t dtype, void *stream);

/* ------------------------------------------------------------------------------------------------
 * relative_change: eq. 6 of Block Caching, sum |now - before| / sum |now|.
 *
 * now, before T [N, M]. Sample n belongs to image n % images, which must divide N: with guidance an
 * image is its unconditional and its conditional half, with images = N every sample is its own.
 * per_image float32 [images] and whole float32 [1], each of which may be NULL. The order of
 * summation depends on the sizes, dtype and 16-byte alignment, never on timing or the device.
 * No difference is a change of 0, also where all is 0. The workspace is device memory, 8-byte
 * aligned; its size is 0 for sizes that would be refused. */
BC_API int32_t bc_host_relative_change(float *per_image, float *whole, const void *now,
                                       const void *before, int64_t images, int64_t N, int64_t M,
                                       int32_t dtype);
BC_API size_t bc_cuda_relative_change_workspace_bytes(int64_t N, int64_t M);
BC_API int32_t bc_cuda_relative_change(float *per_image, float *whole, const void *now,
                                       const void *before, int64_t images, int64_t N, int64_t M,
                                       int32_t dtype, void *workspace, size_t workspace_bytes,
                                       void *stream);

/* ------------------------------------------------------------------------------------------------
 * scale_shift_residual: y = x + scale * last + before_scale * before + shift, per channel.
 *
 * y, x, last, before T [N, C, L] (BC_NCHW) or [N, L, C] (BC_NHWC); scale, before_scale, shift
 * float32 [C]. Without `before` (NULL), before_scale is not read. Computed in float32, in that
 * order, rounded to T once: at scale 1, shift 0 it is the plain residual addition. y may be x,
 * last or before. */
typedef struct bc_scale_shift_residual_args {
  void *y;                   /* T */
  const void *x;             /* T */
  const void *last;          /* T: the block's last output */
  const void *before;        /* T: the output before it; or NULL */
  const float *scale;        /* float32 [C] */
  const float *before_scale; /* float32 [C]; or NULL without `before` */
  const float *shift;        /* float32 [C] */
  int64_t N;
  int64_t C;
  int64_t L;
  int32_t layout;
  int32_t dtype; /* T */
} bc_scale_shift_residual_args;

BC_API int32_t bc_host_scale_shift_residual(const bc_scale_shift_residual_args *args);
BC_API int32_t bc_cuda_scale_shift_residual(const bc_scale_shift_residual_args *args, void *stream);

#ifdef __cplusplus
}
#endif

#endif
