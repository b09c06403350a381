// Products of stored weights with a few rows of activations: what decoding spends its time on.
//
// Weights in few bits lie in panels of 16 rows, columns running slowest, so that one instruction multiplies four columns
// of all 16 rows (docs/formats.md has the bytes). Activations are rounded to int8 as the weights' kind asks. Sums inside
// a block are whole numbers; across blocks they are float32, one after the other. So a row's result is the same to the bit
// whether one token is computed or many, and on whatever number of threads.

#pragma once

#include "vectors.h"

namespace minga {

constexpr int PANEL = 16;        // rows
constexpr int MAX_TOKENS = 6;    // of one call of a kernel
constexpr int FLOAT_ROWS = 4;    // of weights in one call of the float kernel
constexpr int64_t AHEAD = 8192;  // bytes: what is asked of memory before it is needed

// In the order of `KINDS` (minga/kernels/cpu/net.py).
enum Kind : int64_t { NONE, FLOAT32, BFLOAT16, FLOAT16, INT8, INT4, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K, KINDS };

// What activations are rounded to: blocks as wide as the weights' with a float32 scale, or as llama.cpp does for the kind,
// blocks of 32 with a float16 scale (its Q8_0 and Q8_1), or of 256 with a float32 one (Q8_K).
enum Rounding { AS_BLOCKS, IN_32, IN_256, ROUNDINGS };
constexpr int64_t SUPER = 256;

// How a kind's numbers are stored: scale * (code - zero), or scale * code + minimum.
struct Layout {
  int low = 8, high = 0;  // bits of a code: in its first plane, and in the second. 8 bits have a sign
  int zero = 0;
  int block = 0;          // columns that share a scale; 0: the matrix says
  bool minimum = false;   // beside the scale
  bool nested = false;    // scales and minima of blocks are whole numbers, times float16 factors of SUPER columns
  int factors() const { return nested ? 1 + minimum + SUPER / block / (minimum ? 1 : 2) : 1 + minimum; }  // of a block, or of SUPER
};

constexpr Layout layout(int64_t kind) {
  switch (kind) {
    case INT4: case Q4_0: return {4, 0, 8};
    case Q4_1: return {4, 0, 0, 32, true};
    case Q5_0: return {4, 1, 16, 32};
    case Q5_1: return {4, 1, 0, 32, true};
    case Q4_K: return {4, 0, 0, 32, true, true};
    case Q5_K: return {4, 1, 0, 32, true, true};
    case Q6_K: return {4, 2, 32, 16, false, true};
    default: return {};
  }
}

// `count` matrices of (rows, cols) behind each other; `block` columns share a scale. Mirrored in net.py.
struct Matrix {
  int64_t kind, block, rows, cols, count;
  const uint8_t* data;
  const uint16_t* scale;  // (count, panels, factors, 16): float16, or two bytes that belong to two blocks or to one
  const float* bias;      // (rows) or null

  int64_t panels() const { return ceil_div(rows, PANEL); }
  int64_t padded() const { return ceil_div(cols, 8) * 8; }  // columns of a panel, the last of them zeros
  bool is_float() const { return kind < INT8; }
  bool is_rounded() const { return kind >= INT8; }  // and so is what it is multiplied with
  Rounding rounding() const { return kind < Q8_0 ? AS_BLOCKS : kind < Q4_K ? IN_32 : IN_256; }
  int64_t panel_bytes() const { return PANEL * padded() * (layout(kind).low + layout(kind).high) / 8; }
  int64_t panel_factors() const { return ceil_div(cols, layout(kind).nested ? SUPER : block) * layout(kind).factors() * PANEL; }
  int64_t row_bytes() const { return cols * (kind == FLOAT32 ? 4 : 2); }
  int64_t bytes() const { return is_float() ? rows * row_bytes() : panels() * panel_bytes(); }  // of one of `count`
};

static inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float)mantissa * 5.9604645e-8f;
  uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}
// To the nearest, ties to even, as the instructions round.
static inline uint16_t float_to_half(float f) {
#if defined(__F16C__)
  return (uint16_t)_cvtss_sh(f, 0);
#else
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size >= 0x47800000) return (uint16_t)(sign | (size > 0x7f800000 ? 0x7e00 : 0x7c00));
  if (size < 0x38800000) {  // below the normal numbers of float16: whole multiples of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &size, 4);
    return (uint16_t)(sign | (uint32_t)std::lrintf(magnitude * 16777216.0f));
  }
  size += 0xfff + (size >> 13 & 1);
  return (uint16_t)(sign | ((size - 0x38000000) >> 13));
#endif
}

// ------------------------------------------------------------------------------------------------------ activations

// Rows in int8: q (padded with zeros), a scale for each block, and sums of q.
struct Rounded {
  int64_t block = 0;  // 0: nobody asks for it
  int64_t padded = 0, blocks = 0, sums = 0;
  int8_t* q = nullptr;
  float* scale = nullptr;
  int32_t* sum = nullptr;    // of each block; IN_256: of every 16 columns
  float* shift = nullptr;    // IN_32: scale times sum, what a minimum is multiplied with
};

// Rows of float32, and the same rounded as those ask that read them.
struct Rows {
  float* x = nullptr;
  int64_t width = 0;
  Rounded rounded[ROUNDINGS];

  const float* row(int64_t i) const { return x + i * width; }
  float* row(int64_t i) { return x + i * width; }
  void set_width(int64_t n) {
    width = n;
    for (int how = 0; how < ROUNDINGS; how++) {
      Rounded& to = rounded[how];
      if (!to.block) continue;
      to.padded = ceil_div(n, 8) * 8, to.blocks = ceil_div(n, to.block);
      to.sums = how == IN_256 ? ceil_div(n, 16) : to.blocks;
    }
  }
};

static inline float largest_magnitude(const float* x, int64_t n) {
  vf top = {};
  int64_t i = 0;
  for (; i + VL <= n; i += VL) {
    vf v = load<vf>(x + i), a = v < 0.0f ? -v : v;
    top = a > top ? a : top;
  }
  float result = 0;
  for (int l = 0; l < VL; l++) result = std::max(result, top[l]);
  for (; i < n; i++) result = std::max(result, std::fabs(x[i]));
  return result;
}

// q = x * inverse to the nearest, ties to even; returns their sum.
static inline int32_t round_to(const float* x, int64_t n, float inverse, int8_t* q) {
  int32_t sum = 0;
  int64_t k = 0;
#if defined(__AVX512F__)
  __m512i sums = _mm512_setzero_si512();
  for (; k + 16 <= n; k += 16) {
    __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), _mm512_set1_ps(inverse)));
    sums = _mm512_add_epi32(sums, v);
    _mm_storeu_si128((__m128i*)(q + k), _mm512_cvtepi32_epi8(v));
  }
  sum = _mm512_reduce_add_epi32(sums);
#endif
  for (; k < n; k++) sum += q[k] = (int8_t)std::lrintf(x[k] * inverse);
  return sum;
}

// Row i of `r`, for matrices of this rounding.
static inline void round_row(Rows& r, int64_t i, Rounding how) {
  const Rounded& to = r.rounded[how];
  const float* x = r.row(i);
  int8_t* q = to.q + i * to.padded;
  float* scale = to.scale + i * to.blocks;
  int32_t* sum = to.sum + i * to.sums;
  for (int64_t b = 0; b < to.blocks; b++) {
    int64_t from = b * to.block, n = std::min(r.width, from + to.block) - from;
    float top = largest_magnitude(x + from, n);
    if (how == IN_256) {
      // the number of largest magnitude becomes -127 whatever its sign
      if (std::find(x + from, x + from + n, top) == x + from + n) top = -top;
      float inverse = top != 0 ? -127.0f / top : 0.0f;
      for (int64_t k = 0; k < n; k += 16) sum[(from + k) / 16] = round_to(x + from + k, std::min<int64_t>(16, n - k), inverse, q + from + k);
      scale[b] = top != 0 ? 1.0f / inverse : 0.0f;
      continue;
    }
    sum[b] = round_to(x + from, n, top > 0 ? 127.0f / top : 0.0f, q + from);
    scale[b] = top / 127.0f;
    if (how == IN_32) {
      to.shift[i * to.blocks + b] = half_to_float(float_to_half(scale[b] * (float)sum[b]));
      scale[b] = half_to_float(float_to_half(scale[b]));
    }
  }
  std::memset(q + r.width, 0, (size_t)(to.padded - r.width));
}

// ------------------------------------------------------------------------------------------------------ few bits

// One number of a panel: its code without sign or zero, and the factors that stand for its block.
template <int64_t K>
static inline int code(const uint8_t* panel, int64_t k, int64_t lane) {
  constexpr Layout L = layout(K);
  if (L.low == 8) return (int8_t)panel[k / 4 * 64 + lane * 4 + k % 4];
  int64_t j = k;
  if (L.high) panel += k / L.block * L.block * PANEL * (L.low + L.high) / 8, j = k % L.block;
  int byte = panel[j / 8 * 64 + lane * 4 + j % 4], result = j % 8 < 4 ? byte & 15 : byte >> 4;
  if (L.high) result |= (panel[L.block * 8 + lane * 4 + j % 4] >> (j / 4 * L.high) & ((1 << L.high) - 1)) << 4;
  return result;
}

// Nested kinds: the whole numbers of block b, in the factors of its SUPER columns.
template <int64_t K>
static inline int inner_scale(const uint16_t* s, int64_t b, int64_t lane) {
  return layout(K).minimum ? s[(2 + b) * PANEL + lane] & 255 : (int8_t)(s[(1 + b / 2) * PANEL + lane] >> (b % 2 * 8));
}
static inline int inner_minimum(const uint16_t* s, int64_t b, int64_t lane) { return s[(2 + b) * PANEL + lane] >> 8; }

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
typedef uint16_t words_512 __attribute__((vector_size(64)));

template <int64_t K>
static inline __m512i inner_scales(const uint16_t* s, int64_t b) {
  if (layout(K).minimum) return _mm512_and_si512(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(s + (2 + b) * PANEL))), _mm512_set1_epi32(255));
  __m512i two = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)(s + (1 + b / 2) * PANEL)));
  return b % 2 ? _mm512_srai_epi32(two, 8) : _mm512_srai_epi32(_mm512_slli_epi32(two, 24), 24);
}
static inline __m512i inner_minima(const uint16_t* s, int64_t b) {
  return _mm512_srli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(s + (2 + b) * PANEL))), 8);
}
static inline __m512 halves(const uint16_t* s) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)s)); }
#elif defined(__AVX2__) && defined(__F16C__) && defined(__FMA__)
typedef uint16_t words_256 __attribute__((vector_size(32)));

template <int64_t K>
static inline __m256i inner_scales(const uint16_t* s, int64_t b) {
  if (layout(K).minimum) return _mm256_and_si256(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(s + (2 + b) * PANEL))), _mm256_set1_epi32(255));
  __m256i two = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)(s + (1 + b / 2) * PANEL)));
  return b % 2 ? _mm256_srai_epi32(two, 8) : _mm256_srai_epi32(_mm256_slli_epi32(two, 24), 24);
}
static inline __m256i inner_minima(const uint16_t* s, int64_t b) {
  return _mm256_srli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(s + (2 + b) * PANEL))), 8);
}
static inline __m256 halves(const uint16_t* s) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)s)); }
#endif

// out[t][p * 16 + r] = row r of panel p times token t, for NP panels and NT tokens. w, s: the first panel and its factors.
// CH: sums side by side in a block, whole numbers that are added at its end. One panel and several sums for few tokens, so
// that memory is read from front to back; two panels and one sum for many.
template <int NT, int NP, int CH, int64_t K>
static void panel_product(const Matrix& m, const uint8_t* w, const uint16_t* s, const Rows& r, const int32_t* token, float* const* out) {
  constexpr Layout L = layout(K);
  constexpr bool FOUR = L.low == 4;
  constexpr int INNER = L.nested ? SUPER / L.block : 1, SUMS = L.nested ? L.block / 16 : 1;  // blocks of SUPER; sums of a block
  const int64_t block = L.block ? L.block : m.block, padded = m.padded(), blocks = ceil_div(m.cols, block);
  const int64_t panel_bytes = m.panel_bytes(), panel_factors = m.panel_factors(), block_bytes = block * PANEL * (L.low + L.high) / 8;
  const Rounded& x = r.rounded[m.rounding()];
  const int8_t* q[NT];
  const float *scale[NT], *shift[NT];
  const int32_t* sum[NT];
  for (int t = 0; t < NT; t++) {
    q[t] = x.q + token[t] * x.padded;
    scale[t] = x.scale + token[t] * x.blocks;
    sum[t] = x.sum + token[t] * x.sums;
    shift[t] = x.shift + token[t] * x.blocks;
  }
  // of block b of panel p, or of the SUPER columns that it belongs to
  auto factors = [&](int64_t b, int64_t p) { return s + p * panel_factors + b / INNER * L.factors() * PANEL; };
  auto sum_of = [&](int t, int64_t b) { return SUMS == 2 ? sum[t][2 * b] + sum[t][2 * b + 1] : sum[t][b]; };
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
  constexpr int STEP = FOUR ? 8 : 4, CHAINS = L.block ? std::min(CH, L.block / STEP) : CH;
  __m512 acc[NT][NP];
  __m512i total[NT][NP];
  for (int t = 0; t < NT; t++)
    for (int p = 0; p < NP; p++) acc[t][p] = _mm512_setzero_ps(), total[t][p] = _mm512_setzero_si512();
  const __m512i low = _mm512_set1_epi8(15), flip = _mm512_set1_epi8((char)0x80), high = _mm512_set1_epi8(L.high == 2 ? 0x30 : 0x10);
  for (int64_t b = 0; b < blocks; b++) {
    __m512i c[NT][NP][CHAINS], top[NP];
    for (int t = 0; t < NT; t++)
      for (int p = 0; p < NP; p++) {  // the instruction takes weights without sign: those of 8 bits are w + 128
        constexpr int zero = FOUR ? L.zero : 128;
        c[t][p][0] = zero ? _mm512_set1_epi32(-zero * sum_of(t, b)) : _mm512_setzero_si512();
        for (int i = 1; i < CHAINS; i++) c[t][p][i] = _mm512_setzero_si512();
      }
    const uint8_t* from = w + b * block_bytes;
    if (L.high)
      for (int p = 0; p < NP; p++) top[p] = _mm512_loadu_si512(from + p * panel_bytes + block * 8);
    // the second plane's bits of words f of the block, at bit 4
    auto above = [&](int p, int f) __attribute__((always_inline)) {
      int up = 4 - f * L.high;
      words_512 v = (words_512)top[p];
      return _mm512_and_si512(up > 0 ? (__m512i)(v << (uint16_t)up) : (__m512i)(v >> (uint16_t)-up), high);
    };
    const int8_t* columns[NT];
    for (int t = 0; t < NT; t++) columns[t] = q[t] + b * block;
    auto step = [&](int k, int i) __attribute__((always_inline)) {
      __m512i v[NP], second[NP];
      for (int p = 0; p < NP; p++) {
        const uint8_t* at = from + p * panel_bytes + (FOUR ? k * 8 : k * 16);
        if (NP == 1) _mm_prefetch((const char*)at + AHEAD, _MM_HINT_T0);
        v[p] = _mm512_loadu_si512(at);
        if (FOUR) {
          second[p] = _mm512_and_si512(_mm512_srli_epi16(v[p], 4), low);
          v[p] = _mm512_and_si512(v[p], low);
          if (L.high) v[p] = _mm512_or_si512(v[p], above(p, k / 4)), second[p] = _mm512_or_si512(second[p], above(p, k / 4 + 1));
        } else {
          v[p] = _mm512_xor_si512(v[p], flip);
        }
      }
      for (int t = 0; t < NT; t++) {
        __m512i four = _mm512_set1_epi32(load<int32_t>(columns[t] + k));
        for (int p = 0; p < NP; p++) c[t][p][i] = _mm512_dpbusd_epi32(c[t][p][i], v[p], four);
        if (FOUR) {
          four = _mm512_set1_epi32(load<int32_t>(columns[t] + k + 4));
          for (int p = 0; p < NP; p++) c[t][p][i] = _mm512_dpbusd_epi32(c[t][p][i], second[p], four);
        }
      }
    };
    const int n = L.block ? L.block : (int)std::min(padded - b * block, block);
    int k = 0;
    for (; k + CHAINS * STEP <= n; k += CHAINS * STEP)
      for (int i = 0; i < CHAINS; i++) step(k + i * STEP, i);
    for (; k < n; k += STEP) step(k, 0);
    for (int p = 0; p < NP; p++) {
      const uint16_t* f = factors(b, p);
      for (int t = 0; t < NT; t++)
        for (int i = 1; i < CHAINS; i++) c[t][p][0] = _mm512_add_epi32(c[t][p][0], c[t][p][i]);
      if (!L.nested) {
        __m512 ws = halves(f);
        for (int t = 0; t < NT; t++) {
          acc[t][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(c[t][p][0]), _mm512_mul_ps(ws, _mm512_set1_ps(scale[t][b])), acc[t][p]);
          if (L.minimum) acc[t][p] = _mm512_fmadd_ps(halves(f + PANEL), _mm512_set1_ps(shift[t][b]), acc[t][p]);
        }
        continue;
      }
      __m512i ws = inner_scales<K>(f, b % INNER);
      for (int t = 0; t < NT; t++) total[t][p] = _mm512_add_epi32(total[t][p], _mm512_mullo_epi32(c[t][p][0], ws));
      if (b % INNER != INNER - 1) continue;
      for (int t = 0; t < NT; t++) {
        const __m512 xs = _mm512_set1_ps(scale[t][b / INNER]);
        acc[t][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total[t][p]), _mm512_mul_ps(halves(f), xs), acc[t][p]);
        total[t][p] = _mm512_setzero_si512();
        if (!L.minimum) continue;
        __m512i minima = _mm512_setzero_si512();
        for (int i = 0; i < INNER; i++)
          minima = _mm512_add_epi32(minima, _mm512_mullo_epi32(inner_minima(f, i), _mm512_set1_epi32(sum_of(t, b - INNER + 1 + i))));
        acc[t][p] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(minima), _mm512_mul_ps(halves(f + PANEL), xs), acc[t][p]);
      }
    }
  }
  for (int t = 0; t < NT; t++)
    for (int p = 0; p < NP; p++) _mm512_storeu_ps(out[t] + p * PANEL, acc[t][p]);
#elif defined(__AVX2__) && defined(__F16C__) && defined(__FMA__)
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), high = _mm256_set1_epi8(L.high == 2 ? 0x30 : 0x10);
  for (int p = 0; p < NP; p++) {
    __m256 acc[NT][2];
    __m256i total[NT][2];
    for (int t = 0; t < NT; t++)
      for (int half = 0; half < 2; half++) acc[t][half] = _mm256_setzero_ps(), total[t][half] = _mm256_setzero_si256();
    for (int64_t b = 0; b < blocks; b++) {
      __m256i c[NT][2], top[2];
      for (int t = 0; t < NT; t++) c[t][0] = c[t][1] = _mm256_set1_epi32(-L.zero * sum_of(t, b));
      const uint8_t* from = w + p * panel_bytes + b * block_bytes;
      if (L.high)
        for (int half = 0; half < 2; half++) top[half] = _mm256_loadu_si256((const __m256i*)(from + block * 8 + half * 32));
      auto above = [&](int half, int f) __attribute__((always_inline)) {
        int up = 4 - f * L.high;
        words_256 v = (words_256)top[half];
        return _mm256_and_si256(up > 0 ? (__m256i)(v << (uint16_t)up) : (__m256i)(v >> (uint16_t)-up), high);
      };
      const int n = L.block ? L.block : (int)std::min(padded - b * block, block);
      for (int k = 0; k < n; k += FOUR ? 8 : 4)
        for (int half = 0; half < 2; half++) {
          const uint8_t* at = from + (FOUR ? k * 8 : k * 16) + half * 32;
          __m256i v = _mm256_loadu_si256((const __m256i*)at), second = v;
          if (NP == 1 && half == 0) _mm_prefetch((const char*)at + AHEAD, _MM_HINT_T0);
          if (FOUR) {
            second = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
            v = _mm256_and_si256(v, low);
            if (L.high) v = _mm256_or_si256(v, above(half, k / 4)), second = _mm256_or_si256(second, above(half, k / 4 + 1));
          }
          for (int t = 0; t < NT; t++) {
            const int8_t* columns = q[t] + b * block + k;
            __m256i four = _mm256_set1_epi32(load<int32_t>(columns)), two;
            if (FOUR) {
              // each of the four products is at most 63 * 127, so their sum fits
              two = _mm256_add_epi16(_mm256_maddubs_epi16(v, four), _mm256_maddubs_epi16(second, _mm256_set1_epi32(load<int32_t>(columns + 4))));
            } else {
              two = _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(four, v));
            }
            c[t][half] = _mm256_add_epi32(c[t][half], _mm256_madd_epi16(two, ones));
          }
        }
      for (int half = 0; half < 2; half++) {
        const uint16_t* f = factors(b, p) + half * 8;
        if (!L.nested) {
          __m256 ws = halves(f);
          for (int t = 0; t < NT; t++) {
            acc[t][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(c[t][half]), _mm256_mul_ps(ws, _mm256_set1_ps(scale[t][b])), acc[t][half]);
            if (L.minimum) acc[t][half] = _mm256_fmadd_ps(halves(f + PANEL), _mm256_set1_ps(shift[t][b]), acc[t][half]);
          }
          continue;
        }
        __m256i ws = inner_scales<K>(f, b % INNER);
        for (int t = 0; t < NT; t++) total[t][half] = _mm256_add_epi32(total[t][half], _mm256_mullo_epi32(c[t][half], ws));
        if (b % INNER != INNER - 1) continue;
        for (int t = 0; t < NT; t++) {
          const __m256 xs = _mm256_set1_ps(scale[t][b / INNER]);
          acc[t][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[t][half]), _mm256_mul_ps(halves(f), xs), acc[t][half]);
          total[t][half] = _mm256_setzero_si256();
          if (!L.minimum) continue;
          __m256i minima = _mm256_setzero_si256();
          for (int i = 0; i < INNER; i++)
            minima = _mm256_add_epi32(minima, _mm256_mullo_epi32(inner_minima(f, i), _mm256_set1_epi32(sum_of(t, b - INNER + 1 + i))));
          acc[t][half] = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(minima), _mm256_mul_ps(halves(f + PANEL), xs), acc[t][half]);
        }
      }
    }
    for (int t = 0; t < NT; t++)
      for (int half = 0; half < 2; half++) _mm256_storeu_ps(out[t] + p * PANEL + half * 8, acc[t][half]);
  }
#else
  for (int p = 0; p < NP; p++)
    for (int t = 0; t < NT; t++)
      for (int lane = 0; lane < PANEL; lane++) {
        float acc = 0;
        int32_t total = 0, minima = 0;
        for (int64_t b = 0; b < blocks; b++) {
          const uint16_t* f = factors(b, p);
          int32_t c = 0;
          int64_t k0 = b * block, k1 = std::min(padded, k0 + block);
          for (int64_t k = k0; k < k1; k++) c += (code<K>(w + p * panel_bytes, k, lane) - L.zero) * q[t][k];
          if (!L.nested) {
            acc += (float)c * (half_to_float(f[lane]) * scale[t][b]);
            if (L.minimum) acc += half_to_float(f[PANEL + lane]) * shift[t][b];
            continue;
          }
          total += c * inner_scale<K>(f, b % INNER, lane);
          if (L.minimum) minima += inner_minimum(f, b % INNER, lane) * sum_of(t, b);
          if (b % INNER != INNER - 1) continue;
          float xs = scale[t][b / INNER];
          acc += (float)total * (half_to_float(f[lane]) * xs);
          if (L.minimum) acc -= (float)minima * (half_to_float(f[PANEL + lane]) * xs);
          total = minima = 0;
        }
        out[t][p * PANEL + lane] = acc;
      }
#endif
}

// Up to two panels, or one for few tokens; returns how many.
template <int64_t K>
static int panel_products(const Matrix& m, const uint8_t* w, const uint16_t* s, int64_t panels, const Rows& r, const int32_t* token, int nt,
                          float* const* out) {
#define MINGA_CALL(NT, NP, CH) return panel_product<NT, NP, CH, K>(m, w, s, r, token, out), NP
  if (nt == 1) MINGA_CALL(1, 1, 4);
  if (nt == 2) MINGA_CALL(2, 1, 4);
  if (nt == 3) MINGA_CALL(3, 1, 2);
  if (nt == 4 && panels == 1) MINGA_CALL(4, 1, 2);
  if (nt == 5 && panels == 1) MINGA_CALL(5, 1, 2);
  if (panels == 1) MINGA_CALL(6, 1, 2);
  if (nt == 4) MINGA_CALL(4, 2, 1);
  if (nt == 5) MINGA_CALL(5, 2, 1);
  MINGA_CALL(6, 2, 1);
#undef MINGA_CALL
}

// f(a constant that has the value of `kind`), the same for kinds that lie alike.
template <class F>
static auto with_kind(int64_t kind, F f) {
  switch (kind) {
    case Q4_1: return f(std::integral_constant<int64_t, Q4_1>());
    case Q5_0: return f(std::integral_constant<int64_t, Q5_0>());
    case Q5_1: return f(std::integral_constant<int64_t, Q5_1>());
    case Q4_K: return f(std::integral_constant<int64_t, Q4_K>());
    case Q5_K: return f(std::integral_constant<int64_t, Q5_K>());
    case Q6_K: return f(std::integral_constant<int64_t, Q6_K>());
    case INT4: case Q4_0: return f(std::integral_constant<int64_t, INT4>());
    default: return f(std::integral_constant<int64_t, INT8>());
  }
}

// ------------------------------------------------------------------------------------------------------ float weights

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

static inline float wide(float x) { return x; }
static inline float wide(Half x) { return half_to_float(x.bits); }
static inline float wide(BFloat16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
// VL numbers from p on.
static inline vf wide_v(const float* p) { return load<vf>(p); }
template <class T>
static inline vf wide_v(const T* p) {
#if defined(__AVX512F__)
  __m256i v = _mm256_loadu_si256((const __m256i*)p);
  if (std::is_same<T, Half>::value) return (vf)_mm512_cvtph_ps(v);
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16);
#elif defined(__AVX2__) && defined(__F16C__)
  __m128i v = _mm_loadu_si128((const __m128i*)p);
  if (std::is_same<T, Half>::value) return (vf)_mm256_cvtph_ps(v);
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16);
#else
  vf v;
  for (int l = 0; l < VL; l++) v[l] = wide(p[l]);
  return v;
#endif
}

// out[t][r] for NR4 rows of weights and NT tokens.
template <int NT, int NR4, class T>
static void float_product(const Matrix& m, const T* w, const Rows& r, const int32_t* token, float* const* out) {
  vf acc[NT][NR4];
  const T* row[NR4];
  for (int i = 0; i < NR4; i++) row[i] = w + i * m.cols;
  for (int t = 0; t < NT; t++)
    for (int i = 0; i < NR4; i++) acc[t][i] = vf{};
  auto add = [&](const T* const* from, int64_t step, auto x) {
    vf v[NR4];
    for (int i = 0; i < NR4; i++) v[i] = wide_v(from[i] + step);
    for (int t = 0; t < NT; t++) {
      vf xs = load<vf>(x(t));
      for (int i = 0; i < NR4; i++) acc[t][i] += xs * v[i];
    }
  };
  int64_t k = 0;
  for (; k + VL <= m.cols; k += VL) add(row, k, [&](int t) { return r.row(token[t]) + k; });
  if (size_t n = (size_t)(m.cols - k)) {  // filled up with zeros, so that compilers cannot add what is left in other ways
    T last[NR4][VL] = {};
    float x[NT][VL] = {};
    const T* from[NR4];
    for (int i = 0; i < NR4; i++) from[i] = (const T*)std::memcpy(last[i], row[i] + k, n * sizeof(T));
    for (int t = 0; t < NT; t++) std::memcpy(x[t], r.row(token[t]) + k, n * 4);
    add(from, 0, [&](int t) { return x[t]; });
  }
  for (int t = 0; t < NT; t++)
    for (int i = 0; i < NR4; i++) out[t][i] = sum_v(acc[t][i]);
}

template <class T>
static void float_products(const Matrix& m, const T* w, const Rows& r, const int32_t* token, int nt, int rows, float* const* out) {
  float* to[4];
  for (int t0 = 0; t0 < nt; t0 += 4) {
    int n = std::min(4, nt - t0);
    for (int i = 0; i < rows;) {
      bool four = rows - i >= FLOAT_ROWS;
      const T* at = w + i * m.cols;
      for (int t = 0; t < n; t++) to[t] = out[t0 + t] + i;
#define MINGA_CALL(NT) four ? float_product<NT, FLOAT_ROWS>(m, at, r, token + t0, to) : float_product<NT, 1>(m, at, r, token + t0, to)
      if (n == 1) MINGA_CALL(1);
      if (n == 2) MINGA_CALL(2);
      if (n == 3) MINGA_CALL(3);
      if (n == 4) MINGA_CALL(4);
#undef MINGA_CALL
      i += four ? FLOAT_ROWS : 1;
    }
  }
}

// f(the numbers at w, as what they are)
template <class F>
static void with_floats(const Matrix& m, const uint8_t* w, F f) {
  if (m.kind == FLOAT32) f((const float*)w);
  if (m.kind == BFLOAT16) f((const BFloat16*)w);
  if (m.kind == FLOAT16) f((const Half*)w);
}

// ------------------------------------------------------------------------------------------------------ either

// Units of 16 rows from `from` to `to` of matrix `number` times `nt` rows of activations; out[t] + the row's number.
static void product(const Matrix& m, int64_t number, int64_t from, int64_t to, const Rows& r, const int32_t* token, int64_t nt, float* const* out) {
  const uint8_t* w = m.data + number * m.bytes();
  const uint16_t* s = m.is_float() ? nullptr : m.scale + number * m.panels() * m.panel_factors();
  float* at[MAX_TOKENS];
  alignas(64) float room[MAX_TOKENS][2 * PANEL];
  // 8 bits wait for memory longer than 4, which have to be taken apart first: one panel after the other, read ahead, is faster
  // for up to so many tokens (16: at 4 tokens 2.4 times, at 12 a third)
  bool few = nt <= (m.kind == INT8 || m.kind == Q8_0 ? 16 : 3);
  for (int64_t u = from, np; u < to; u += np) {
    np = m.is_float() || few ? 1 : std::min<int64_t>(2, to - u);
    int64_t row = u * PANEL, rows = std::min<int64_t>(m.rows - row, np * PANEL);
    for (int64_t t0 = 0; t0 < nt; t0 += MAX_TOKENS) {
      int n = (int)std::min<int64_t>(MAX_TOKENS, nt - t0);
      bool direct = m.is_float() || rows == np * PANEL;
      for (int t = 0; t < n; t++) at[t] = direct ? out[t0 + t] + row : room[t];
      if (m.is_float()) {
        with_floats(m, w + row * m.row_bytes(), [&](auto* numbers) { float_products(m, numbers, r, token + t0, n, (int)rows, at); });
      } else {
        // the last tokens of many may be few, and then each panel comes alone
        for (int64_t p = 0; p < np;) {
          float* to_panel[MAX_TOKENS];
          for (int t = 0; t < n; t++) to_panel[t] = at[t] + p * PANEL;
          const uint8_t* wp = w + (u + p) * m.panel_bytes();
          const uint16_t* sp = s + (u + p) * m.panel_factors();
          p += with_kind(m.kind, [&](auto kind) { return panel_products<kind.value>(m, wp, sp, np - p, r, token + t0, n, to_panel); });
        }
      }
      for (int t = 0; t < n; t++) {
        float* to_row = out[t0 + t] + row;
        if (!direct) std::memcpy(to_row, room[t], (size_t)rows * 4);
        if (m.bias)
          for (int64_t i = 0; i < rows; i++) to_row[i] += m.bias[row + i];
      }
    }
  }
}

template <int64_t K>
static void read_panel(const Matrix& m, const uint8_t* w, const uint16_t* s, int64_t lane, float* to) {
  constexpr Layout L = layout(K);
  const int64_t block = L.block ? L.block : m.block, inner = L.nested ? SUPER / block : 1;
  for (int64_t b = 0; b * block < m.cols; b++) {
    const uint16_t* f = s + b / inner * L.factors() * PANEL;
    float scale = half_to_float(f[lane]), minimum = L.minimum ? half_to_float(f[PANEL + lane]) : 0.0f;
    if (L.nested) scale *= (float)inner_scale<K>(f, b % inner, lane);
    if (L.nested && L.minimum) minimum *= -(float)inner_minimum(f, b % inner, lane);
    for (int64_t k = b * block; k < std::min(m.cols, (b + 1) * block); k++) to[k] = scale * (float)(code<K>(w, k, lane) - L.zero) + minimum;
  }
}

// One row of an embedding.
static void read_row(const Matrix& m, int64_t row, float* to) {
  if (m.is_float()) {
    with_floats(m, m.data + row * m.row_bytes(), [&](auto* numbers) {
      for (int64_t k = 0; k < m.cols; k++) to[k] = wide(numbers[k]);
    });
    return;
  }
  const uint8_t* w = m.data + row / PANEL * m.panel_bytes();
  const uint16_t* s = m.scale + row / PANEL * m.panel_factors();
  with_kind(m.kind, [&](auto kind) { read_panel<kind.value>(m, w, s, row % PANEL, to); });
}

}  // namespace minga
