// guidance_rescale_factors: phi * std(c) / std(g) + (1 - phi) per sample, for guided_solver_step.
//
// Idea. Latents are small (64 KiB a sample in bf16), so one block owns one sample: no workspace,
// no second launch, a fixed order. The variance is centred: a first pass finds the two means, a
// second, from the cache, sums the squared distances. The sums then have only the rounding of
// a thread's own float32 additions, (M / 1024 + 4) units of 2^-24 at most where the mean is not
// large against the spread; across threads they are float64.
// The unbiased and the biased variance have the same ratio.
//
// Bytes per latent element: read 2b for T of b bytes, twice, the second time from the cache.

#include <cmath>

#include "common.cuh"

namespace blockcache {
namespace rescale {

struct Args {
  float *factors;
  const void *model_out;
  const float *guidance;
  const float *phi;
  int64_t N;
  int64_t M;
};

BC_INLINE float factor(double squares_c, double squares_g, float phi) {
  return static_cast<float>(phi * sqrt(squares_c / squares_g) + (1.0 - phi));
}

// The conditional half c and the guided output g of V elements.
template <class T, int V>
BC_INLINE void read(float (&c)[V], float (&g)[V], const Args &args, int64_t n, int64_t i) {
  const T *model_out = static_cast<const T *>(args.model_out);
  const float guidance = args.guidance[n];
  load(g, model_out + n * args.M + i);
  load(c, model_out + (args.N + n) * args.M + i);
  for (int j = 0; j < V; ++j) g[j] = g[j] + guidance * (c[j] - g[j]);
}

inline int32_t check(const Args &args, int32_t dtype) {
  if (args.factors == nullptr || args.model_out == nullptr || args.guidance == nullptr ||
      args.phi == nullptr) {
    return BC_ERROR_NULL;
  }
  if (dtype < BC_FLOAT32 || dtype > BC_BFLOAT16) return BC_ERROR_DTYPE;
  if (bad_sizes(args.N, args.M)) return BC_ERROR_SIZE;
  if (!aligned(args.factors, 4) || !aligned(args.guidance, 4) || !aligned(args.phi, 4) ||
      !aligned(args.model_out, dtype_bytes(dtype))) {
    return BC_ERROR_ALIGNMENT;
  }
  const Span factors = {args.factors, args.N, 4};
  if (clash(factors, {args.model_out, 2 * args.N * args.M, dtype_bytes(dtype)}, false) ||
      clash(factors, {args.guidance, args.N, 4}, false) ||
      clash(factors, {args.phi, args.N, 4}, false)) {
    return BC_ERROR_OVERLAP;
  }
  return BC_OK;
}

#ifndef __CUDACC__
// ------------------------------------------------------------------------------------------------
// Reference: the same two passes with float64 sums, in lanes so that the compiler vectorises them.

struct Sums {
  double c, g;
};

template <class T, class Term>
BC_INLINE Sums sum(const Args &args, int64_t n, Term term) {
  constexpr int kLanes = 16;
  double lanes_c[kLanes] = {}, lanes_g[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= args.M; i += kLanes) {
    float c[kLanes], g[kLanes];
    read<T>(c, g, args, n, i);
    for (int j = 0; j < kLanes; ++j) lanes_c[j] += term.c(c[j]);
    for (int j = 0; j < kLanes; ++j) lanes_g[j] += term.g(g[j]);
  }
  for (; i < args.M; ++i) {
    float c[1], g[1];
    read<T>(c, g, args, n, i);
    lanes_c[0] += term.c(c[0]);
    lanes_g[0] += term.g(g[0]);
  }
  Sums sums = {};
  for (int j = 0; j < kLanes; ++j) sums.c += lanes_c[j];
  for (int j = 0; j < kLanes; ++j) sums.g += lanes_g[j];
  return sums;
}

struct Value {
  BC_INLINE double c(float value) const { return value; }
  BC_INLINE double g(float value) const { return value; }
};

struct SquaredDistance {
  double mean_c, mean_g;
  BC_INLINE double c(float value) const { return (value - mean_c) * (value - mean_c); }
  BC_INLINE double g(float value) const { return (value - mean_g) * (value - mean_g); }
};

template <class T>
BC_CLONES static void factors_on_host(const Args &args) {
  for (int64_t n = 0; n < args.N; ++n) {
    const Sums sums = sum<T>(args, n, Value{});
    const double count = static_cast<double>(args.M);
    const Sums squares = sum<T>(args, n, SquaredDistance{sums.c / count, sums.g / count});
    args.factors[n] = factor(squares.c, squares.g, args.phi[n]);
  }
}

#else
// ------------------------------------------------------------------------------------------------
// Kernel: a block of 1024 threads a sample.

constexpr int kRescaleThreads = 1024;
constexpr int kWide = 4;

template <class T, int V>
__global__ void __launch_bounds__(kRescaleThreads) factors_kernel(const Args args) {
  const double count = static_cast<double>(args.M);
  for (int64_t n = blockIdx.x; n < args.N; n += gridDim.x) {
    float sum_c = 0, sum_g = 0;
    for (int64_t i = V * int64_t{threadIdx.x}; i < args.M; i += V * kRescaleThreads) {
      float c[V], g[V];
      read<T>(c, g, args, n, i);
      for (int j = 0; j < V; ++j) sum_c += c[j];
      for (int j = 0; j < V; ++j) sum_g += g[j];
    }
    const float mean_c = static_cast<float>(block_sum<kRescaleThreads>(sum_c) / count);
    const float mean_g = static_cast<float>(block_sum<kRescaleThreads>(sum_g) / count);

    float squares_c = 0, squares_g = 0;
    for (int64_t i = V * int64_t{threadIdx.x}; i < args.M; i += V * kRescaleThreads) {
      float c[V], g[V];
      read<T>(c, g, args, n, i);
      for (int j = 0; j < V; ++j) squares_c += (c[j] - mean_c) * (c[j] - mean_c);
      for (int j = 0; j < V; ++j) squares_g += (g[j] - mean_g) * (g[j] - mean_g);
    }
    const double total_c = block_sum<kRescaleThreads>(squares_c);
    const double total_g = block_sum<kRescaleThreads>(squares_g);
    if (threadIdx.x == 0) args.factors[n] = factor(total_c, total_g, args.phi[n]);
  }
}

// ------------------------------------------------------------------------------------------------
// Launcher.

template <class T, int V>
int32_t launch_factors(const Args &args, void *stream) {
  const dim3 grid(static_cast<unsigned>(args.N < 65535 ? args.N : 65535));
  return launch(factors_kernel<T, V>, grid, kRescaleThreads, stream, args);
}
#endif

}  // namespace rescale
}  // namespace blockcache

#ifndef __CUDACC__
int32_t bc_host_guidance_rescale_factors(float *factors, const void *model_out,
                                         const float *guidance, const float *phi, int64_t N,
                                         int64_t M, int32_t dtype) {
  using namespace blockcache;
  const rescale::Args args = {factors, model_out, guidance, phi, N, M};
  const int32_t refused = rescale::check(args, dtype);
  if (refused != BC_OK) return refused;
  return dispatch_dtype(dtype, [&](auto type) {
    rescale::factors_on_host<decltype(type)>(args);
    return BC_OK;
  });
}
#else
int32_t bc_cuda_guidance_rescale_factors(float *factors, const void *model_out,
                                         const float *guidance, const float *phi, int64_t N,
                                         int64_t M, int32_t dtype, void *stream) {
  using namespace blockcache;
  const rescale::Args args = {factors, model_out, guidance, phi, N, M};
  const int32_t refused = rescale::check(args, dtype);
  if (refused != BC_OK) return refused;
  return dispatch_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const bool wide = M % rescale::kWide == 0 &&
                      aligned(model_out, rescale::kWide * dtype_bytes(dtype));
    return wide ? rescale::launch_factors<T, rescale::kWide>(args, stream)
                : rescale::launch_factors<T, 1>(args, stream);
  });
}
#endif
