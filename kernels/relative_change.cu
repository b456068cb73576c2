// relative_change: eq. 6, sum |now - before| / sum |now|, per image and over the whole batch.
//
// Idea. Both sums in one pass. Terms are not negative, so nothing cancels: a pack of V <= 8 terms
// is added as a float32 tree (1 rounding of the difference, 3 of the tree), packs in float64.
// Each sum is thus within 4 units of 2^-24 relative, the quotient within 9 with its own rounding.
// Terms must stay below 2^125 for a pack's sum not to overflow. A block of threads leaves a pair
// of sums in the workspace; one more block adds them up in a fixed order, by sample, then by image
// (an image's two halves of guidance lie apart in the batch).
//
// Bytes per element: read 2b for T of b bytes; 16 bytes of workspace per 8192 elements or more.

#include "common.cuh"

namespace blockcache {
namespace change {

struct Args {
  float *per_image;
  float *whole;
  const void *now;
  const void *before;
  int64_t images;
  int64_t N;
  int64_t M;
};

struct Sums {
  double difference, magnitude;
};

BC_INLINE float magnitude(float value) { return float_of(bits_of(value) & 0x7fffffffu); }

// Leaves |now - before| and |now| of V elements.
template <class T, int V>
BC_INLINE void read(float (&difference)[V], float (&value)[V], const Args &args, int64_t at) {
  load(value, static_cast<const T *>(args.now) + at);
  load(difference, static_cast<const T *>(args.before) + at);
  for (int j = 0; j < V; ++j) difference[j] = magnitude(value[j] - difference[j]);
  for (int j = 0; j < V; ++j) value[j] = magnitude(value[j]);
}

BC_INLINE void add(Sums &sums, const Sums &more) {
  sums.difference += more.difference;
  sums.magnitude += more.magnitude;
}

// What did not change at all has a change of 0, also where all of it is 0.
BC_INLINE float quotient(const Sums &sums) {
  return sums.difference == 0 ? 0.0f : static_cast<float>(sums.difference / sums.magnitude);
}

inline int32_t check(const Args &args, int32_t dtype) {
  if (args.per_image == nullptr && args.whole == nullptr) return BC_ERROR_NULL;
  if (args.now == nullptr || args.before == nullptr) return BC_ERROR_NULL;
  if (dtype < BC_FLOAT32 || dtype > BC_BFLOAT16) return BC_ERROR_DTYPE;
  if (bad_sizes(args.N, args.M) || args.images < 1) return BC_ERROR_SIZE;
  if (args.N % args.images != 0) return BC_ERROR_SIZE;
  const int64_t bytes = dtype_bytes(dtype);
  if (!aligned(args.per_image, 4) || !aligned(args.whole, 4) || !aligned(args.now, bytes) ||
      !aligned(args.before, bytes)) {
    return BC_ERROR_ALIGNMENT;
  }
  const Span outputs[] = {{args.per_image, args.images, 4}, {args.whole, 1, 4}};
  const Span inputs[] = {{args.now, args.N * args.M, bytes}, {args.before, args.N * args.M, bytes}};
  bool overlap = clash(outputs[0], outputs[1], false);
  for (const Span &output : outputs) {
    for (const Span &input : inputs) overlap |= clash(output, input, false);
  }
  return overlap ? BC_ERROR_OVERLAP : BC_OK;
}

#ifndef __CUDACC__
// ------------------------------------------------------------------------------------------------
// Reference: 16 lanes side by side, each a tree over 8 rows and then a float64 sum, so that the
// compiler vectorises across lanes and the error bound above holds for each.

constexpr int kLanes = 16;
constexpr int kRows = 8;

template <class T>
BC_INLINE Sums sums_of_sample(const Args &args, int64_t n) {
  double difference[kLanes] = {}, value[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes * kRows <= args.M; i += kLanes * kRows) {
    float d[kLanes * kRows], v[kLanes * kRows];
    read<T>(d, v, args, n * args.M + i);
    for (int width = kRows / 2 * kLanes; width >= kLanes; width /= 2) {
      for (int j = 0; j < width; ++j) d[j] = d[j] + d[j + width];
      for (int j = 0; j < width; ++j) v[j] = v[j] + v[j + width];
    }
    for (int j = 0; j < kLanes; ++j) difference[j] += d[j];
    for (int j = 0; j < kLanes; ++j) value[j] += v[j];
  }
  for (; i < args.M; ++i) {
    float d[1], v[1];
    read<T>(d, v, args, n * args.M + i);
    difference[0] += d[0];
    value[0] += v[0];
  }
  return {tree_sum(difference), tree_sum(value)};
}

template <class T>
BC_CLONES static void change_on_host(const Args &args) {
  Sums whole = {};
  for (int64_t image = 0; image < args.images; ++image) {
    Sums sums = {};
    for (int64_t n = image; n < args.N; n += args.images) add(sums, sums_of_sample<T>(args, n));
    if (args.per_image != nullptr) args.per_image[image] = quotient(sums);
    add(whole, sums);
  }
  if (args.whole != nullptr) *args.whole = quotient(whole);
}

#else
// ------------------------------------------------------------------------------------------------
// Kernels: partial sums of a part of one sample, then a single block over the partial sums.

// Parts of a sample, from M alone, so that neither the device nor its load changes the order.
inline int64_t parts_of(int64_t M) {
  constexpr int64_t kElementsPerPart = int64_t{kThreads} * 8 * 4;
  constexpr int64_t kMaxParts = 1024;
  const int64_t parts = (M + kElementsPerPart - 1) / kElementsPerPart;
  return parts < kMaxParts ? parts : kMaxParts;
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) parts_kernel(const Args args, Sums *parts) {
  const int64_t stride = int64_t{V} * kThreads * gridDim.x;
  const int64_t first = V * (int64_t{kThreads} * blockIdx.x + threadIdx.x);
  for (int64_t n = blockIdx.y; n < args.N; n += gridDim.y) {
    Sums sums = {};
#pragma unroll 4
    for (int64_t i = first; i < args.M; i += stride) {
      float difference[V], value[V];
      read<T>(difference, value, args, n * args.M + i);
      sums.difference += tree_sum(difference);
      sums.magnitude += tree_sum(value);
    }
    sums.difference = block_sum<kThreads>(sums.difference);
    sums.magnitude = block_sum<kThreads>(sums.magnitude);
    if (threadIdx.x == 0) parts[n * gridDim.x + blockIdx.x] = sums;
  }
}

// A warp adds up one sample at a time; then a thread the samples of one image at a time, and the
// first warp all of them.
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const Args args, const Sums *parts, Sums *samples, int64_t parts_per_sample) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int64_t n = warp; n < args.N; n += kThreads / kWarp) {
    Sums sums = {};
    for (int64_t p = lane; p < parts_per_sample; p += kWarp) {
      add(sums, parts[n * parts_per_sample + p]);
    }
    sums.difference = warp_sum(sums.difference);
    sums.magnitude = warp_sum(sums.magnitude);
    if (lane == 0) samples[n] = sums;
  }
  __syncthreads();
  if (args.per_image != nullptr) {
    for (int64_t image = threadIdx.x; image < args.images; image += kThreads) {
      Sums sums = {};
      for (int64_t n = image; n < args.N; n += args.images) add(sums, samples[n]);
      args.per_image[image] = quotient(sums);
    }
  }
  if (args.whole == nullptr || warp != 0) return;
  Sums sums = {};
  for (int64_t n = lane; n < args.N; n += kWarp) add(sums, samples[n]);
  sums.difference = warp_sum(sums.difference);
  sums.magnitude = warp_sum(sums.magnitude);
  if (lane == 0) *args.whole = quotient(sums);
}

// ------------------------------------------------------------------------------------------------
// Launcher.

template <class T, int V>
int32_t launch_change(const Args &args, Sums *workspace, void *stream) {
  const int64_t parts = parts_of(args.M);
  const dim3 grid(static_cast<unsigned>(parts),
                  static_cast<unsigned>(args.N < 65535 ? args.N : 65535));
  Sums *samples = workspace + args.N * parts;
  const int32_t status = launch(parts_kernel<T, V>, grid, kThreads, stream, args, workspace);
  if (status != BC_OK) return status;
  const Sums *sums = workspace;
  return launch(finish_kernel, dim3(1), kThreads, stream, args, sums, samples, parts);
}
#endif

}  // namespace change
}  // namespace blockcache

#ifndef __CUDACC__
int32_t bc_host_relative_change(float *per_image, float *whole, const void *now,
                                const void *before, int64_t images, int64_t N, int64_t M,
                                int32_t dtype) {
  using namespace blockcache;
  const change::Args args = {per_image, whole, now, before, images, N, M};
  const int32_t refused = change::check(args, dtype);
  if (refused != BC_OK) return refused;
  return dispatch_dtype(dtype, [&](auto type) {
    change::change_on_host<decltype(type)>(args);
    return BC_OK;
  });
}
#else
size_t bc_cuda_relative_change_workspace_bytes(int64_t N, int64_t M) {
  using namespace blockcache;
  if (bad_sizes(N, M)) return 0;
  return static_cast<size_t>(N * (change::parts_of(M) + 1)) * sizeof(change::Sums);
}

int32_t bc_cuda_relative_change(float *per_image, float *whole, const void *now,
                                const void *before, int64_t images, int64_t N, int64_t M,
                                int32_t dtype, void *workspace, size_t workspace_bytes,
                                void *stream) {
  using namespace blockcache;
  const change::Args args = {per_image, whole, now, before, images, N, M};
  const int32_t refused = change::check(args, dtype);
  if (refused != BC_OK) return refused;
  if (workspace == nullptr || !aligned(workspace, alignof(change::Sums)) ||
      workspace_bytes < bc_cuda_relative_change_workspace_bytes(N, M)) {
    return BC_ERROR_WORKSPACE;
  }
  auto *sums = static_cast<change::Sums *>(workspace);
  return dispatch_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kWide = static_cast<int>(16 / sizeof(T));
    const bool wide = M % kWide == 0 && aligned(now, 16) && aligned(before, 16);
    return wide ? change::launch_change<T, kWide>(args, sums, stream)
                : change::launch_change<T, 1>(args, sums, stream);
  });
}
#endif
