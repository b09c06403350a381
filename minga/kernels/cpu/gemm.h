// Matrix products for training, many at once, in float32, bf16 or int8, forward and backward alike.
//
// One scheme serves all precisions. Both operands are copied into panels ("packed"): A in panels of MR rows, B in panels
// of NR columns, K running slowest, one 32-bit word an entry. A word is one float32, two bf16 or four int8, and the
// inner loop is always: broadcast a word of A, load vectors of B, one dot-product instruction. Packing reads row-major
// float32 memory in either direction and through a row index, so that no product needs a transposed or gathered copy.
//
// int8: each run of 128 values along K has one float32 scale per row of A and per column of B (the activations' 1 x 128
// tiles of DeepSeek-V3, section 3.3.2, on both sides), integer sums within the run, float32 sums across runs. x86's
// instruction multiplies unsigned by signed: A is shifted by 128, and -128 times B's column sum starts the accumulator.
//
// The order of every sum depends on the shapes alone, never on the number of threads.
//
// This file is compiled for the machine it runs on (-march=native), so what the machine has is known here.

#pragma once

#include "vectors.h"

namespace minga {

#if defined(__AVX512F__)
constexpr int MR = 12, NV = 2;  // 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int MR = 6, NV = 2;  // 12 of 16
#else
constexpr int MR = 8, NV = 2;  // 16 of NEON's 32
#endif
constexpr int NR = NV * VL;
constexpr int MC = 96, NC = 128;  // a task's block of C: its accumulator stays in the second-level cache
constexpr int RUN = 128;          // values along K that share a scale, and that are packed at a time

enum Precision : int { F32 = 0, BF16 = 1, I8 = 2 };

// Values of K in one word, and words of one block of the K loop.
template <Precision P>
struct Format;
template <>
struct Format<F32> {
  static constexpr int per_word = 1, block = 256;
};
template <>
struct Format<BF16> {
#if defined(__AVX512BF16__)
  static constexpr int per_word = 2, block = 256;
#else
  static constexpr int per_word = 1, block = 256;  // rounded to bf16, multiplied as float32: the same products
#endif
};
template <>
struct Format<I8> {
#if defined(__AVX512VNNI__)
  static constexpr int per_word = 4;
#elif defined(__AVX2__)
  static constexpr int per_word = 2;  // as int16: twice float32's rate, and no sum of two products can overflow
#else
  static constexpr int per_word = 1;  // as float32, in which the integer sums of a run are exact
#endif
  static constexpr int block = RUN / per_word;
};
#if defined(__AVX512VNNI__)
constexpr bool UNSIGNED_A = true;
#else
constexpr bool UNSIGNED_A = false;
#endif

// A row-major float32 matrix that is one side of a product. `outer` is the dimension that survives (rows of A, columns of
// B), K the one that is summed over. along_k: K is contiguous in memory. `index`, if given, renames the rows of memory.
struct Operand {
  const float* data;
  int64_t stride;
  bool along_k;
  const int64_t* index;
  bool stochastic;  // int8: round up or down with the right expectation, for gradients
};

// C (+)= A B, C row-major.
struct Product {
  int64_t M, N, K;
  Operand a, b;
  float* c;
  int64_t ldc;
  bool add;
  bool symmetric;  // A B is known to be symmetric: only blocks that touch the lower triangle are computed, then mirrored
};

// ------------------------------------------------------------------------------------------------------ packing


// Memory of the calling thread that grows and stays, as the products of a step repeat. The two sides have one each.
static inline char* scratch(int side, size_t bytes) {
  struct Buffer {
    char* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffers[2];
  Buffer& buffer = buffers[side];
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.size = ceil_div(bytes + bytes / 4, 64) * 64;
    buffer.data = static_cast<char*>(std::aligned_alloc(64, buffer.size));
    if (!buffer.data) std::abort();
  }
  return buffer.data;
}

static inline void transpose_tile(const float* const* rows, float* out) {
  // out[k][lane] = rows[lane][k] for VL x VL values
#if defined(__AVX512F__)
  __m512 r[16], t[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(rows[i]);
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    __m512d t0 = _mm512_castps_pd(t[4 * i]), t1 = _mm512_castps_pd(t[4 * i + 1]);
    __m512d t2 = _mm512_castps_pd(t[4 * i + 2]), t3 = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(t0, t2));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(t0, t2));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(t1, t3));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(t1, t3));
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    _mm512_storeu_ps(out + (0 + i) * 16, _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88));
    _mm512_storeu_ps(out + (8 + i) * 16, _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd));
    _mm512_storeu_ps(out + (4 + i) * 16, _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88));
    _mm512_storeu_ps(out + (12 + i) * 16, _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd));
  }
#elif defined(__AVX2__)
  __m256 r[8], t[8];
  for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(rows[i]);
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(out + i * 8, _mm256_permute2f128_ps(r[i], r[4 + i], 0x20));
    _mm256_storeu_ps(out + (4 + i) * 8, _mm256_permute2f128_ps(r[i], r[4 + i], 0x31));
  }
#else
  for (int k = 0; k < VL; k++)
    for (int i = 0; i < VL; i++) out[k * VL + i] = rows[i][k];
#endif
}

static inline vu round_bf16(vf x) {  // to nearest even, the bits in the low half of each lane
#if defined(__AVX512BF16__)
  __m256i h = (__m256i)_mm512_cvtneps_pbh((__m512)x);
  return (vu)_mm512_cvtepu16_epi32(h);
#else
  vu bits = (vu)x;
  vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  vi nan = (vi)(bits & 0x7fffffffu) > 0x7f800000;  // rounding must not carry a NaN over to zero
  return nan ? (bits >> 16 | 0x40u) : rounded;
#endif
}

// Nearest even for |x| < 2^22: in that range adding 1.5 * 2^23 leaves no fraction bits.
static inline vi round_even(vf x) {
  const float magic = 12582912.0f;
  return (vi)(x + magic) - 0x4b400000;
}

static inline uint32_t mix(uint64_t x) {  // splitmix64's finaliser
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return (uint32_t)(x ^ (x >> 31)) | 1u;
}

// One run of K, and VL rows or columns beside each other: `words` of one 32-bit word a lane, with the scale that int8
// words are to be multiplied with and, for B, -128 times their sum.
struct Lanes {
  alignas(64) uint32_t word[RUN][VL];
  vf scale;
  vi shift;
};

// Scale, and what to multiply with, for lanes whose largest magnitude has these bits; integers, so that a NaN is the
// largest of all and is not lost.
static inline vf scale_of(vu top, vf& inverse) {
  vf amax = (vf)top;
  vi broken = (vi)top >= 0x7f800000, zero = amax < 1e-30f;
  inverse = (zero | broken) ? vf{} : 127.0f / amax;
  return broken ? splat(__builtin_nanf("")) : (zero ? vf{} : amax * (1.0f / 127.0f));
}

// Rounds to int8, with `state` given by chance: a number between 0 and 1 away goes up as often as it is near.
template <bool CHANCE>
static inline vi round_int8(vf v, vu& state) {
  if constexpr (CHANCE) {
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    v += (vf)((state >> 9) | 0x3f800000u) - 1.5f;  // uniform in [-1/2, 1/2)
    v = v > 127.0f ? splat(127.0f) : v;
    v = v < -127.0f ? splat(-127.0f) : v;
  }
  return round_even(v);
}

// K runs across memory: a line of memory holds one k of all lanes.
template <Precision P, bool CHANCE>
static inline void read_across(const Operand& x, int lanes, int64_t, int64_t outer0, int64_t k0, int nk, int words, vu state, Lanes& out) {
  constexpr int per = Format<P>::per_word;
  alignas(64) float buf[RUN * VL];
  for (int k = 0; k < nk; k++) {
    int64_t row = k0 + k;
    const float* from = x.data + (x.index ? x.index[row] : row) * x.stride + outer0;
    __builtin_prefetch(from + VL);  // the lanes to come; no hardware sees through the stride
    if (lanes == VL) {
      store(buf + k * VL, load<vf>(from));
    } else {
      for (int i = 0; i < VL; i++) buf[k * VL + i] = i < lanes ? from[i] : 0.0f;
    }
  }
  std::memset(buf + nk * VL, 0, (words * per - nk) * VL * 4);
  auto value = [&](int k) { return load<vf>(buf + k * VL); };
  if constexpr (P == F32) {
    std::memcpy(out.word, buf, words * VL * 4);
  } else if constexpr (P == BF16) {
    for (int w = 0; w < words; w++) {
      vu low = round_bf16(value(w * per));
      store(out.word[w], per == 2 ? low | (round_bf16(value(w * per + per - 1)) << 16) : low << 16);
    }
  } else {
    vu top = {};
    for (int k = 0; k < nk; k++) {
      vu bits = (vu)value(k) & 0x7fffffffu;
      top = bits > top ? bits : top;
    }
    vf inverse;
    out.scale = scale_of(top, inverse);
    vi sum = {};
    auto quantized = [&](int k) {
      vi q = round_int8<CHANCE>(value(k) * inverse, state);
      sum += q;
      return q;
    };
    for (int w = 0; w < words; w++) {
      if constexpr (per == 4) {
        vu q0 = (vu)quantized(4 * w), q1 = (vu)quantized(4 * w + 1), q2 = (vu)quantized(4 * w + 2), q3 = (vu)quantized(4 * w + 3);
        store(out.word[w], (q0 & 255u) | ((q1 & 255u) << 8) | ((q2 & 255u) << 16) | (q3 << 24));
      } else if constexpr (per == 2) {
        vu q0 = (vu)quantized(2 * w), q1 = (vu)quantized(2 * w + 1);
        store(out.word[w], (q0 & 0xffffu) | (q1 << 16));
      } else {
        store(out.word[w], __builtin_convertvector(quantized(w), vf));
      }
    }
    out.shift = sum * -128;
  }
}

// K runs along memory: each lane is a row, rounded as it lies; then words change places, not numbers.
template <Precision P, bool CHANCE>
static inline void read_along(const Operand& x, int lanes, int64_t outer, int64_t outer0, int64_t k0, int nk, int words, vu state, Lanes& out) {
  constexpr int per = Format<P>::per_word;
  typedef int8_t v8 __attribute__((vector_size(VL)));
  typedef int16_t v16 __attribute__((vector_size(VL * 2)));
  alignas(64) uint32_t rows[VL][RUN];
  alignas(64) float padded[RUN];
  alignas(64) vu tops[VL], sideways[VL];
  const float *from[VL], *next[VL];
  int vectors = (int)ceil_div(nk, VL);
  for (int i = 0; i < VL; i++) {
    auto row = [&](int64_t n) { return x.data + (x.index ? x.index[n] : n) * x.stride + k0; };
    from[i] = row(outer0 + std::min(i, lanes - 1));
    next[i] = outer0 + VL + i < outer ? row(outer0 + VL + i) : from[i];
  }
  auto transpose = [](const void* const* at, void* to) { transpose_tile((const float* const*)at, (float*)to); };
  vf inverse = {};
  if constexpr (P == I8) {
    const void* at[VL];
    for (int i = 0; i < VL; i++) {
      tops[i] = vu{};
      at[i] = &tops[i];
      int k = 0;
      for (; k + VL <= nk; k += VL) {
        vu bits = load<vu>(from[i] + k) & 0x7fffffffu;
        tops[i] = bits > tops[i] ? bits : tops[i];
      }
      for (; k < nk; k++) {
        uint32_t bits;
        std::memcpy(&bits, from[i] + k, 4);
        tops[i][0] = std::max(tops[i][0], bits & 0x7fffffffu);
      }
    }
    transpose(at, sideways);
    for (int i = 1; i < VL; i++) sideways[0] = sideways[i] > sideways[0] ? sideways[i] : sideways[0];
    out.scale = scale_of(sideways[0], inverse);
  }
  if (P == F32 && nk % VL == 0 && lanes == VL) {  // nothing to round: the numbers themselves change places
    for (int k = 0; k < nk; k += VL) {
      const void* at[VL];
      for (int i = 0; i < VL; i++) {
        at[i] = from[i] + k;
        __builtin_prefetch(next[i] + k);
      }
      transpose(at, out.word[k]);
    }
    return;
  }
  for (int i = 0; i < lanes; i++) {
    const float* row = from[i];
    for (int k = 0; k < nk; k += VL) __builtin_prefetch(next[i] + k);
    if (nk % VL) {
      std::memcpy(padded, row, nk * 4);
      std::memset(padded + nk, 0, (vectors * VL - nk) * 4);
      row = padded;
    }
    vf factor = splat(inverse[i]);
    char* to = (char*)rows[i];
    for (int v = 0; v < vectors; v++) {
      vf value = load<vf>(row + v * VL);
      if constexpr (P == F32) {
        store(to + v * VL * 4, value);
      } else if constexpr (P == BF16) {
        if constexpr (per == 2) {
          store(to + v * VL * 2, __builtin_convertvector(round_bf16(value), v16));
        } else {
          store(to + v * VL * 4, round_bf16(value) << 16);
        }
      } else {
        vi q = round_int8<CHANCE>(value * factor, state);
        if constexpr (per == 4) {
          store(to + v * VL, __builtin_convertvector(q, v8));
        } else if constexpr (per == 2) {
          store(to + v * VL * 2, __builtin_convertvector(q, v16));
        } else {
          store(to + v * VL * 4, __builtin_convertvector(q, vf));
        }
      }
    }
    std::memset(to + vectors * VL * 4 / per, 0, ceil_div(words, VL) * VL * 4 - vectors * VL * 4 / per);
  }
  for (int i = lanes; i < VL; i++) std::memset(rows[i], 0, ceil_div(words, VL) * VL * 4);
  for (int w = 0; w < words; w += VL) {
    const void* at[VL];
    for (int i = 0; i < VL; i++) at[i] = &rows[i][w];
    transpose(at, out.word[w]);
  }
#if defined(__AVX512VNNI__)
  if constexpr (P == I8) {
    __m512i sum = _mm512_setzero_si512(), ones = _mm512_set1_epi8(1);
    for (int w = 0; w < words; w++) sum = _mm512_dpbusd_epi32(sum, ones, (__m512i)load<vu>(out.word[w]));
    out.shift = (vi)sum * -128;
  }
#endif
}

template <Precision P>
static inline void read_run(const Operand& x, int64_t outer, int64_t outer0, int64_t k0, int nk, int words, uint64_t seed, Lanes& out) {
  int lanes = (int)std::min<int64_t>(VL, outer - outer0);
  vu state = {};
  if (P == I8 && x.stochastic) {
    for (int i = 0; i < VL; i++) state[i] = mix(seed + (uint64_t)(outer0 + i) * 0x9e3779b97f4a7c15ull + k0);
    (x.along_k ? read_along<P, true> : read_across<P, true>)(x, lanes, outer, outer0, k0, nk, words, state, out);
  } else {
    (x.along_k ? read_along<P, false> : read_across<P, false>)(x, lanes, outer, outer0, k0, nk, words, state, out);
  }
}

// Panels of one side: [panel][K block][word][lane], and for int8 scale and shift as [panel][K block][lane].
struct Packed {
  uint32_t* words;
  float* scale;
  int32_t* shift;
  int64_t panel_words, panel_scales;  // from one panel to the next

  Packed from(int64_t panel) const {
    Packed next = *this;
    next.words += panel * panel_words;
    if (scale) next.scale += panel * panel_scales;
    if (shift) next.shift += panel * panel_scales;
    return next;
  }
};

// Room for that many panels in the calling thread's scratch memory.
template <Precision P, int PANEL>
static Packed room(int side, int64_t panels, int64_t K) {
  Packed to{nullptr, nullptr, nullptr, ceil_div(K, Format<P>::per_word) * PANEL, ceil_div(K, RUN) * PANEL};
  size_t words = ceil_div(panels * to.panel_words + VL, 16) * 64, scales = P == I8 ? ceil_div(panels * to.panel_scales + VL, 16) * 64 : 0;
  char* memory = scratch(side, words + 2 * scales);
  to.words = (uint32_t*)memory;
  if (P == I8) {
    to.scale = (float*)(memory + words);
    to.shift = (int32_t*)(memory + words + scales);
  }
  return to;
}

// VL lanes, the first of them lane AT of its panel, go to that panel and, as far as they reach over its end, to the next.
template <Precision P, int PANEL, int AT>
static void write_lanes(const Lanes& from, int words, int64_t run, const Packed& here, bool next, bool is_a) {
  constexpr int first = std::min(VL, PANEL - AT), rest = VL - first;
  constexpr int64_t block = RUN / Format<P>::per_word;
  uint32_t* to = here.words + run * block * PANEL + AT;
  const uint32_t flip = P == I8 && UNSIGNED_A && is_a ? 0x80808080u : 0u;
  for (int w = 0; w < words; w++) {
    vu word = load<vu>(from.word[w]) ^ flip;
    std::memcpy(to + w * PANEL, &word, first * 4);
    if (rest && next) std::memcpy(to - AT + here.panel_words + w * PANEL, (const uint32_t*)&word + first, rest * 4);
  }
  if constexpr (P == I8) {
    int64_t at = run * PANEL + AT, over = run * PANEL + here.panel_scales;
    std::memcpy(here.scale + at, &from.scale, first * 4);
    if (rest && next) std::memcpy(here.scale + over, (const float*)&from.scale + first, rest * 4);
    if (!is_a) {
      std::memcpy(here.shift + at, &from.shift, first * 4);
      if (rest && next) std::memcpy(here.shift + over, (const int32_t*)&from.shift + first, rest * 4);
    }
  }
}

// Panels `from` to `to` beside each other, run by run: where memory runs across them, its lines are read once.
template <Precision P, int PANEL>
static void pack(const Operand& x, int64_t outer, int64_t K, int64_t from, int64_t to, const Packed& out, bool is_a,
                 uint64_t seed) {
  constexpr int step = PANEL % VL == 0 ? VL : PANEL % (VL / 2) == 0 ? VL / 2 : VL / 4;  // where vectors can begin in a panel
  static_assert(PANEL % step == 0 && PANEL <= 4 * step && VL <= PANEL + step, "a vector reaches over two panels at the most");
  Lanes lanes;
  int64_t runs = ceil_div(K, RUN), end = std::min(to * PANEL, outer);
  for (int64_t run = 0; run < runs; run++) {
    int nk = (int)std::min<int64_t>(RUN, K - run * RUN), words = (int)ceil_div(nk, Format<P>::per_word);
    for (int64_t lane = from * PANEL; lane < end; lane += VL) {
      read_run<P>(x, outer, lane, run * RUN, nk, words, seed, lanes);
      int64_t panel = lane / PANEL;
      Packed here = out.from(panel - from);
      bool next = panel + 1 < to;
      auto write = [&](auto at) {
        if constexpr (at.value < PANEL) write_lanes<P, PANEL, at.value>(lanes, words, run, here, next, is_a);
      };
      switch (lane % PANEL / step) {
        case 0: write(std::integral_constant<int, 0>()); break;
        case 1: write(std::integral_constant<int, step>()); break;
        case 2: write(std::integral_constant<int, 2 * step>()); break;
        default: write(std::integral_constant<int, 3 * step>());
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------ the inner loop

template <Precision P>
struct Sum {
  typedef vf type;
};
#if defined(__AVX2__)
template <>
struct Sum<I8> {
  typedef vi type;
};
#endif

template <Precision P>
static inline typename Sum<P>::type dot(typename Sum<P>::type sum, uint32_t a, vu b) {
  if constexpr (P == F32 || Format<P>::per_word == 1) {
    float x;
    std::memcpy(&x, &a, 4);
    return sum + splat(x) * (vf)b;
#if defined(__AVX512BF16__)
  } else if constexpr (P == BF16) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#endif
#if defined(__AVX512VNNI__)
  } else if constexpr (P == I8) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32((int)a), (__m512i)b);
#elif defined(__AVX2__)
  } else if constexpr (P == I8) {
    return sum + (vi)_mm256_madd_epi16(_mm256_set1_epi32((int)a), (__m256i)b);
#endif
  }
}

// acc[MR][NR] += A panel x B panel over one block of K.
template <Precision P>
static inline void micro(int words, const uint32_t* a, const uint32_t* b, const float* sa, const float* sb,
                         const int32_t* shift, float* acc, int64_t ld) {
  typename Sum<P>::type sum[MR][NV];
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) {
      if constexpr (P == I8 && UNSIGNED_A) {
        sum[i][j] = load<typename Sum<P>::type>(shift + j * VL);
      } else {
        sum[i][j] = typename Sum<P>::type{};
      }
    }
  for (int w = 0; w < words; w++) {
    vu vb[NV];
    for (int j = 0; j < NV; j++) vb[j] = load<vu>(b + w * NR + j * VL);
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < NV; j++) sum[i][j] = dot<P>(sum[i][j], a[w * MR + i], vb[j]);
  }
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) {
      float* at = acc + i * ld + j * VL;
      vf total = load<vf>(at);
      if constexpr (P == I8) {
        vf value;
        if constexpr (sizeof(sum) && __is_same(typename Sum<P>::type, vi)) {
          value = __builtin_convertvector(sum[i][j], vf);
        } else {
          value = (vf)sum[i][j];
        }
        total += value * (load<vf>(sb + j * VL) * sa[i]);
      } else {
        total += (vf)sum[i][j];
      }
      store(at, total);
    }
}

// Of a symmetric C a strip of rows from m0 on is computed up to here; what lies to the right is the mirror image of another.
static inline int64_t diagonal_end(int64_t m0) { return m0 + MC; }
static_assert(MC % NR == 0, "a strip of a symmetric product ends with a panel");

// One block of C, MC x NC: all of K, then written out once. `a` are the panels from m0 on, `b` all of B.
template <Precision P>
static void block(const Product& p, const Packed& a, const Packed& b, int64_t m0, int64_t n0) {
  alignas(64) float acc[MC * NC];
  int rows = (int)std::min<int64_t>(MC, p.M - m0), columns = (int)std::min<int64_t>(NC, (p.symmetric ? std::min(p.N, diagonal_end(m0)) : p.N) - n0);
  int m_panels = (int)ceil_div(rows, MR), n_panels = (int)ceil_div(columns, NR);
  std::memset(acc, 0, (size_t)m_panels * MR * NC * 4);
  int64_t words = ceil_div(p.K, Format<P>::per_word);
  for (int64_t w0 = 0, kb = 0; w0 < words; w0 += Format<P>::block, kb++) {
    int nw = (int)std::min<int64_t>(Format<P>::block, words - w0);
    for (int n = 0; n < n_panels; n++)
      for (int m = 0; m < m_panels; m++) {
        Packed pa = a.from(m), pb = b.from(n0 / NR + n);
        micro<P>(nw, pa.words + w0 * MR, pb.words + w0 * NR, P == I8 ? pa.scale + kb * MR : nullptr,
                 P == I8 ? pb.scale + kb * NR : nullptr, P == I8 ? pb.shift + kb * NR : nullptr, acc + m * MR * NC + n * NR, NC);
      }
  }
  for (int i = 0; i < rows; i++) {
    float* to = p.c + (m0 + i) * p.ldc + n0;
    const float* from = acc + i * NC;
    if (p.add) {
      for (int j = 0; j < columns; j++) to[j] += from[j];
    } else {
      std::memcpy(to, from, (size_t)columns * 4);
    }
  }
  if (p.symmetric)
    for (int j = 0; j < columns; j++)
      for (int i = 0; i < rows; i++)
        if (m0 + i >= diagonal_end((n0 + j) / MC * MC)) p.c[(n0 + j) * p.ldc + m0 + i] = acc[i * NC + j];
}

// ------------------------------------------------------------------------------------------------------ many at once

// MC rows of C from n0 to n1: their panels of A are packed, used and forgotten without leaving the cache.
template <Precision P>
static void strip(const Product& p, const Packed& b, int64_t m0, int64_t n0, int64_t n1, uint64_t seed) {
  int64_t from = m0 / MR, to = ceil_div(std::min(p.M, m0 + MC), MR);
  Packed a = room<P, MR>(0, to - from, p.K);
  pack<P, MR>(p.a, p.M, p.K, from, to, a, true, seed);
  for (int64_t n = n0; n < n1; n += NC)
    if (!p.symmetric || n < diagonal_end(m0)) block<P>(p, a, b, m0, n);
}

template <Precision P>
static void run(const std::vector<Product>& products, int threads, uint64_t seed) {
  auto seed_of = [&](size_t i) { return seed + 2 * i * 0x2545f4914f6cdd1dull; };
  if (threads == 1 || (int64_t)products.size() >= 2 * threads) {  // a product for each thread at a time
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (size_t i = 0; i < products.size(); i++) {
      const Product& p = products[i];
      if (p.M == 0 || p.N == 0) continue;
      Packed b = room<P, NR>(1, ceil_div(p.N, NR), p.K);
      pack<P, NR>(p.b, p.N, p.K, 0, ceil_div(p.N, NR), b, false, seed_of(i) + 1);
      for (int64_t m0 = 0; m0 < p.M; m0 += MC) strip<P>(p, b, m0, 0, p.N, seed_of(i));
    }
    return;
  }
  for (size_t i = 0; i < products.size(); i++) {  // all threads on one product: B packed together, then strips of C
    const Product& p = products[i];
    if (p.M == 0 || p.N == 0) continue;
    Packed b = room<P, NR>(1, ceil_div(p.N, NR), p.K);
    int64_t strips = ceil_div(p.M, MC), blocks = ceil_div(p.N, NC);
    int64_t parts = std::max<int64_t>(1, std::min(blocks, ceil_div(4 * threads, strips)));  // of a strip, if they are few
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
      for (int64_t n = 0; n < blocks; n++) {
        int64_t from = n * (NC / NR), to = std::min(ceil_div(p.N, NR), from + NC / NR);
        pack<P, NR>(p.b, p.N, p.K, from, to, b.from(from), false, seed_of(i) + 1);
      }
#pragma omp for schedule(dynamic)
      for (int64_t t = 0; t < strips * parts; t++) {
        int64_t part = t % parts, n0 = blocks * part / parts * NC, n1 = std::min(p.N, blocks * (part + 1) / parts * NC);
        strip<P>(p, b, t / parts * MC, n0, n1, seed_of(i));
      }
    }
  }
}

static void multiply(const std::vector<Product>& products, int precision, int threads, uint64_t seed) {
  if (precision == F32) run<F32>(products, threads, seed);
  if (precision == BF16) run<BF16>(products, threads, seed);
  if (precision == I8) run<I8>(products, threads, seed);
}

}  // namespace minga
