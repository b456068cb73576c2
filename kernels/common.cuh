// What every kernel file shares, for the host compiler and nvcc alike.
// defines: BC_INLINE, BC_CLONES, f16, bf16, to_float, from_float, load, store, tree_sum,
//          dispatch_dtype, Span, clash, aligned, and under nvcc: launch, warp_sum, block_sum
#pragma once

#include <cstdint>
#include <cstring>

#include "blockcache_kernels.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
// Forced, so that a template's body meets the vector width it was instantiated for.
#define BC_INLINE __host__ __device__ __forceinline__
#else
#define BC_INLINE inline __attribute__((always_inline))
#endif

// The host loops exist once per instruction set; the loader takes the widest that the machine has.
// Without contraction (CMakeLists.txt) all give the same bits.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(BLOCKCACHE_BASELINE)
#define BC_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define BC_CLONES
#endif

namespace blockcache {

// ------------------------------------------------------------------------------------------------
// Element types. Storage only: arithmetic is float32 everywhere. Conversions are written out so
// that the host needs no CUDA header, and without branches so that its compiler vectorises them.

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

BC_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

BC_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

BC_INLINE float quiet_nan() { return float_of(0x7fffffffu); }

BC_INLINE float to_float(float value) { return value; }

BC_INLINE float to_float(bf16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

BC_INLINE float to_float(f16 value) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const uint32_t normal = magnitude + (112u << 23);  // from exponent bias 15 to 127
  const uint32_t infinite = magnitude + (224u << 23);
  // 2^-14 with the subnormal's bits as mantissa, less 2^-14: exact, and never a float32 subnormal.
  const uint32_t subnormal = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
  const uint32_t finite = exponent == 0 ? subnormal : normal;
  return float_of(sign | (exponent == 0x0f800000u ? infinite : finite));
#endif
}

template <class T>
BC_INLINE T from_float(float value);

template <>
BC_INLINE float from_float<float>(float value) {
  return value;
}

// Both 16-bit types round to nearest even; NaN becomes 0x7fff as the device's instruction has it.
template <>
BC_INLINE bf16 from_float<bf16>(float value) {
  bf16 narrow;
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
#else
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  narrow.bits = static_cast<uint16_t>(is_nan ? 0x7fffu : rounded);
#endif
  return narrow;
}

template <>
BC_INLINE f16 from_float<f16>(float value) {
  f16 narrow;
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
#else
  const uint32_t magnitude = bits_of(value) & 0x7fffffffu;
  const uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
  // The carry of the rounding runs into the exponent, up to infinity at 65520 and above.
  const uint32_t normal =
      (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // 0.5 has the float32 unit 2^-24, which is the float16 subnormals' unit: the addition rounds.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t infinite = sign | 0x7c00u;
  const uint32_t bounded = magnitude >= (143u << 23) ? infinite : (sign | finite);
  narrow.bits = static_cast<uint16_t>(magnitude > 0x7f800000u ? 0x7fffu : bounded);
#endif
  return narrow;
}

// Calls `body` with a value of the type that `dtype` names; returns BC_ERROR_DTYPE for no type.
template <class Body>
int32_t dispatch_dtype(int32_t dtype, Body body) {
  switch (dtype) {
    case BC_FLOAT32: return body(float{});
    case BC_FLOAT16: return body(f16{});
    case BC_BFLOAT16: return body(bf16{});
    default: return BC_ERROR_DTYPE;
  }
}

inline int64_t dtype_bytes(int32_t dtype) { return dtype == BC_FLOAT32 ? 4 : 2; }

// ------------------------------------------------------------------------------------------------
// V consecutive elements at once. On the device in accesses of up to 16 bytes, to which (or to all
// V elements, if that is less) the pointer is aligned; on the host a loop for the compiler to
// vectorise, of any V and with the alignment of one element.

#ifdef __CUDACC__
// A word of the width of one access.
template <int Bytes>
struct Word;
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <class T, int V>
constexpr int kPerAccess = V * sizeof(T) > 16 ? static_cast<int>(16 / sizeof(T)) : V;

template <class T, int V>
using WordOf = typename Word<kPerAccess<T, V> * sizeof(T)>::type;
#endif

template <int V, class T>
BC_INLINE void load(float (&to)[V], const T *from) {
#ifdef __CUDA_ARCH__
  constexpr int kPack = kPerAccess<T, V>;
  for (int j = 0; j < V; j += kPack) {
    const auto word = *reinterpret_cast<const WordOf<T, V> *>(from + j);
    T elements[kPack];
    memcpy(elements, &word, sizeof elements);
    for (int p = 0; p < kPack; ++p) to[j + p] = to_float(elements[p]);
  }
#else
  for (int j = 0; j < V; ++j) to[j] = to_float(from[j]);
#endif
}

template <int V, class T>
BC_INLINE void store(T *to, const float (&from)[V]) {
#ifdef __CUDA_ARCH__
  constexpr int kPack = kPerAccess<T, V>;
  for (int j = 0; j < V; j += kPack) {
    T elements[kPack];
    for (int p = 0; p < kPack; ++p) elements[p] = from_float<T>(from[j + p]);
    WordOf<T, V> word;
    memcpy(&word, elements, sizeof word);
    __stwb(reinterpret_cast<WordOf<T, V> *>(to + j), word);  // a plain `=` may be split
  }
#else
  for (int j = 0; j < V; ++j) to[j] = from_float<T>(from[j]);
#endif
}

// The sum of V numbers as a tree, which rounds log2(V) times; V is a power of two.
template <int V, class Number>
BC_INLINE Number tree_sum(Number (&terms)[V]) {
  for (int width = V / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) terms[j] = terms[j] + terms[j + width];
  }
  return terms[0];
}

// ------------------------------------------------------------------------------------------------
// Argument checks.

// More elements than any device holds; below it no byte count overflows 64 bits.
constexpr int64_t kMaxElements = int64_t{1} << 48;

inline bool bad_sizes(int64_t N, int64_t M) { return N < 1 || M < 1 || N > kMaxElements / M; }

inline bool aligned(const void *pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

struct Span {
  const void *start;  // NULL: absent
  int64_t elements;
  int64_t element_bytes;
};

// True where writing `out` would disturb `other`: the two share memory. `in_place` allows the very
// same elements, for inputs of which each element is read before it is written.
inline bool clash(const Span &out, const Span &other, bool in_place) {
  if (out.start == nullptr || other.start == nullptr) return false;
  const bool same = out.start == other.start && out.element_bytes == other.element_bytes;
  if (in_place && same) return false;
  const auto a = reinterpret_cast<uintptr_t>(out.start);
  const auto b = reinterpret_cast<uintptr_t>(other.start);
  const auto a_bytes = static_cast<uintptr_t>(out.elements * out.element_bytes);
  const auto b_bytes = static_cast<uintptr_t>(other.elements * other.element_bytes);
  return a < b + b_bytes && b < a + a_bytes;
}

#ifdef __CUDACC__
// ------------------------------------------------------------------------------------------------
// Device pieces.

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// Enqueues a kernel and returns its own status, untouched by errors of earlier launches.
template <class... Parameters, class... Arguments>
int32_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, void *stream,
               const Arguments &...arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  return static_cast<int32_t>(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// The sum over a warp in a fixed order, valid in lane 0.
template <class Number>
__device__ __forceinline__ Number warp_sum(Number value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  return value;
}

// The sum over a block of `Threads` in a fixed order, valid in every thread.
template <int Threads>
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double parts[Threads / kWarp];
  __shared__ double total;
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    value = warp_sum(threadIdx.x < Threads / kWarp ? parts[threadIdx.x] : 0.0);
    if (threadIdx.x == 0) total = value;
  }
  __syncthreads();
  value = total;
  __syncthreads();  // the shared memory may now serve the next sum
  return value;
}
#endif

}  // namespace blockcache
