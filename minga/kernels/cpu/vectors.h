// Vectors of float32 and 32-bit integers as wide as the machine has them, and a few functions on them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace minga {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));

template <class V>
static inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
static inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
static inline vf splat(float x) { return vf{} + x; }

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// exp for vectors: 2^n times a polynomial on [-ln2/2, ln2/2]; relative error below 3e-7, 0 below -87.
static inline vf exp_v(vf x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  vf n = x * 1.44269504f + 12582912.0f;
  vi exponent = ((vi)n - 0x4b400000 + 127) << 23;
  n -= 12582912.0f;
  vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (vf)exponent;
}
static inline float exp_s(float x) { return exp_v(splat(x))[0]; }

// -log(1 - x) for 0 <= x <= 1, with small relative error also where x is small; infinity for 1. By the logarithm of
// Cephes: 2 atanh of the mantissa's distance from 1 would do, a polynomial is shorter.
static inline vf minus_log1m(vf x) {
  vf y = 1.0f - x, lost = (1.0f - y) - x;  // 1 - x as it is rounded, and by how much it is wrong
  vi bits = (vi)y;
  vi exponent = ((bits - 0x3f3504f3) >> 23);
  vf m = (vf)(bits - (exponent << 23)) - 1.0f;  // in [sqrt(1/2) - 1, sqrt(2) - 1]
  vf p = splat(7.0376836292e-2f);
  for (float c : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f, 2.0000714765e-1f,
                  -2.4999993993e-1f, 3.3333331174e-1f})
    p = p * m + c;
  vf e = __builtin_convertvector(exponent, vf);
  vf log = m - 0.5f * m * m + m * m * m * p + e * 0.693147181f;
  vf result = -log - lost / y;
  return y > 0.0f ? result : splat(INFINITY);
}

static inline float sum_v(vf x) {
  float total = 0;
  for (int l = 0; l < VL; l++) total += x[l];
  return total;
}

// a[i] = silu(gate) * up; gate and up lie behind each other in a row of 2F.
static inline void swiglu_row(const float* gate_up, int64_t F, float factor, float* a) {
  int64_t i = 0;
  for (; i + VL <= F; i += VL) {
    vf g = load<vf>(gate_up + i), u = load<vf>(gate_up + F + i);
    store(a + i, g / (1.0f + exp_v(-g)) * u * factor);
  }
  for (; i < F; i++) a[i] = gate_up[i] / (1.0f + exp_s(-gate_up[i])) * gate_up[F + i] * factor;
}

// Row r of a head after rotation: pairs (2p, 2p + 1), or (p, p + P), become [first of each pair | second of each pair].
static inline void rotate_row(const float* x, const float* cos, const float* sin, int64_t P, bool halves, float scale, float* to) {
  int64_t step = halves ? 1 : 2, second = halves ? P : 1;
  for (int64_t p = 0; p < P; p++) {
    float a = x[p * step], b = x[p * step + second];
    to[p] = (a * cos[p] - b * sin[p]) * scale;
    to[P + p] = (b * cos[p] + a * sin[p]) * scale;
  }
}

}  // namespace minga
