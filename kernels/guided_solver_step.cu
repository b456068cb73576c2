// guided_solver_step: all the work between two runs of the U-Net, in one launch.
//
// Idea. Guidance, prediction type and solver are linear in the sample, the model output, the last two
// x0 and fresh noise once the step is fixed, so a step is a row of eight numbers. Every tensor is read
// once and written once; the row, the guidance and the rescale factor are uniform over a block. Noise
// is computed from a counter where it is added and takes no memory.
//
// Guidance by text and by image (InstructPix2Pix) reads three thirds instead of two halves.
//
// Bytes per latent element with guidance and T of b bytes: read 4 (x) + 2b (u, c) + 4 per x0
// used, write 4 (next x) + 4 (x0) + 2b (next input). DPM-Solver++ 2M in bf16: 24 bytes.
// The torch operations in tools/bench/kernels/cuda.py move 172 bytes in 17 launches.

#include "common.cuh"
#include "philox.cuh"

namespace blockcache {
namespace solver {

using Args = bc_guided_solver_step_args;

// What is uniform over a launch. A needed tensor that is absent poisons the sum it belongs to:
// a device cannot return an error code.
struct Row {
  float c_sample, c_model, c_previous, c_earlier, d_sample, d_model, next_input_scale, c_noise;
  int32_t step;
  bool reads_model, reads_previous, reads_earlier, adds_noise;
  bool misses_tensor;
};

BC_INLINE Row read_row(const Args &args, int32_t step) {
  const int32_t s = args.step_counter != nullptr ? *args.step_counter : step;
  if (s < 0 || s >= args.S) {
    return {quiet_nan(), 0, 0, 0, quiet_nan(), 0, 1, 0, s, false, false, false, false, false};
  }
  const float *entry = args.table + static_cast<int64_t>(BC_ROW) * s;
  Row row;
  row.c_sample = entry[BC_C_SAMPLE];
  row.c_model = entry[BC_C_MODEL];
  row.c_previous = entry[BC_C_PREVIOUS];
  row.c_earlier = entry[BC_C_EARLIER];
  row.d_sample = entry[BC_D_SAMPLE];
  row.d_model = entry[BC_D_MODEL];
  row.next_input_scale = entry[BC_NEXT_INPUT_SCALE];
  row.c_noise = entry[BC_C_NOISE];
  row.step = s;
  row.reads_model = row.c_model != 0 || row.d_model != 0;
  row.reads_previous = row.c_previous != 0;
  row.reads_earlier = row.c_earlier != 0;
  row.adds_noise = row.c_noise != 0;
  const bool no_model = row.reads_model && args.model_out == nullptr;
  const bool no_previous = row.reads_previous && args.previous_x0 == nullptr;
  const bool no_earlier = row.reads_earlier && args.earlier_x0 == nullptr;
  const bool no_seeds = row.adds_noise && args.seeds == nullptr;
  row.reads_model &= !no_model;
  row.reads_previous &= !no_previous;
  row.reads_earlier &= !no_earlier;
  row.adds_noise &= !no_seeds;
  row.misses_tensor = no_model || no_previous || no_earlier || no_seeds;
  if (row.misses_tensor) row.c_sample = quiet_nan();
  if (no_model) row.d_sample = quiet_nan();
  return row;
}

// How often a sample stands in model_out: once, or once for each half or third of guidance.
BC_INLINE int64_t parts(const Args &args) {
  return 1 + (args.guidance != nullptr ? 1 : 0) + (args.image_guidance != nullptr ? 1 : 0);
}

// V elements of sample n from element i on. All reads come before the first write, which is what
// makes the allowed aliasing safe. The host and the device run this very function.
template <class T, int V>
BC_INLINE void update(const Args &args, const Row &row, int64_t n, int64_t i) {
  const int64_t at = n * args.M + i;
  const int64_t part = args.N * args.M;
  float x[V], g[V] = {}, h[V], next[V];
  load(x, args.sample + at);
  for (int j = 0; j < V; ++j) next[j] = row.c_sample * x[j];

  if (row.reads_model) {
    const T *model_out = static_cast<const T *>(args.model_out);
    load(g, model_out + at);
    if (args.guidance != nullptr) {
      const float guidance = args.guidance[n];
      float c[V];
      if (args.image_guidance != nullptr) {
        const float image_guidance = args.image_guidance[n];
        float k[V];  // conditioned on the image alone
        load(k, model_out + part + at);
        load(c, model_out + 2 * part + at);
        for (int j = 0; j < V; ++j) {
          g[j] = g[j] + image_guidance * (k[j] - g[j]) + guidance * (c[j] - k[j]);
        }
      } else {
        load(c, model_out + part + at);
        for (int j = 0; j < V; ++j) g[j] = g[j] + guidance * (c[j] - g[j]);
      }
    }
    if (args.rescale != nullptr) {
      const float rescale = args.rescale[n];
      for (int j = 0; j < V; ++j) g[j] = rescale * g[j];
    }
    for (int j = 0; j < V; ++j) next[j] = next[j] + row.c_model * g[j];
  }
  if (row.reads_previous) {
    load(h, args.previous_x0 + at);
    for (int j = 0; j < V; ++j) next[j] = next[j] + row.c_previous * h[j];
  }
  if (row.reads_earlier) {
    load(h, args.earlier_x0 + at);
    for (int j = 0; j < V; ++j) next[j] = next[j] + row.c_earlier * h[j];
  }
  if (row.adds_noise) {
    standard_normal(h, args.seeds[n], row.step, i);
    for (int j = 0; j < V; ++j) next[j] = next[j] + row.c_noise * h[j];
  }

  if (args.x0_out != nullptr) {
    for (int j = 0; j < V; ++j) h[j] = row.d_sample * x[j];
    if (row.reads_model) {
      for (int j = 0; j < V; ++j) h[j] = h[j] + row.d_model * g[j];
    }
    store(args.x0_out + at, h);
  }
  store(args.next_sample + at, next);
  if (args.next_input != nullptr) {
    T *next_input = static_cast<T *>(args.next_input);
    for (int j = 0; j < V; ++j) next[j] = row.next_input_scale * next[j];
    store(next_input + at, next);
    for (int64_t p = 1; p < parts(args); ++p) store(next_input + p * part + at, next);
  }
}

inline int32_t check(const Args *given, int32_t step) {
  if (given == nullptr) return BC_ERROR_NULL;
  const Args &args = *given;
  if (args.next_sample == nullptr || args.sample == nullptr || args.table == nullptr) {
    return BC_ERROR_NULL;
  }
  if (args.image_guidance != nullptr && args.guidance == nullptr) return BC_ERROR_NULL;
  if (args.dtype < BC_FLOAT32 || args.dtype > BC_BFLOAT16) return BC_ERROR_DTYPE;
  if (bad_sizes(args.N, args.M) || args.S < 1) return BC_ERROR_SIZE;

  const int64_t elements = args.N * args.M;
  const int64_t batched = parts(args) * elements;
  const int64_t bytes = dtype_bytes(args.dtype);
  constexpr int kOutputs = 3;  // then the tensors they may be written over, then the small ones
  constexpr int kTensors = 7;
  const Span spans[] = {
      {args.next_sample, elements, 4},   {args.x0_out, elements, 4},
      {args.next_input, batched, bytes}, {args.sample, elements, 4},
      {args.model_out, batched, bytes},  {args.previous_x0, elements, 4},
      {args.earlier_x0, elements, 4},    {args.table, int64_t{BC_ROW} * args.S, 4},
      {args.step_counter, 1, 4},         {args.guidance, args.N, 4},
      {args.image_guidance, args.N, 4},  {args.rescale, args.N, 4},
      {args.seeds, args.N, 8},
  };
  int position = 0;
  for (const Span &span : spans) {
    if (!aligned(span.start, span.element_bytes)) return BC_ERROR_ALIGNMENT;
    const bool in_place = position >= kOutputs && position < kTensors;
    for (int out = 0; out < kOutputs && out < position; ++out) {
      if (clash(spans[out], span, in_place)) return BC_ERROR_OVERLAP;
    }
    ++position;
  }
  // Last, so that a call with step -1 is a dry run of every other check.
  if (args.step_counter == nullptr && (step < 0 || step >= args.S)) return BC_ERROR_STEP;
  return BC_OK;
}

#ifndef __CUDACC__
// ------------------------------------------------------------------------------------------------
// Reference: plain loops. A chunk fits the first-level cache and has room for every vector width.

template <class T>
BC_CLONES static void step_on_host(const Args &args, const Row &row) {
  constexpr int kChunk = 256;
  for (int64_t n = 0; n < args.N; ++n) {
    int64_t i = 0;
    for (; i + kChunk <= args.M; i += kChunk) update<T, kChunk>(args, row, n, i);
    for (; i < args.M; ++i) update<T, 1>(args, row, n, i);
  }
}

#else
// ------------------------------------------------------------------------------------------------
// Kernel: four elements a thread, so that float32 tensors move 128 bits at once and a small latent
// still fills the device.

template <class T, int V>
__global__ void __launch_bounds__(kThreads) step_kernel(const Args args, int32_t step) {
  const Row row = read_row(args, step);
  const int64_t stride = int64_t{V} * kThreads * gridDim.x;
  for (int64_t n = blockIdx.y; n < args.N; n += gridDim.y) {
    int64_t i = V * (int64_t{kThreads} * blockIdx.x + threadIdx.x);
    for (; i < args.M; i += stride) update<T, V>(args, row, n, i);
  }
}

// ------------------------------------------------------------------------------------------------
// Launcher.

template <class T, int V>
int32_t launch_step(const Args &args, int32_t step, void *stream) {
  const int64_t per_block = int64_t{V} * kThreads;
  const int64_t blocks = (args.M + per_block - 1) / per_block;
  const dim3 grid(static_cast<unsigned>(blocks < 65535 ? blocks : 65535),
                  static_cast<unsigned>(args.N < 65535 ? args.N : 65535));
  return launch(step_kernel<T, V>, grid, kThreads, stream, args, step);
}

constexpr int kWide = 4;

// Whether every tensor's every sample starts where a pack of kWide elements may.
inline bool takes_wide(const Args &args) {
  const int64_t narrow = kWide * dtype_bytes(args.dtype);
  return args.M % kWide == 0 && aligned(args.next_sample, 16) && aligned(args.x0_out, 16) &&
         aligned(args.next_input, narrow) && aligned(args.sample, 16) &&
         aligned(args.model_out, narrow) && aligned(args.previous_x0, 16) &&
         aligned(args.earlier_x0, 16);
}
#endif

}  // namespace solver
}  // namespace blockcache

#ifndef __CUDACC__
int32_t bc_host_guided_solver_step(const bc_guided_solver_step_args *args, int32_t step) {
  using namespace blockcache;
  const int32_t refused = solver::check(args, step);
  if (refused != BC_OK) return refused;
  if (args->step_counter != nullptr) step = *args->step_counter;
  if (step < 0 || step >= args->S) return BC_ERROR_STEP;
  const solver::Row row = solver::read_row(*args, step);
  if (row.misses_tensor) return BC_ERROR_TERM;
  return dispatch_dtype(args->dtype, [&](auto type) {
    solver::step_on_host<decltype(type)>(*args, row);
    return BC_OK;
  });
}
#else
int32_t bc_cuda_guided_solver_step(const bc_guided_solver_step_args *args, int32_t step,
                                   void *stream) {
  using namespace blockcache;
  const int32_t refused = solver::check(args, step);
  if (refused != BC_OK) return refused;
  return dispatch_dtype(args->dtype, [&](auto type) {
    using T = decltype(type);
    return solver::takes_wide(*args) ? solver::launch_step<T, solver::kWide>(*args, step, stream)
                                     : solver::launch_step<T, 1>(*args, step, stream);
  });
}
#endif
