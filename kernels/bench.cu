// bc_bench: every CUDA kernel's bandwidth against a device-to-device copy of as many bytes.
//
//   cmake -S . -B build/cmake && cmake --build build/cmake --target bc_bench
//   build/cmake/bc_bench [results.json]
//
// Each run starts with a cold second-level cache; a figure is the median of kRuns. Bytes are those
// each kernel's header counts. Times of a few microseconds are the launch's, not the memory's.
// Correctness is tests/kernels/test_cuda_kernels.py's business: run that first.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "blockcache_kernels.h"

namespace {

constexpr int kRuns = 50;
constexpr int kWarmups = 5;

struct Failure {
  const char *what;
  int32_t code;
};

void require(int32_t code, const char *what) {
  if (code != BC_OK) throw Failure{what, code};
}

// Device memory, filled with one byte so that every number read is finite.
class Buffer {
 public:
  explicit Buffer(size_t bytes) {
    require(cudaMalloc(&address_, bytes), "cudaMalloc");
    require(cudaMemset(address_, 0x3c, bytes), "cudaMemset");
  }
  ~Buffer() { cudaFree(address_); }
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;

  template <class T = void>
  T *at(size_t byte = 0) const {
    return reinterpret_cast<T *>(static_cast<char *>(address_) + byte);
  }

 private:
  void *address_ = nullptr;
};

class Timer {
 public:
  Timer() : flush_bytes_(l2_bytes() * 4), flush_(flush_bytes_) {
    require(cudaStreamCreate(&stream), "cudaStreamCreate");
    require(cudaEventCreate(&start_), "cudaEventCreate");
    require(cudaEventCreate(&stop_), "cudaEventCreate");
  }
  ~Timer() {
    cudaEventDestroy(start_);
    cudaEventDestroy(stop_);
    cudaStreamDestroy(stream);
  }
  Timer(const Timer &) = delete;
  Timer &operator=(const Timer &) = delete;

  // Median microseconds of `work`, which enqueues on `stream` and returns a code.
  double median_us(const std::function<int32_t()> &work) const {
    std::vector<float> times;
    for (int run = -kWarmups; run < kRuns; ++run) {
      require(cudaMemsetAsync(flush_.at(), run & 1, flush_bytes_, stream), "flush");
      require(cudaEventRecord(start_, stream), "cudaEventRecord");
      require(work(), "kernel");
      require(cudaEventRecord(stop_, stream), "cudaEventRecord");
      require(cudaEventSynchronize(stop_), "cudaEventSynchronize");
      float ms = 0;
      require(cudaEventElapsedTime(&ms, start_, stop_), "cudaEventElapsedTime");
      if (run >= 0) times.push_back(ms * 1000);
    }
    std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
    return times[kRuns / 2];
  }

  cudaStream_t stream = nullptr;

 private:
  static size_t l2_bytes() {
    int bytes = 0;
    require(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, 0), "L2 size");
    return static_cast<size_t>(bytes);
  }

  size_t flush_bytes_;
  Buffer flush_;
  cudaEvent_t start_ = nullptr, stop_ = nullptr;
};

struct Result {
  std::string kernel;
  int64_t elements;
  double bytes, us, copy_us;
};

// One size: all kernels in bfloat16 on N samples of M elements, [N, C, L] where channels matter.
void measure(const Timer &timer, int64_t N, int64_t C, int64_t L, std::vector<Result> &results) {
  const int64_t M = C * L, elements = N * M;
  const auto count = static_cast<size_t>(elements);
  const Buffer f0(4 * count), f1(4 * count), f2(4 * count), f3(4 * count);
  const Buffer h0(4 * count), h1(4 * count);  // bfloat16, both halves of the guidance
  const Buffer small(1 << 20);
  const Buffer workspace(bc_cuda_relative_change_workspace_bytes(N, M));
  float *rows = small.at<float>();

  const auto add = [&](const char *kernel, double bytes, const std::function<int32_t()> &work) {
    const auto half = static_cast<size_t>(bytes / 2);
    const Buffer from(half), to(half);
    const double copy_us = timer.median_us([&] {
      return static_cast<int32_t>(cudaMemcpyAsync(to.at(), from.at(), half,
                                                  cudaMemcpyDeviceToDevice, timer.stream));
    });
    results.push_back({kernel, elements, bytes, timer.median_us(work), copy_us});
  };
  const double n = static_cast<double>(elements);

  bc_guided_solver_step_args step = {};
  step.next_sample = f0.at<float>();
  step.history_out = f1.at<float>();
  step.next_input = h0.at();
  step.sample = f2.at<float>();
  step.model_out = h1.at();
  step.history0 = f3.at<float>();
  step.table = rows;
  step.guidance = rows + 64;
  step.N = N;
  step.M = M;
  step.S = 1;
  step.dtype = BC_BFLOAT16;
  const float row[BC_ROW] = {0.9f, 0.1f, 0.2f, 0, 0.5f, 0.5f, 1, 0};
  require(cudaMemcpy(rows, row, sizeof row, cudaMemcpyHostToDevice), "cudaMemcpy");
  add("guided_solver_step", 24 * n,
      [&] { return bc_cuda_guided_solver_step(&step, 0, timer.stream); });

  add("guidance_rescale_factors", 4 * n, [&] {
    return bc_cuda_guidance_rescale_factors(rows + 128, h1.at(), rows + 64, rows + 96, N, M,
                                            BC_BFLOAT16, timer.stream);
  });

  add("relative_change", 4 * n, [&] {
    return bc_cuda_relative_change(rows + 128, rows + 192, h0.at(), h1.at(), N, N, M, BC_BFLOAT16,
                                   workspace.at(),
                                   bc_cuda_relative_change_workspace_bytes(N, M), timer.stream);
  });

  bc_scale_shift_residual_args residual = {};
  residual.y = f0.at();
  residual.x = f1.at();
  residual.last = f2.at();
  residual.scale = rows + 1024;
  residual.before_scale = rows + 8192;
  residual.shift = rows + 16384;
  residual.N = N;
  residual.C = C;
  residual.L = L;
  residual.dtype = BC_BFLOAT16;
  const auto run_residual = [&] { return bc_cuda_scale_shift_residual(&residual, timer.stream); };
  add("scale_shift_residual nchw", 6 * n, run_residual);
  residual.layout = BC_NHWC;
  add("scale_shift_residual nhwc", 6 * n, run_residual);
  residual.before = f3.at();
  add("scale_shift_residual nhwc, before", 8 * n, run_residual);
}

double gb_per_s(double bytes, double us) { return bytes / us / 1000; }

void print(const cudaDeviceProp &device, const std::vector<Result> &results) {
  std::printf("%s, compute capability %d.%d, bfloat16, cold L2, median of %d\n", device.name,
              device.major, device.minor, kRuns);
  std::printf("%-34s %12s %10s %10s %10s %8s\n", "kernel", "elements", "us", "GB/s", "copy GB/s",
              "of copy");
  for (const Result &r : results) {
    std::printf("%-34s %12lld %10.2f %10.1f %10.1f %7.1f%%\n", r.kernel.c_str(),
                static_cast<long long>(r.elements), r.us, gb_per_s(r.bytes, r.us),
                gb_per_s(r.bytes, r.copy_us), 100 * r.copy_us / r.us);
  }
}

void write_json(std::FILE *file, const cudaDeviceProp &device,
                const std::vector<Result> &results) {
  std::fprintf(file, "{\"device\": \"%s\", \"runs\": %d, \"results\": [", device.name, kRuns);
  const char *separator = "\n";
  for (const Result &r : results) {
    std::fprintf(file,
                 "%s  {\"kernel\": \"%s\", \"elements\": %lld, \"bytes\": %.0f, \"us\": %.3f, "
                 "\"copy_us\": %.3f}",
                 separator, r.kernel.c_str(), static_cast<long long>(r.elements), r.bytes, r.us,
                 r.copy_us);
    separator = ",\n";
  }
  std::fprintf(file, "\n]}\n");
}

}  // namespace

int main(int argc, char **argv) {
  try {
    cudaDeviceProp device;
    require(cudaGetDeviceProperties(&device, 0), "looking for a CUDA device");
    const Timer timer;
    std::vector<Result> results;
    measure(timer, 2, 4, 64 * 64, results);       // Stable Diffusion's latents
    measure(timer, 8, 4, 128 * 128, results);     // SDXL's, a batch of eight
    measure(timer, 2, 320, 64 * 64, results);     // a block's output at 512 pixels
    measure(timer, 16, 640, 64 * 64, results);    // SDXL's, a batch of eight with guidance
    measure(timer, 32, 1280, 64 * 64, results);   // where only bandwidth counts
    print(device, results);
    std::FILE *file = argc > 1 ? std::fopen(argv[1], "w") : stdout;
    if (file == nullptr) throw Failure{"opening the results file", BC_ERROR_NULL};
    write_json(file, device, results);
    if (file != stdout) std::fclose(file);
    return 0;
  } catch (const Failure &failure) {
    std::fprintf(stderr, "bc_bench: %s: %s (code %d)\n", failure.what,
                 bc_error_string(failure.code), failure.code);
    return 1;
  }
}
