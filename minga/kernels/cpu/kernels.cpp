// What Python calls, by way of ctypes: plain C functions over float32 memory. Shapes are in minga/kernels/cpu/__init__.py.

#include "gemm.h"

#include <cmath>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

using namespace minga;

namespace {

Operand rows(const float* data, int64_t stride, const int64_t* index = nullptr) { return {data, stride, true, index, false}; }
Operand columns(const float* data, int64_t stride, const int64_t* index = nullptr) { return {data, stride, false, index, false}; }
Operand stochastic(Operand x) {
  x.stochastic = true;
  return x;
}

// In place: da (F) -> d gate_up (2F), and a * factor for the product with the output's gradient. Returns a . da.
float swiglu_row_backward(const float* gate_up, const float* da, int64_t F, float factor, float* d_gate_up, float* a) {
  vf sum = {};
  float tail = 0;
  int64_t i = 0;
  for (; i + VL <= F; i += VL) {
    vf g = load<vf>(gate_up + i), u = load<vf>(gate_up + F + i), d = load<vf>(da + i);
    vf s = 1.0f / (1.0f + exp_v(-g)), silu = g * s;
    sum += silu * u * d;
    store(a + i, silu * u * factor);
    d *= factor;
    store(d_gate_up + i, d * u * (s + silu * (1.0f - s)));
    store(d_gate_up + F + i, d * silu);
  }
  for (; i < F; i++) {
    float g = gate_up[i], u = gate_up[F + i], d = da[i];
    float s = 1.0f / (1.0f + exp_s(-g)), silu = g * s;
    tail += silu * u * d;
    a[i] = silu * u * factor;
    d *= factor;
    d_gate_up[i] = d * u * (s + silu * (1.0f - s));
    d_gate_up[F + i] = d * silu;
  }
  for (int l = 0; l < VL; l++) tail += sum[l];
  return tail;
}

void rotate_row_backward(const float* d, const float* cos, const float* sin, int64_t P, bool halves, float scale, float* to) {
  int64_t step = halves ? 1 : 2, second = halves ? P : 1;
  for (int64_t p = 0; p < P; p++) {
    float a = d[p] * scale, b = d[P + p] * scale;
    to[p * step] = a * cos[p] + b * sin[p];
    to[p * step + second] = b * cos[p] - a * sin[p];
  }
}

// One head of one sequence: rotated, scaled queries and rotated keys in contiguous rows of K + R.
struct Head {
  int64_t T, K, R, V;
  std::vector<float> q, k;
  std::vector<int64_t> start;  // first key that each query may look at
};

struct Latent {  // the tensors of one call; see minga_attention
  const float *q, *kv, *rope, *cos, *sin;
  const int64_t* segment;
  int64_t B, T, H, K, R, V, angles;  // angles: 0 where all sequences share cos and sin, else T
  bool halves;
  float scale;
};

Head open_head(const Latent& a, int64_t b, int64_t h) {
  int64_t Q = a.K + a.R, P = a.R / 2;
  Head head{a.T, a.K, a.R, a.V, std::vector<float>(a.T * Q), std::vector<float>(a.T * Q), std::vector<int64_t>(a.T)};
  for (int64_t t = 0; t < a.T; t++) {
    const float* q = a.q + ((b * a.T + t) * a.H + h) * Q;
    const float* kv = a.kv + ((b * a.T + t) * a.H + h) * (a.K + a.V);
    const float *cos = a.cos + (b * a.angles + t) * P, *sin = a.sin + (b * a.angles + t) * P;
    float *to = &head.q[t * Q], *k = &head.k[t * Q];
    for (int64_t i = 0; i < a.K; i++) to[i] = q[i] * a.scale;
    std::memcpy(k, kv, a.K * 4);
    rotate_row(q + a.K, cos, sin, P, a.halves, a.scale, to + a.K);
    rotate_row(a.rope + (b * a.T + t) * a.R, cos, sin, P, a.halves, 1.0f, k + a.K);
    const int64_t* segment = a.segment ? a.segment + b * a.T : nullptr;
    head.start[t] = !segment || t == 0 ? 0 : segment[t] == segment[t - 1] ? head.start[t - 1] : t;
  }
  return head;
}

// x (M, N) <- x p(G) or p(G) x, p(G) = a + b G + c G G, G the Gram matrix of the short side. x is divided first by the
// fourth root of the sum of its singular values' fourth powers, |G|_F^(1/2), which none of them exceeds.
void newton_schulz(float* x, const float* coefficients, int64_t M, int64_t N, int64_t steps, int precision, int threads) {
  int64_t S = std::min(M, N);
  std::vector<float> gram(S * S), poly(S * S), next(M * N);
  auto short_side = M <= N ? rows(x, N) : columns(x, N);
  for (int64_t step = 0; step < steps; step++) {
    float a = coefficients[3 * step], b = coefficients[3 * step + 1], c = coefficients[3 * step + 2];
    multiply({{S, S, std::max(M, N), short_side, short_side, gram.data(), S, false, true}}, precision, threads, 0);
    if (step == 0) {
      double squares = 0;
      for (float g : gram) squares += (double)g * g;
      double size = std::max(std::sqrt(squares), 1e-12), root = std::sqrt(size);  // an expert without tokens is all zeros
      a /= root, b /= root * size, c /= root * size * size;
    }
    multiply({{S, S, S, rows(gram.data(), S), rows(gram.data(), S), poly.data(), S, false, true}}, precision, threads, 0);
    for (int64_t i = 0; i < S * S; i++) poly[i] = b * gram[i] + c * poly[i];
    for (int64_t i = 0; i < S; i++) poly[i * S + i] += a;
    if (M <= N) {
      multiply({{M, N, S, rows(poly.data(), S), columns(x, N), next.data(), N, false, false}}, precision, threads, 0);
    } else {
      multiply({{M, N, S, rows(x, N), rows(poly.data(), S), next.data(), N, false, false}}, precision, threads, 0);
    }
    std::memcpy(x, next.data(), M * N * 4);
  }
}

// Linear codes of minga/train/lowbit.py: n / 127 of the block's largest magnitude is kept as 128 + n.
void decode_row(const uint8_t* code, const float* absmax, int64_t N, int64_t size, float* to) {
  for (int64_t j0 = 0; j0 < N; j0 += size, absmax++)
    for (int64_t j = j0; j < std::min(N, j0 + size); j++) to[j] = (float)((int)code[j] - 128) / 127.0f * *absmax;
}

void encode_row(const float* x, int64_t N, int64_t size, uint8_t* code, float* absmax) {
  for (int64_t j0 = 0; j0 < N; j0 += size, absmax++) {
    int64_t j1 = std::min(N, j0 + size), j = j0;
    vf tops = {};
    for (; j + VL <= j1; j += VL) {
      vf magnitude = (vf)(load<vu>(x + j) & 0x7fffffffu);
      tops = magnitude > tops ? magnitude : tops;
    }
    float top = 0;
    for (; j < j1; j++) top = std::max(top, std::fabs(x[j]));
    for (int l = 0; l < VL; l++) top = std::max(top, tops[l]);
    *absmax = top;
    float scale = top == 0 ? 1.0f : top;
    for (j = j0; j < j1; j++) code[j] = (uint8_t)(128 + (int)std::nearbyintf(x[j] / scale * 127.0f));
  }
}

// m <- beta m + (1 - beta) g, u = beta m + (1 - beta) g once more (Nesterov). Returns the sum of squares of u.
double nesterov_row(const float* g, int64_t N, float beta, float* m, float* u) {
  vf sums = {};
  float sum = 0;
  int64_t j = 0;
  for (; j + VL <= N; j += VL) {
    vf gj = load<vf>(g + j), mj = load<vf>(m + j);
    mj += (1 - beta) * (gj - mj);
    vf uj = gj + beta * (mj - gj);
    store(m + j, mj);
    store(u + j, uj);
    sums += uj * uj;
  }
  for (; j < N; j++) {
    m[j] += (1 - beta) * (g[j] - m[j]);
    u[j] = g[j] + beta * (m[j] - g[j]);
    sum += u[j] * u[j];
  }
  return sum + sum_v(sums);
}

constexpr int64_t QUERIES = 96;  // rows of scores computed at a time

}  // namespace

extern "C" {

// A training step allocates and frees the same tensors over and over. Above 128 KiB glibc gives each back to the kernel,
// and every page is cleared again on its next use; keeping up to 2 GiB of them makes a small model's step a third faster.
constexpr int64_t REUSED = 32 << 20;     // bytes of the largest blocks that are kept, glibc's limit
constexpr int64_t MAY_LIE = 256 << 20;  // bytes of them that may lie about beside a large gradient

void minga_keep_memory() {
#if defined(__GLIBC__)
  mallopt(M_MMAP_THRESHOLD, REUSED);
  mallopt(M_TRIM_THRESHOLD, 2147483647);
  mallopt(M_TOP_PAD, 64 << 20);
#endif
}

// Called before a gradient of so many bytes is allocated. A large one comes from the kernel and would lie beside what
// activations have left; so that is given back first.
void minga_make_room(int64_t bytes) {
#if defined(__GLIBC__) && __GLIBC_PREREQ(2, 33)
  if (bytes > REUSED && (int64_t)mallinfo2().fordblks > MAY_LIE) malloc_trim(0);
#endif
}

// y (M, N) = x (M, K) w (N, K)^T
void minga_linear(const float* x, const float* w, float* y, int64_t M, int64_t N, int64_t K, int64_t precision, int64_t threads) {
  multiply({{M, N, K, rows(x, K), rows(w, K), y, N, false, false}}, precision, threads, 0);
}

// dx (M, K) = dy w, dw (N, K) = dy^T x, or dw += with `add`; either may be null.
void minga_linear_backward(const float* dy, const float* x, const float* w, float* dx, float* dw, int64_t M, int64_t N,
                           int64_t K, int64_t add, int64_t precision, int64_t threads, uint64_t seed) {
  std::vector<Product> products;
  if (dx) products.push_back({M, K, N, stochastic(rows(dy, N)), columns(w, K), dx, K, false, false});
  if (dw) products.push_back({N, K, M, stochastic(columns(dy, N)), columns(x, K), dw, K, add != 0, false});
  multiply(products, precision, threads, seed);
}

// Experts. R = tokens x active rows sorted by expert, offset[E + 1]; token[r] is the row of x, place[n * A + a] the sorted row.
// gate_up[e] (2F, D), down[e] (D, F). hidden (R, 2F) is kept for backward; act (R, F), y (R, D) are work space.
void minga_experts(const float* x, const int64_t* token, const int64_t* place, const float* weight, const int64_t* offset,
                   const float* gate_up, const float* down, float* hidden, float* act, float* y, float* out, int64_t N,
                   int64_t A, int64_t E, int64_t D, int64_t F, int64_t precision, int64_t threads) {
  int64_t R = N * A;
  std::vector<Product> products;
  for (int64_t e = 0; e < E; e++) {
    int64_t r = offset[e], n = offset[e + 1] - r;
    if (n) products.push_back({n, 2 * F, D, rows(x, D, token + r), rows(gate_up + e * 2 * F * D, D), hidden + r * 2 * F, 2 * F, false, false});
  }
  multiply(products, precision, threads, 0);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < R; r++) swiglu_row(hidden + r * 2 * F, F, 1.0f, act + r * F);
  products.clear();
  for (int64_t e = 0; e < E; e++) {
    int64_t r = offset[e], n = offset[e + 1] - r;
    if (n) products.push_back({n, D, F, rows(act + r * F, F), rows(down + e * D * F, F), y + r * D, D, false, false});
  }
  multiply(products, precision, threads, 0);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < N; n++) {
    float* to = out + n * D;
    for (int64_t a = 0; a < A; a++) {
      const float* from = y + place[n * A + a] * D;
      float w = weight ? weight[n * A + a] : 1.0f;
      for (int64_t d = 0; d < D; d++) to[d] = a ? to[d] + w * from[d] : w * from[d];
    }
  }
}

// Gradients of the same. d_out (N, D); work space: act, d_act (R, F), d_hidden (R, 2F), d_rows (R, D).
void minga_experts_backward(const float* d_out, const float* x, const int64_t* token, const int64_t* place,
                            const float* weight, const int64_t* offset, const float* gate_up, const float* down,
                            const float* hidden, float* act, float* d_act, float* d_hidden, float* d_rows, float* dx,
                            float* d_weight, float* d_gate_up, float* d_down, int64_t N, int64_t A, int64_t E, int64_t D,
                            int64_t F, int64_t precision, int64_t threads, uint64_t seed) {
  int64_t R = N * A;
  std::vector<Product> products;
  std::vector<int64_t> slot(R);
  for (int64_t i = 0; i < R; i++) slot[place[i]] = i;
  for (int64_t e = 0; e < E; e++) {
    int64_t r = offset[e], n = offset[e + 1] - r;
    if (n) products.push_back({n, F, D, stochastic(rows(d_out, D, token + r)), columns(down + e * D * F, F), d_act + r * F, F, false, false});
  }
  multiply(products, precision, threads, seed);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < R; r++) {
    float w = weight ? weight[slot[r]] : 1.0f;
    float dot = swiglu_row_backward(hidden + r * 2 * F, d_act + r * F, F, w, d_hidden + r * 2 * F, act + r * F);
    if (d_weight) d_weight[slot[r]] = dot;
  }
  products.clear();
  for (int64_t e = 0; e < E; e++) {
    int64_t r = offset[e], n = offset[e + 1] - r;
    if (n) {
      products.push_back({n, D, 2 * F, stochastic(rows(d_hidden + r * 2 * F, 2 * F)), columns(gate_up + e * 2 * F * D, D), d_rows + r * D, D, false, false});
      products.push_back({D, F, n, stochastic(columns(d_out, D, token + r)), columns(act + r * F, F), d_down + e * D * F, F, false, false});
      products.push_back({2 * F, D, n, stochastic(columns(d_hidden + r * 2 * F, 2 * F)), columns(x, D, token + r), d_gate_up + e * 2 * F * D, D, false, false});
    } else {
      std::memset(d_down + e * D * F, 0, D * F * 4);
      std::memset(d_gate_up + e * 2 * F * D, 0, 2 * F * D * 4);
    }
  }
  multiply(products, precision, threads, seed + 1);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < N; n++) {
    float* to = dx + n * D;
    for (int64_t a = 0; a < A; a++) {
      const float* from = d_rows + place[n * A + a] * D;
      for (int64_t d = 0; d < D; d++) to[d] = a ? to[d] + from[d] : from[d];
    }
  }
}

// RMS norm of R rows of D; rstd (R) is kept for backward.
void minga_rms_norm(const float* x, const float* weight, float* y, float* rstd, int64_t R, int64_t D, double eps,
                    int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < R; r++) {
    const float* from = x + r * D;
    float* to = y + r * D;
    vf sum = {};
    float tail = 0;
    int64_t i = 0;
    for (; i + VL <= D; i += VL) sum += load<vf>(from + i) * load<vf>(from + i);
    for (; i < D; i++) tail += from[i] * from[i];
    float scale = 1.0f / std::sqrt((tail + sum_v(sum)) / D + (float)eps);
    rstd[r] = scale;
    for (int64_t j = 0; j < D; j++) to[j] = from[j] * scale * weight[j];
  }
}

// dx (R, D), d_weight (D); work: (chunks, D), each chunk of rows summed on its own whatever the number of threads.
void minga_rms_norm_backward(const float* dy, const float* x, const float* weight, const float* rstd, float* dx,
                             float* d_weight, float* work, int64_t R, int64_t D, int64_t chunks, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t c = 0; c < chunks; c++) {
    float* partial = work + c * D;
    std::memset(partial, 0, D * 4);
    for (int64_t r = c * R / chunks; r < (c + 1) * R / chunks; r++) {
      const float *d = dy + r * D, *from = x + r * D;
      float* to = dx + r * D;
      vf sum = {};
      float tail = 0;
      int64_t i = 0;
      for (; i + VL <= D; i += VL) sum += load<vf>(d + i) * load<vf>(weight + i) * load<vf>(from + i);
      for (; i < D; i++) tail += d[i] * weight[i] * from[i];
      float scale = rstd[r], mean = (tail + sum_v(sum)) * scale * scale / D;
      for (int64_t j = 0; j < D; j++) {
        partial[j] += d[j] * from[j] * scale;
        to[j] = scale * (d[j] * weight[j] - from[j] * mean);
      }
    }
  }
  for (int64_t j = 0; j < D; j++) {
    float sum = 0;
    for (int64_t c = 0; c < chunks; c++) sum += work[c * D + j];
    d_weight[j] = sum;
  }
}

// Causal attention of the latent kind, inside each segment: q (B, T, H, K + R), kv (B, T, H, K + V), rope (B, T, R), all
// before rotation; cos, sin (T, R/2) or (B, T, R/2). out (B, T, H, V); lse (B, H, T) is kept for backward.
void minga_attention(const float* q, const float* kv, const float* rope, const float* cos, const float* sin,
                     const int64_t* segment, float* out, float* lse, int64_t B, int64_t T, int64_t H, int64_t K, int64_t R,
                     int64_t V, int64_t angles, int64_t halves, double scale, int64_t precision, int64_t threads) {
  Latent a{q, kv, rope, cos, sin, segment, B, T, H, K, R, V, angles, halves != 0, (float)scale};
  int64_t Q = K + R, O = K + V;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t bh = 0; bh < B * H; bh++) {
    int64_t b = bh / H, h = bh % H;
    Head head = open_head(a, b, h);
    std::vector<float> scores(QUERIES * T);
    for (int64_t t0 = 0; t0 < T; t0 += QUERIES) {
      int64_t n = std::min(QUERIES, T - t0), s0 = head.start[t0], S = t0 + n - s0;
      multiply({{n, S, Q, rows(&head.q[t0 * Q], Q), rows(&head.k[s0 * Q], Q), scores.data(), S, false, false}}, precision, 1, 0);
      for (int64_t i = 0; i < n; i++) {
        float* row = &scores[i * S];
        int64_t from = head.start[t0 + i] - s0, to = t0 + i + 1 - s0;
        float top = row[from], sum = 0;
        for (int64_t s = from; s < to; s++) top = std::max(top, row[s]);
        std::memset(row, 0, from * 4);
        int64_t s = from;
        vf sums = {};
        for (; s + VL <= to; s += VL) {
          vf e = exp_v(load<vf>(row + s) - top);
          store(row + s, e);
          sums += e;
        }
        for (; s < to; s++) sum += row[s] = exp_s(row[s] - top);
        sum += sum_v(sums);
        for (int64_t j = from; j < to; j++) row[j] *= 1.0f / sum;
        std::memset(row + to, 0, (S - to) * 4);
        lse[bh * T + t0 + i] = top + std::log(sum);
      }
      const float* values = kv + ((b * T + s0) * H + h) * O + K;
      multiply({{n, V, S, rows(scores.data(), S), columns(values, H * O), out + ((b * T + t0) * H + h) * V, H * V, false, false}}, precision, 1, 0);
    }
  }
}

// dq, dkv like q and kv; d_rope (B, T, R); work (B, H, T, R).
void minga_attention_backward(const float* d_out, const float* out, const float* lse, const float* q, const float* kv,
                              const float* rope, const float* cos, const float* sin, const int64_t* segment, float* dq,
                              float* dkv, float* d_rope, float* work, int64_t B, int64_t T, int64_t H, int64_t K, int64_t R,
                              int64_t V, int64_t angles, int64_t halves, double scale, int64_t precision, int64_t threads) {
  Latent a{q, kv, rope, cos, sin, segment, B, T, H, K, R, V, angles, halves != 0, (float)scale};
  int64_t Q = K + R, O = K + V, P = R / 2;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t bh = 0; bh < B * H; bh++) {
    int64_t b = bh / H, h = bh % H;
    Head head = open_head(a, b, h);
    std::vector<float> weights(QUERIES * T), d_scores(QUERIES * T), d_q(QUERIES * Q), d_k(T * Q), d_v(T * V);
    for (int64_t t0 = 0; t0 < T; t0 += QUERIES) {
      int64_t n = std::min(QUERIES, T - t0), s0 = head.start[t0], S = t0 + n - s0;
      const float* values = kv + ((b * T + s0) * H + h) * O + K;
      const float* d = d_out + ((b * T + t0) * H + h) * V;
      multiply({{n, S, Q, rows(&head.q[t0 * Q], Q), rows(&head.k[s0 * Q], Q), weights.data(), S, false, false},
                {n, S, V, rows(d, H * V), rows(values, H * O), d_scores.data(), S, false, false}}, precision, 1, 0);
      for (int64_t i = 0; i < n; i++) {
        float *w = &weights[i * S], *ds = &d_scores[i * S], delta = 0, shift = lse[bh * T + t0 + i];
        const float* o = out + ((b * T + t0 + i) * H + h) * V;
        for (int64_t v = 0; v < V; v++) delta += d[i * H * V + v] * o[v];
        int64_t from = head.start[t0 + i] - s0, to = t0 + i + 1 - s0, s = from;
        std::memset(w, 0, from * 4);
        std::memset(ds, 0, from * 4);
        for (; s + VL <= to; s += VL) {
          vf p = exp_v(load<vf>(w + s) - shift);
          store(w + s, p);
          store(ds + s, p * (load<vf>(ds + s) - delta));
        }
        for (; s < to; s++) {
          w[s] = exp_s(w[s] - shift);
          ds[s] = w[s] * (ds[s] - delta);
        }
        std::memset(w + to, 0, (S - to) * 4);
        std::memset(ds + to, 0, (S - to) * 4);
      }
      multiply({{n, Q, S, rows(d_scores.data(), S), columns(&head.k[s0 * Q], Q), d_q.data(), Q, false, false},
                {S, Q, n, columns(d_scores.data(), S), columns(&head.q[t0 * Q], Q), &d_k[s0 * Q], Q, true, false},
                {S, V, n, columns(weights.data(), S), columns(d, H * V), &d_v[s0 * V], V, true, false}}, precision, 1, 0);
      for (int64_t i = 0; i < n; i++) {
        int64_t t = t0 + i;
        float* to = dq + ((b * T + t) * H + h) * Q;
        for (int64_t j = 0; j < K; j++) to[j] = d_q[i * Q + j] * a.scale;
        rotate_row_backward(&d_q[i * Q + K], cos + (b * angles + t) * P, sin + (b * angles + t) * P, P, a.halves, a.scale, to + K);
      }
    }
    for (int64_t t = 0; t < T; t++) {
      float* to = dkv + ((b * T + t) * H + h) * O;
      std::memcpy(to, &d_k[t * Q], K * 4);
      std::memcpy(to + K, &d_v[t * V], V * 4);
      rotate_row_backward(&d_k[t * Q + K], cos + (b * angles + t) * P, sin + (b * angles + t) * P, P, a.halves, 1.0f, work + (bh * T + t) * R);
    }
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t bt = 0; bt < B * T; bt++)
    for (int64_t r = 0; r < R; r++) {
      float sum = 0;
      for (int64_t h = 0; h < H; h++) sum += work[((bt / T * H + h) * T + bt % T) * R + r];
      d_rope[bt * R + r] = sum;
    }
}

// Cross-entropy of N rows of V logits: loss (N), nats, 0 where target < 0. With `scale` not 0 the logits become the
// gradient of scale * sum(loss).
void minga_cross_entropy(float* logits, const int64_t* target, float* loss, int64_t N, int64_t V, double scale, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < N; n++) {
    float* row = logits + n * V;
    if (target[n] < 0) {
      loss[n] = 0;
      if (scale != 0) std::memset(row, 0, V * 4);
      continue;
    }
    vf tops = splat(row[0]), sums = {};
    int64_t i = 0;
    for (; i + VL <= V; i += VL) {
      vf x = load<vf>(row + i);
      tops = x > tops ? x : tops;
    }
    float top = tops[0], sum = 0, chosen = row[target[n]];
    for (int l = 1; l < VL; l++) top = std::max(top, tops[l]);
    for (; i < V; i++) top = std::max(top, row[i]);
    for (i = 0; i + VL <= V; i += VL) {
      vf e = exp_v(load<vf>(row + i) - top);
      sums += e;
      if (scale != 0) store(row + i, e);
    }
    for (; i < V; i++) {
      float e = exp_s(row[i] - top);
      sum += e;
      if (scale != 0) row[i] = e;
    }
    sum += sum_v(sums);
    loss[n] = top + std::log(sum) - chosen;
    if (scale != 0) {
      float factor = (float)scale / sum;
      for (i = 0; i < V; i++) row[i] *= factor;
      row[target[n]] -= (float)scale;
    }
  }
}

// One step of Muon on a stack of S matrices (M, N). Momentum and weights are updated in place. With `codes` the momentum is
// kept in 8 bits instead: codes (S, M, N), the largest magnitude of each `size` numbers of a row in absmax (S, M, blocks).
void minga_muon(float* p, const float* grad, float* momentum, uint8_t* codes, float* absmax, int64_t size,
                const float* coefficients, int64_t S, int64_t M, int64_t N, double beta, double decay, double rate,
                int64_t steps, int64_t precision, int64_t threads) {
  int64_t blocks = codes ? ceil_div(N, size) : 0;
#pragma omp parallel for num_threads(S < threads ? 1 : threads) schedule(dynamic)
  for (int64_t s = 0; s < S; s++) {
    float *ps = p + s * M * N, keep = (float)(1 - decay), lr = (float)rate;
    std::vector<float> work(M * N), row(N);
    double squares = 0;
    for (int64_t i = 0; i < M; i++) {
      int64_t at = s * M + i;
      float* m = codes ? row.data() : momentum + at * N;
      if (codes) decode_row(codes + at * N, absmax + at * blocks, N, size, m);
      squares += nesterov_row(grad + at * N, N, (float)beta, m, &work[i * N]);
      if (codes) encode_row(m, N, size, codes + at * N, absmax + at * blocks);
    }
    float norm = 1.0f / ((float)std::sqrt(squares) + 1e-7f);
    for (float& x : work) x *= norm;
    newton_schulz(work.data(), coefficients, M, N, steps, precision, S < threads ? threads : 1);
    for (int64_t i = 0; i < M * N; i++) ps[i] = ps[i] * keep - lr * work[i];
  }
}

}  // extern "C"
