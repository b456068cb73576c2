// scale_shift_residual: y = x + scale * last + before_scale * before + shift, per channel.
//
// Idea. One pass in the tensor's own order, which serves both layouts: with `inner` elements in
// a run of one channel (L in NCHW, 1 in NHWC) the channel of element e is (e / inner) % C. A pack
// of V elements needs that division once; then its channels are one, or V consecutive, or are
// counted on. float32 arithmetic in the order written, one rounding to T.
//
// Bytes per element: read 2b (x, last) or 3b (and before) for T of b bytes, write b.

#include "common.cuh"

namespace blockcache {
namespace residual {

using Args = bc_scale_shift_residual_args;

// Where a pack's channels lie: in one channel; V channels in a row; or to be counted, with `inner`
// elements to a run.
enum class Channels { kOne, kInRow, kCounted };

template <int V>
struct Coefficients {
  float scale[V], before_scale[V], shift[V];
};

// The coefficients of V elements, the first of which is element `within` of a run of `channel`.
template <int V>
BC_INLINE Coefficients<V> coefficients(const Args &args, Channels channels, int64_t channel,
                                       int64_t within, int64_t inner) {
  Coefficients<V> k = {};
  if (channels == Channels::kInRow) {
    load(k.scale, args.scale + channel);
    load(k.shift, args.shift + channel);
    if (args.before != nullptr) load(k.before_scale, args.before_scale + channel);
    return k;
  }
  for (int j = 0; j < V; ++j) {
    k.scale[j] = args.scale[channel];
    k.shift[j] = args.shift[channel];
    if (args.before != nullptr) k.before_scale[j] = args.before_scale[channel];
    if (channels == Channels::kOne || ++within < inner) continue;
    within = 0;
    channel = channel + 1 == args.C ? 0 : channel + 1;
  }
  return k;
}

// V elements from element `at` on, with their coefficients. Every read comes before the write.
template <class T, int V>
BC_INLINE void update(const Args &args, const Coefficients<V> &k, int64_t at) {
  float sum[V], block[V];
  load(sum, static_cast<const T *>(args.x) + at);
  load(block, static_cast<const T *>(args.last) + at);
  for (int j = 0; j < V; ++j) sum[j] = sum[j] + k.scale[j] * block[j];
  if (args.before != nullptr) {
    load(block, static_cast<const T *>(args.before) + at);
    for (int j = 0; j < V; ++j) sum[j] = sum[j] + k.before_scale[j] * block[j];
  }
  for (int j = 0; j < V; ++j) sum[j] = sum[j] + k.shift[j];
  store(static_cast<T *>(args.y) + at, sum);
}

inline int32_t check(const Args *given) {
  if (given == nullptr) return BC_ERROR_NULL;
  const Args &args = *given;
  if (args.y == nullptr || args.x == nullptr || args.last == nullptr || args.scale == nullptr ||
      args.shift == nullptr || (args.before != nullptr && args.before_scale == nullptr)) {
    return BC_ERROR_NULL;
  }
  if (args.dtype < BC_FLOAT32 || args.dtype > BC_BFLOAT16) return BC_ERROR_DTYPE;
  if (args.layout != BC_NCHW && args.layout != BC_NHWC) return BC_ERROR_LAYOUT;
  if (bad_sizes(args.N, args.C) || bad_sizes(args.N * args.C, args.L)) return BC_ERROR_SIZE;

  const int64_t elements = args.N * args.C * args.L;
  const int64_t bytes = dtype_bytes(args.dtype);
  constexpr int kTensors = 3;
  const Span y = {args.y, elements, bytes};
  const Span inputs[] = {{args.x, elements, bytes},   {args.last, elements, bytes},
                         {args.before, elements, bytes}, {args.scale, args.C, 4},
                         {args.before_scale, args.C, 4}, {args.shift, args.C, 4}};
  if (!aligned(args.y, bytes)) return BC_ERROR_ALIGNMENT;
  int position = 0;
  for (const Span &input : inputs) {
    if (!aligned(input.start, input.element_bytes)) return BC_ERROR_ALIGNMENT;
    if (clash(y, input, position < kTensors)) return BC_ERROR_OVERLAP;
    ++position;
  }
  return BC_OK;
}

#ifndef __CUDACC__
// ------------------------------------------------------------------------------------------------
// Reference: runs of one channel in NCHW, runs of all channels in NHWC.

template <class T, int V>
BC_INLINE int64_t run_on_host(const Args &args, int64_t run, int64_t i) {
  const bool nchw = args.layout == BC_NCHW;
  const int64_t length = nchw ? args.L : args.C;
  if (i + V > length) return i;
  Coefficients<V> k = {};
  if (nchw) k = coefficients<V>(args, Channels::kOne, run % args.C, 0, length);
  for (; i + V <= length; i += V) {
    if (!nchw) k = coefficients<V>(args, Channels::kInRow, i, 0, length);
    update<T, V>(args, k, run * length + i);
  }
  return i;
}

template <class T>
BC_CLONES static void residual_on_host(const Args &args) {
  const int64_t runs = args.N * (args.layout == BC_NCHW ? args.C : args.L);
  for (int64_t run = 0; run < runs; ++run) {
    int64_t i = run_on_host<T, 128>(args, run, 0);
    i = run_on_host<T, 16>(args, run, i);
    run_on_host<T, 1>(args, run, i);
  }
}

#else
// ------------------------------------------------------------------------------------------------
// Kernel: 16 bytes of T a thread and turn; the first threads then take what fills no pack.

struct Plan {
  int64_t elements;
  int64_t inner;  // elements in a run of one channel
  Channels channels;
};

template <class T, int V>
__device__ __forceinline__ void update_at(const Args &args, const Plan &plan, int64_t at) {
  int64_t within, channel;
  if (plan.elements <= INT32_MAX) {  // 64-bit division would cost more than the memory does
    const auto inner = static_cast<uint32_t>(plan.inner);
    const auto position = static_cast<uint32_t>(at);
    within = position % inner;
    channel = position / inner % static_cast<uint32_t>(args.C);
  } else {
    within = at % plan.inner;
    channel = at / plan.inner % args.C;
  }
  const Channels channels = V == 1 ? Channels::kOne : plan.channels;
  update<T, V>(args, coefficients<V>(args, channels, channel, within, plan.inner), at);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) residual_kernel(const Args args, const Plan plan) {
  const int64_t thread = int64_t{kThreads} * blockIdx.x + threadIdx.x;
  const int64_t packed = plan.elements / V * V;
  const int64_t stride = int64_t{V} * kThreads * gridDim.x;
  for (int64_t at = V * thread; at < packed; at += stride) update_at<T, V>(args, plan, at);
  if (V > 1 && packed + thread < plan.elements) update_at<T, 1>(args, plan, packed + thread);
}

// ------------------------------------------------------------------------------------------------
// Launcher.

template <class T, int V>
int32_t launch_residual(const Args &args, void *stream) {
  Plan plan;
  plan.elements = args.N * args.C * args.L;
  plan.inner = args.layout == BC_NCHW ? args.L : 1;
  const bool wide_rows = args.C % V == 0 && aligned(args.scale, 16) && aligned(args.shift, 16) &&
                         aligned(args.before_scale, 16);
  plan.channels = plan.inner % V == 0                ? Channels::kOne
                  : plan.inner == 1 && wide_rows ? Channels::kInRow
                                                 : Channels::kCounted;
  const int64_t per_block = int64_t{V} * kThreads;
  const int64_t blocks = (plan.elements + per_block - 1) / per_block;
  const dim3 grid(static_cast<unsigned>(blocks < INT32_MAX ? blocks : INT32_MAX));
  return launch(residual_kernel<T, V>, grid, kThreads, stream, args, plan);
}
#endif

}  // namespace residual
}  // namespace blockcache

#ifndef __CUDACC__
int32_t bc_host_scale_shift_residual(const bc_scale_shift_residual_args *args) {
  using namespace blockcache;
  const int32_t refused = residual::check(args);
  if (refused != BC_OK) return refused;
  return dispatch_dtype(args->dtype, [&](auto type) {
    residual::residual_on_host<decltype(type)>(*args);
    return BC_OK;
  });
}
#else
int32_t bc_cuda_scale_shift_residual(const bc_scale_shift_residual_args *args, void *stream) {
  using namespace blockcache;
  const int32_t refused = residual::check(args);
  if (refused != BC_OK) return refused;
  return dispatch_dtype(args->dtype, [&](auto type) {
    using T = decltype(type);
    const bool wide = aligned(args->y, 16) && aligned(args->x, 16) && aligned(args->last, 16) &&
                      aligned(args->before, 16);
    return wide ? residual::launch_residual<T, static_cast<int>(16 / sizeof(T))>(*args, stream)
                : residual::launch_residual<T, 1>(*args, stream);
  });
}
#endif
