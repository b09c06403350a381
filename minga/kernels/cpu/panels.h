// Products of stored weights with a few rows of activations: what decoding spends its time on.
//
// 8- and 4-bit weights lie in panels of 16 rows, columns running slowest, so that one instruction multiplies four columns
// of all 16 rows (docs/formats.md has the bytes). Activations are rounded to int8 in the blocks of the weights. Sums inside
// a block are whole numbers; across blocks they are float32, one after the other. So a row's result is the same to the bit
// whether one token is computed or many, and on whatever number of threads.

#pragma once

#include "vectors.h"

namespace minga {

constexpr int PANEL = 16;        // rows
constexpr int MAX_TOKENS = 6;    // of one call of a kernel
constexpr int FLOAT_ROWS = 4;    // of weights in one call of the float kernel
constexpr int64_t AHEAD = 8192;  // bytes: what is asked of memory before it is needed

enum Kind : int64_t { NONE = 0, FLOAT32 = 1, INT8 = 2, INT4 = 3 };

// `count` matrices of (rows, cols) behind each other; `block` columns share a scale. Mirrored in functions.py.
struct Matrix {
  int64_t kind, block, rows, cols, count;
  const uint8_t* data;
  const uint16_t* scale;  // float16: (count, panels, blocks, 16)
  const float* bias;      // (rows) or null

  int64_t panels() const { return ceil_div(rows, PANEL); }
  int64_t blocks() const { return ceil_div(cols, block); }
  int64_t padded() const { return ceil_div(cols, 8) * 8; }  // columns of a panel, the last of them zeros
  bool is_float() const { return kind == FLOAT32; }
  bool is_rounded() const { return kind >= INT8; }  // and so is what it is multiplied with
  int64_t panel_bytes() const { return PANEL * padded() / (kind == INT4 ? 2 : 1); }
  int64_t row_bytes() const { return cols * 4; }
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

// Rows of float32, and the same rounded to int8: q (padded with zeros), a scale and the sum of q for each block.
struct Rows {
  float* x = nullptr;
  int64_t width = 0;
  int8_t* q = nullptr;
  float* scale = nullptr;
  int32_t* sum = nullptr;
  int64_t padded = 0, blocks = 0;

  const float* row(int64_t i) const { return x + i * width; }
  float* row(int64_t i) { return x + i * width; }
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

// Row i of `r` for a matrix with blocks of `block`.
static inline void round_row(Rows& r, int64_t i, int64_t block) {
  const float* x = r.row(i);
  int8_t* q = r.q + i * r.padded;
  for (int64_t b = 0; b < r.blocks; b++) {
    int64_t from = b * block, to = std::min(r.width, from + block);
    float top = largest_magnitude(x + from, to - from), inverse = top > 0 ? 127.0f / top : 0.0f;
    int32_t sum = 0;
    int64_t k = from;
#if defined(__AVX512F__)
    __m512i sums = _mm512_setzero_si512();
    for (; k + 16 <= to; k += 16) {
      __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), _mm512_set1_ps(inverse)));
      sums = _mm512_add_epi32(sums, v);
      _mm_storeu_si128((__m128i*)(q + k), _mm512_cvtepi32_epi8(v));
    }
    sum = _mm512_reduce_add_epi32(sums);
#endif
    for (; k < to; k++) sum += q[k] = (int8_t)std::lrintf(x[k] * inverse);
    r.scale[i * r.blocks + b] = top / 127.0f;
    r.sum[i * r.blocks + b] = sum;
  }
  std::memset(q + r.width, 0, (size_t)(r.padded - r.width));
}

// ------------------------------------------------------------------------------------------------------ 8 and 4 bits

// out[t][p * 16 + r] = row r of panel p times token t, for NP panels and NT tokens. w, s: the first panel and its scales.
// CH: sums side by side in a block, whole numbers that are added at its end. One panel and several sums for few tokens, so
// that memory is read from front to back; two panels and one sum for many.
template <int NT, int NP, int CH, bool FOUR>
static void panel_product(const Matrix& m, const uint8_t* w, const uint16_t* s, const Rows& r, const int32_t* token, float* const* out) {
  const int64_t panel_bytes = m.panel_bytes(), blocks = m.blocks(), padded = m.padded();
  const int8_t* q[NT];
  const float* scale[NT];
  const int32_t* sum[NT];
  for (int t = 0; t < NT; t++) {
    q[t] = r.q + token[t] * r.padded;
    scale[t] = r.scale + token[t] * r.blocks;
    sum[t] = r.sum + token[t] * r.blocks;
  }
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
  constexpr int STEP = FOUR ? 8 : 4;
  __m512 acc[NT][NP];
  for (int t = 0; t < NT; t++)
    for (int p = 0; p < NP; p++) acc[t][p] = _mm512_setzero_ps();
  const __m512i low = _mm512_set1_epi8(15), flip = _mm512_set1_epi8((char)0x80);
  for (int64_t b = 0; b < blocks; b++) {
    __m512i c[NT][NP][CH];
    for (int t = 0; t < NT; t++)
      for (int p = 0; p < NP; p++) {  // the instruction takes weights without sign: w + 128, or w + 8
        c[t][p][0] = _mm512_set1_epi32((FOUR ? -8 : -128) * sum[t][b]);
        for (int i = 1; i < CH; i++) c[t][p][i] = _mm512_setzero_si512();
      }
    auto step = [&](int64_t k, int i) {
      __m512i v[NP], high[NP];
      for (int p = 0; p < NP; p++) {
        const uint8_t* at = w + p * panel_bytes + (FOUR ? k * 8 : k * 16);
        if (NP == 1) _mm_prefetch((const char*)at + AHEAD, _MM_HINT_T0);
        v[p] = _mm512_loadu_si512(at);
        if (FOUR) {
          high[p] = _mm512_and_si512(_mm512_srli_epi16(v[p], 4), low);
          v[p] = _mm512_and_si512(v[p], low);
        } else {
          v[p] = _mm512_xor_si512(v[p], flip);
        }
      }
      for (int t = 0; t < NT; t++) {
        __m512i x = _mm512_set1_epi32(load<int32_t>(q[t] + k));
        for (int p = 0; p < NP; p++) c[t][p][i] = _mm512_dpbusd_epi32(c[t][p][i], v[p], x);
        if (FOUR) {
          x = _mm512_set1_epi32(load<int32_t>(q[t] + k + 4));
          for (int p = 0; p < NP; p++) c[t][p][i] = _mm512_dpbusd_epi32(c[t][p][i], high[p], x);
        }
      }
    };
    int64_t k = b * m.block, k1 = std::min(padded, k + m.block);
    for (; k + CH * STEP <= k1; k += CH * STEP)
      for (int i = 0; i < CH; i++) step(k + i * STEP, i);
    for (; k < k1; k += STEP) step(k, 0);
    for (int p = 0; p < NP; p++) {
      __m512 ws = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(s + (p * blocks + b) * PANEL)));
      for (int t = 0; t < NT; t++) {
        for (int i = 1; i < CH; i++) c[t][p][0] = _mm512_add_epi32(c[t][p][0], c[t][p][i]);
        acc[t][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(c[t][p][0]), _mm512_mul_ps(ws, _mm512_set1_ps(scale[t][b])), acc[t][p]);
      }
    }
  }
  for (int t = 0; t < NT; t++)
    for (int p = 0; p < NP; p++) _mm512_storeu_ps(out[t] + p * PANEL, acc[t][p]);
#elif defined(__AVX2__) && defined(__F16C__) && defined(__FMA__)
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  for (int p = 0; p < NP; p++) {
    __m256 acc[NT][2];
    for (int t = 0; t < NT; t++) acc[t][0] = acc[t][1] = _mm256_setzero_ps();
    for (int64_t b = 0; b < blocks; b++) {
      __m256i c[NT][2];
      for (int t = 0; t < NT; t++) c[t][0] = c[t][1] = _mm256_set1_epi32(FOUR ? -8 * sum[t][b] : 0);
      int64_t k0 = b * m.block, k1 = std::min(padded, k0 + m.block);
      for (int64_t k = k0; k < k1; k += FOUR ? 8 : 4)
        for (int half = 0; half < 2; half++) {
          const uint8_t* at = w + p * panel_bytes + (FOUR ? k * 8 : k * 16) + half * 32;
          __m256i v = _mm256_loadu_si256((const __m256i*)at);
          if (NP == 1 && half == 0) _mm_prefetch((const char*)at + AHEAD, _MM_HINT_T0);
          for (int t = 0; t < NT; t++) {
            __m256i x = _mm256_set1_epi32(load<int32_t>(q[t] + k)), two;
            if (FOUR) {
              two = _mm256_maddubs_epi16(_mm256_and_si256(v, low), x);
              __m256i y = _mm256_set1_epi32(load<int32_t>(q[t] + k + 4));
              // each of the four products is at most 15 * 127, so their sum fits
              two = _mm256_add_epi16(two, _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(v, 4), low), y));
            } else {
              two = _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(x, v));
            }
            c[t][half] = _mm256_add_epi32(c[t][half], _mm256_madd_epi16(two, ones));
          }
        }
      for (int half = 0; half < 2; half++) {
        __m256 ws = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(s + (p * blocks + b) * PANEL + half * 8)));
        for (int t = 0; t < NT; t++)
          acc[t][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(c[t][half]), _mm256_mul_ps(ws, _mm256_set1_ps(scale[t][b])), acc[t][half]);
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
        for (int64_t b = 0; b < blocks; b++) {
          int32_t c = 0;
          int64_t k0 = b * m.block, k1 = std::min(padded, k0 + m.block);
          for (int64_t k = k0; k < k1; k++) {
            const uint8_t* at = w + p * panel_bytes;
            int value;
            if (FOUR) {
              int byte = at[k / 8 * 64 + lane * 4 + k % 4];
              value = (k % 8 < 4 ? byte & 15 : byte >> 4) - 8;
            } else {
              value = (int8_t)at[k / 4 * 64 + lane * 4 + k % 4];
            }
            c += value * q[t][k];
          }
          acc += (float)c * (half_to_float(s[(p * blocks + b) * PANEL + lane]) * scale[t][b]);
        }
        out[t][p * PANEL + lane] = acc;
      }
#endif
}

// Up to two panels, or one for few tokens; returns how many.
template <bool FOUR>
static int panel_products(const Matrix& m, const uint8_t* w, const uint16_t* s, int64_t panels, const Rows& r, const int32_t* token, int nt,
                          float* const* out) {
#define MINGA_CALL(NT, NP, CH) return panel_product<NT, NP, CH, FOUR>(m, w, s, r, token, out), NP
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

// ------------------------------------------------------------------------------------------------------ float weights

// out[t][r] for NR4 rows of weights and NT tokens.
template <int NT, int NR4>
static void float_product(const Matrix& m, const uint8_t* w, const Rows& r, const int32_t* token, float* const* out) {
  vf acc[NT][NR4];
  const uint8_t* row[NR4];
  for (int i = 0; i < NR4; i++) row[i] = w + i * m.row_bytes();
  for (int t = 0; t < NT; t++)
    for (int i = 0; i < NR4; i++) acc[t][i] = vf{};
  int64_t k = 0;
  for (; k + VL <= m.cols; k += VL) {
    vf v[NR4];
    for (int i = 0; i < NR4; i++) v[i] = load<vf>(row[i] + 4 * k);
    for (int t = 0; t < NT; t++) {
      vf x = load<vf>(r.row(token[t]) + k);
      for (int i = 0; i < NR4; i++) acc[t][i] += x * v[i];
    }
  }
  for (int t = 0; t < NT; t++)
    for (int i = 0; i < NR4; i++) {
      float total = sum_v(acc[t][i]);
      for (int64_t j = k; j < m.cols; j++) total += r.row(token[t])[j] * ((const float*)row[i])[j];
      out[t][i] = total;
    }
}

static void float_products(const Matrix& m, const uint8_t* w, const Rows& r, const int32_t* token, int nt, int rows, float* const* out) {
  float* to[4];
  for (int t0 = 0; t0 < nt; t0 += 4) {
    int n = std::min(4, nt - t0);
    for (int i = 0; i < rows;) {
      bool four = rows - i >= FLOAT_ROWS;
      const uint8_t* at = w + i * m.row_bytes();
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

// ------------------------------------------------------------------------------------------------------ either

// Units of 16 rows from `from` to `to` of matrix `number` times `nt` rows of activations; out[t] + the row's number.
static void product(const Matrix& m, int64_t number, int64_t from, int64_t to, const Rows& r, const int32_t* token, int64_t nt, float* const* out) {
  const uint8_t* w = m.data + number * m.bytes();
  const uint16_t* s = m.scale + number * m.panels() * m.blocks() * PANEL;
  float* at[MAX_TOKENS];
  alignas(64) float room[MAX_TOKENS][2 * PANEL];
  bool few = nt <= 3;
  for (int64_t u = from, np; u < to; u += np) {
    np = m.is_float() || few ? 1 : std::min<int64_t>(2, to - u);
    int64_t row = u * PANEL, rows = std::min<int64_t>(m.rows - row, np * PANEL);
    for (int64_t t0 = 0; t0 < nt; t0 += MAX_TOKENS) {
      int n = (int)std::min<int64_t>(MAX_TOKENS, nt - t0);
      bool direct = m.is_float() || rows == np * PANEL;
      for (int t = 0; t < n; t++) at[t] = direct ? out[t0 + t] + row : room[t];
      if (m.is_float()) {
        float_products(m, w + row * m.row_bytes(), r, token + t0, n, (int)rows, at);
      } else {
        // the last tokens of many may be few, and then each panel comes alone
        for (int64_t p = 0; p < np;) {
          float* to_panel[MAX_TOKENS];
          for (int t = 0; t < n; t++) to_panel[t] = at[t] + p * PANEL;
          const uint8_t* wp = w + (u + p) * m.panel_bytes();
          const uint16_t* sp = s + (u + p) * m.blocks() * PANEL;
          p += m.kind == INT8 ? panel_products<false>(m, wp, sp, np - p, r, token + t0, n, to_panel)
                              : panel_products<true>(m, wp, sp, np - p, r, token + t0, n, to_panel);
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

// One row of an embedding.
static void read_row(const Matrix& m, int64_t row, float* to) {
  const uint8_t* w = m.is_float() ? m.data + row * m.row_bytes() : m.data + row / PANEL * m.panel_bytes();
  int64_t lane = row % PANEL;
  const uint16_t* s = m.scale + row / PANEL * m.blocks() * PANEL + lane;
  for (int64_t k = 0; k < m.cols; k++) {
    if (m.kind == FLOAT32) to[k] = ((const float*)w)[k];
    if (m.kind == INT8) to[k] = (float)(int8_t)w[k / 4 * 64 + lane * 4 + k % 4] * half_to_float(s[k / m.block * PANEL]);
    if (m.kind == INT4) {
      int byte = w[k / 8 * 64 + lane * 4 + k % 4];
      to[k] = (float)((k % 8 < 4 ? byte & 15 : byte >> 4) - 8) * half_to_float(s[k / m.block * PANEL]);
    }
  }
}

}  // namespace minga
