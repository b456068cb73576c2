// Standard normal numbers from a counter: Philox 4x32-10 (Salmon et al. 2011), then Box and Muller.
// defines: standard_normal
//
// Nothing is drawn: element i of sample n at step s is a function of the sample's seed, s and i. So an
// image gets the same noise alone and in a batch, and a captured CUDA graph needs no state.
// Logarithm, sine and cosine are polynomials in plain operations, which round alike everywhere: the
// host, the device and numpy (runtime/solvers/philox.py) give the same bits.
#pragma once

#include <cmath>

#include "common.cuh"

namespace blockcache {

struct Philox {
  uint32_t words[4];
};

// Ten rounds on the counter (block, step) under the key `seed`.
BC_INLINE Philox philox(uint64_t seed, uint32_t step, uint64_t block) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = step, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// log(u) of u in [2^-33, 1], within 2e-7 of it: u = 2^e m, log m = 2 atanh((m-1)/(m+1)).
BC_INLINE float log_of(float u) {
  const uint32_t bits = bits_of(u);
  const float half = float_of((bits & 0x007fffffu) | 0x3f000000u);  // in [0.5, 1)
  const bool low = half < 0.70710678f;
  const float m = low ? 2.0f * half : half;
  const float e = static_cast<float>(static_cast<int32_t>(bits >> 23) - (low ? 127 : 126));
  const float s = (m - 1.0f) / (m + 1.0f), q = s * s;
  const float series =
      s * (2.0f + q * (0.66666667f + q * (0.4f + q * (0.28571429f + q * 0.22222222f))));
  return e * 0.69314718f + series;
}

// Two normal numbers: radius from one word, angle from the other. The angle's upper two bits are a
// quadrant, the others an angle within 45 degrees to either side of its middle.
BC_INLINE void box_muller(float &first, float &second, uint32_t length, uint32_t angle) {
  const float u = static_cast<float>(length) * 0x1p-32f + 0x1p-33f;
  const float radius = sqrtf(-2.0f * log_of(u));
  const float turn = static_cast<float>(angle & 0x3fffffffu) * 0x1p-30f - 0.5f;
  const float t = turn * 1.57079633f, q = t * t;
  const float sine =
      t * (1.0f + q * (-0.16666667f + q * (8.3333333e-3f + q * (-1.9841270e-4f + q * 2.7557319e-6f))));
  const float cosine =
      1.0f + q * (-0.5f + q * (4.1666667e-2f + q * (-1.3888889e-3f + q * (2.4801587e-5f + q * -2.7557319e-7f))));
  const bool swaps = ((angle >> 30) & 1u) != 0, turns = (angle >> 31) != 0;
  const float x = swaps ? -sine : cosine, y = swaps ? cosine : sine;
  first = radius * (turns ? -x : x);
  second = radius * (turns ? -y : y);
}

// Elements i to i + V of a sample; V is 1, or a multiple of 4 as i then is.
template <int V>
BC_INLINE void standard_normal(float (&z)[V], uint64_t seed, int32_t step, int64_t i) {
  static_assert(V == 1 || V % 4 == 0, "a block of the counter makes four numbers");
  const uint64_t block = static_cast<uint64_t>(i) / 4;
  const uint32_t s = static_cast<uint32_t>(step);
  for (int j = 0; j < V; j += 4) {
    const Philox drawn = philox(seed, s, block + static_cast<uint64_t>(j / 4));
    float four[4];
    box_muller(four[0], four[1], drawn.words[0], drawn.words[1]);
    box_muller(four[2], four[3], drawn.words[2], drawn.words[3]);
    if (V == 1) {
      z[0] = four[i % 4];
    } else {
      for (int lane = 0; lane < 4 && j + lane < V; ++lane) z[j + lane] = four[lane];
    }
  }
}

}  // namespace blockcache
