// A whole forward pass in one call: the engine's model, without a Python call or a torch dispatch between two products.
//
// All threads run the same function side by side. Work on products is split by rows of weights, work on attention by
// token, head and stretch of the cache; what is done a token at a time (norms, routing, rounding) is done by every thread
// for itself when there is one token, which costs less than waiting, and split otherwise. Every result depends on its own
// token and its own sequence's cache alone, in an order of sums that nothing else changes: not the batch, not the threads.
//
//   N tokens of this call, D model dim, H heads, W width of a cache row, P rotated pairs, E experts, A active ones

#include "panels.h"

#include <array>
#include <atomic>
#include <memory>
#include <thread>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <malloc.h>
#include <sched.h>
#include <sys/mman.h>
#endif

using namespace minga;

namespace {

constexpr int64_t PAGE = 64;         // rows of a page of the cache; its softmax is taken on its own, then joined with the others
constexpr int64_t CACHE_BLOCK = 64;  // numbers of a cache row in int8 that share a scale; both are in minga/model/cache.py too
constexpr int HEADS = 4;          // that read a cache row together

enum Attention : int64_t { LATENT = 0, GROUPED = 1 };
enum CacheKind : int64_t { CACHE_FLOAT32 = 0, CACHE_FLOAT16 = 1, CACHE_INT8 = 2 };

}  // namespace

extern "C" {

// Mirrored in net.py, field by field.
struct MingaLayer {
  int64_t attention, experts;  // experts: 0 dense
  const float *input_norm, *post_norm;
  Matrix q_a, q, kv, uk, uv, k, v, o;  // latent: kv is [latent | rope], uk and uv a matrix a head; grouped: k and v
  const float *q_a_norm, *latent_norm, *q_norm, *k_norm;
  Matrix gate, up, down;  // dense, or the shared expert
  Matrix router;
  const float* router_bias;
  Matrix expert_gate_up, expert_down;
};

struct MingaNet {
  int64_t D, H, G, K, R, V, C;  // G key heads; K nope or head dim; R rotated dims; V value dim; C latent
  int64_t halves;               // how rotated dimensions are paired
  int64_t A, active_width;      // experts a token; hidden width of one
  int64_t softmax, noaux, groups, kept_groups, normalise;
  double routed_scale, attention_scale, eps;
  int64_t num_layers;
  const MingaLayer* layers;  // the main model's, then the MTP modules'
  Matrix embed, head;
  const float* norm;
  Matrix eh_proj;  // of the first MTP module
  const float *enorm, *hnorm, *mtp_norm;
};

// One call. `slots`: the cache's first page in the first layer; strides in bytes.
struct MingaCall {
  int64_t N, threads, mtp;
  const int64_t *ids, *positions;  // (N)
  const int64_t* sequence;         // (N) rows of `tables`
  const int64_t* tables;           // (sequences, table_width): where the pages of each are
  int64_t table_width;
  uint8_t* slots;
  int64_t cached, layer_stride, page_stride, row_stride, width;  // cached: as what, a CacheKind; width: numbers of a row
  const float *cos, *sin;  // (positions, P)
  const float* hidden;     // (N, D), for MTP
  float* out;              // (N, D), after the last norm
  float* logits;           // (number of wanted, rows of the head), or null
  const int64_t* wanted;   // tokens of which logits are wanted; null: all
  int64_t num_wanted;
};

// How a sequence draws its tokens: minga/engine/sampler.py.
struct MingaSampling {
  double temperature, top_p, min_p;
  int64_t top_k, seed;
};

}  // extern "C"

namespace {

// ------------------------------------------------------------------------------------------------------ threads

#if defined(_OPENMP)
int thread_here() { return omp_get_thread_num(); }
int threads_here() { return omp_get_num_threads(); }
#else
int thread_here() { return 0; }
int threads_here() { return 1; }
#endif

// Where a thread runs. Linux wakes a thread on the core of whoever woke it and looks for a better one only from time to time:
// two threads that wait for each other then share a core for tens of milliseconds while another is idle.
int core_here() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Has this thread go to a core that is none of `taken`, if it may run on one.
void leave_core(const std::atomic<int>* taken, int num) {
#if defined(__linux__)
  cpu_set_t allowed, rest;
  if (sched_getaffinity(0, sizeof allowed, &allowed)) return;
  rest = allowed;
  for (int t = 0; t < num; t++) {
    int core = taken[t].load(std::memory_order_relaxed);
    if (core >= 0 && core < CPU_SETSIZE) CPU_CLR(core, &rest);
  }
  if (!CPU_COUNT(&rest) || sched_setaffinity(0, sizeof rest, &rest)) return;
  sched_setaffinity(0, sizeof allowed, &allowed);
#endif
}

struct Team {
  static constexpr int MOST = 64;  // threads of which it is known where they run
  int threads;
  std::atomic<int> arrived{0};
  std::atomic<int> turn{0};
  std::array<std::atomic<int>, MOST> cores;

  explicit Team(int threads) : threads(threads) {
    for (auto& core : cores) core.store(-1, std::memory_order_relaxed);
  }

  // A thread comes; those that stay where another one runs already go elsewhere.
  void join(int t) {
    if (threads == 1 || t >= MOST) return;
    int here = core_here();
    for (int other = 0; here >= 0 && other < std::min(threads, MOST); other++) {
      if (other != t && cores[other].load(std::memory_order_relaxed) == here) {
        leave_core(cores.data(), std::min(threads, MOST));
        here = core_here();
        break;
      }
    }
    cores[t].store(here, std::memory_order_relaxed);
  }

  void wait() {
    if (threads == 1) return;
    int now = turn.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived.store(0, std::memory_order_relaxed);
      turn.store(now + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn.load(std::memory_order_acquire) == now; spins++) {
      if (spins < 1 << 12) {
#if defined(__x86_64__)
        _mm_pause();
#endif
      } else {
        std::this_thread::yield();  // another program has the core that we wait for
      }
    }
  }
};

// Memory that grows and is kept: 64-byte aligned pieces of one block.
struct Arena {
  std::unique_ptr<char[]> data;
  size_t size = 0, wanted = 0;

  void begin() {
    if (wanted > size) {
      size = wanted + wanted / 4;
      data.reset(new char[size + 64]);
    }
    wanted = 0;
  }
  template <class T>
  T* take(int64_t n) {
    size_t bytes = ((size_t)n * sizeof(T) + 63) / 64 * 64, at = wanted;
    wanted += bytes;
    if (wanted > size) return nullptr;  // `begin` comes again
    char* base = (char*)(((uintptr_t)data.get() + 63) / 64 * 64);
    return (T*)(base + at);
  }
  bool fits() const { return wanted <= size; }
};

// ------------------------------------------------------------------------------------------------------ pieces

void rms_norm(const float* x, const float* weight, int64_t n, double eps, float* to) {
  vf sums = {};
  int64_t i = 0;
  for (; i + VL <= n; i += VL) {
    vf v = load<vf>(x + i);
    sums += v * v;
  }
  float total = sum_v(sums);
  for (; i < n; i++) total += x[i] * x[i];
  float factor = 1.0f / std::sqrt(total / (float)n + (float)eps);
  for (i = 0; i + VL <= n; i += VL) store(to + i, load<vf>(x + i) * factor * load<vf>(weight + i));
  for (; i < n; i++) to[i] = x[i] * factor * weight[i];
}

// lane i of the result: the sum of the lanes of v[i]
inline void sum_each(const vf* v, float* to) {
#if defined(__AVX512F__)
  __m512 a[8], b[4];
  for (int i = 0; i < 8; i++) {
    __m512 x = (__m512)v[2 * i], y = (__m512)v[2 * i + 1];
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  }
  for (int i = 0; i < 4; i++)
    b[i] = _mm512_add_ps(_mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44), _mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0xee));
  for (int i = 0; i < 2; i++)
    a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88), _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
  _mm512_storeu_ps(to, _mm512_add_ps(_mm512_shuffle_f32x4(a[0], a[1], 0x88), _mm512_shuffle_f32x4(a[0], a[1], 0xdd)));
#else
  for (int i = 0; i < 16; i++) to[i] = sum_v(v[i]);
#endif
}

// ------------------------------------------------------------------------------------------------------ attention

inline vf load_number(const float* p) { return load<vf>(p); }
inline vf load_number(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__) && defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf v;
  for (int l = 0; l < VL; l++) v[l] = half_to_float(p[l]);
  return v;
#endif
}
inline float number(float x) { return x; }
inline float number(uint16_t x) { return half_to_float(x); }

// A cache row in int8: its numbers, then a float16 scale for each CACHE_BLOCK of them, as ops.quantize_int8 has it.
inline void keep_int8(const float* x, int64_t width, uint8_t* to) {
  int8_t* q = (int8_t*)to;
  for (int64_t from = 0, b = 0; from < width; from += CACHE_BLOCK, b++) {
    int64_t n = std::min(CACHE_BLOCK, width - from);
    float exact = largest_magnitude(x + from, n) / 127.0f;
    uint16_t half = float_to_half(std::min(exact, 65504.0f));
    if (half_to_float(half) < exact && half < 0x7bff) half++;  // rounded up, so that nothing leaves the range
    float scale = std::max(half_to_float(half), 1e-12f);
    for (int64_t j = 0; j < n; j++) q[from + j] = (int8_t)std::lrintf(std::min(127.0f, std::max(-127.0f, x[from + j] / scale)));
    store(to + width + 2 * b, half);
  }
}

inline void widen_int8(const uint8_t* row, int64_t width, float* to) {
  const int8_t* q = (const int8_t*)row;
  for (int64_t from = 0, b = 0; from < width; from += CACHE_BLOCK, b++) {
    float scale = half_to_float(load<uint16_t>(row + width + 2 * b));
    int64_t end = std::min(width, from + CACHE_BLOCK), j = from;
#if defined(__AVX512F__)
    for (; j + 16 <= end; j += 16) {
      __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(q + j)));
      _mm512_storeu_ps(to + j, _mm512_mul_ps(_mm512_cvtepi32_ps(wide), _mm512_set1_ps(scale)));
    }
#endif
    for (; j < end; j++) to[j] = (float)q[j] * scale;
  }
}

// Up to HEADS queries that look at the same keys.
template <class T>
struct Stretch {
  const float* q[HEADS];
  const T *keys, *values;  // rows of `width` numbers
  int64_t width, key_width, value_width, rows;
};

// Softmax over at most PAGE rows, unnormalised: for each head the largest score, the sum, the weighted values.
template <int NH, class T>
void attend_stretch(const Stretch<T>& a, float* top, float* sum, float* const* out) {
  alignas(64) float score[NH][PAGE];
  for (int64_t s = 0; s < a.rows; s += 4) {
    const T* key[4];
    for (int r = 0; r < 4; r++) key[r] = a.keys + std::min(a.rows - 1, s + r) * a.width;
    vf acc[HEADS * 4] = {};
    int64_t j = 0;
    for (; j + VL <= a.key_width; j += VL) {
      vf k[4];
      for (int r = 0; r < 4; r++) {
        k[r] = load_number(key[r] + j);
        __builtin_prefetch(key[r] + j + 12 * a.width);
      }
      for (int h = 0; h < NH; h++) {
        vf q = load<vf>(a.q[h] + j);
        for (int r = 0; r < 4; r++) acc[h * 4 + r] += q * k[r];
      }
    }
    alignas(64) float total[HEADS * 4];
    sum_each(acc, total);
    for (; j < a.key_width; j++)
      for (int h = 0; h < NH; h++)
        for (int r = 0; r < 4; r++) total[h * 4 + r] += a.q[h][j] * number(key[r][j]);
    for (int h = 0; h < NH; h++)
      for (int r = 0; r < 4; r++) score[h][s + r] = total[h * 4 + r];
  }
  int64_t whole = ceil_div(a.rows, VL) * VL;
  for (int h = 0; h < NH; h++) {
    for (int64_t s = a.rows; s < whole; s++) score[h][s] = -INFINITY;
    vf tops = load<vf>(&score[h][0]), sums = {};
    for (int64_t s = VL; s < whole; s += VL) {
      vf v = load<vf>(&score[h][s]);
      tops = v > tops ? v : tops;
    }
    float m = tops[0];
    for (int i = 1; i < VL; i++) m = std::max(m, tops[i]);
    for (int64_t s = 0; s < whole; s += VL) store(&score[h][s], exp_v(load<vf>(&score[h][s]) - m));
    for (int64_t s = a.rows; s < whole; s++) score[h][s] = 0;
    for (int64_t s = 0; s < whole; s += VL) sums += load<vf>(&score[h][s]);
    top[h] = m;
    sum[h] = sum_v(sums);
  }
  int64_t j = 0;
  for (; j + 4 * VL <= a.value_width; j += 4 * VL) {
    vf acc[NH][4] = {};
    for (int64_t s = 0; s < a.rows; s++) {
      vf v[4];
      for (int i = 0; i < 4; i++) v[i] = load_number(a.values + s * a.width + j + i * VL);
      for (int h = 0; h < NH; h++) {
        vf p = splat(score[h][s]);
        for (int i = 0; i < 4; i++) acc[h][i] += p * v[i];
      }
    }
    for (int h = 0; h < NH; h++)
      for (int i = 0; i < 4; i++) store(out[h] + j + i * VL, acc[h][i]);
  }
  for (; j + VL <= a.value_width; j += VL) {
    vf acc[NH] = {};
    for (int64_t s = 0; s < a.rows; s++) {
      vf v = load_number(a.values + s * a.width + j);
      for (int h = 0; h < NH; h++) acc[h] += splat(score[h][s]) * v;
    }
    for (int h = 0; h < NH; h++) store(out[h] + j, acc[h]);
  }
  for (; j < a.value_width; j++)
    for (int h = 0; h < NH; h++) {
      float total = 0;
      for (int64_t s = 0; s < a.rows; s++) total += score[h][s] * number(a.values[s * a.width + j]);
      out[h][j] = total;
    }
}

// (top, sum, out) of the stretches before and `next` of the one after them become one.
void join(float* top, float* sum, float* out, float next_top, float next_sum, const float* next, int64_t n) {
  float m = std::max(*top, next_top), before = exp_s(*top - m), after = exp_s(next_top - m);
  for (int64_t i = 0; i < n; i++) out[i] = out[i] * before + next[i] * after;
  *sum = *sum * before + next_sum * after;
  *top = m;
}

// ------------------------------------------------------------------------------------------------------ one call

// A product that is one of several done together: tokens `from[i]` of `x` times matrix `number`, into rows `to[i]` of out.
struct Job {
  const Matrix* m;
  int64_t number;
  Rows* x;
  const int32_t *from, *to;
  int64_t count;
  float* out;
  int64_t stride;

  int64_t units() const { return m->panels(); }
  // of a unit: reading it, then using it
  double cost() const { return (double)(m->is_float() ? PANEL * m->row_bytes() : m->panel_bytes()) * (1.0 + 0.1 * (double)count); }
};

// What each thread has for itself when there is one token, and all share otherwise.
struct Own {
  float *stream, *scores, *weight;
  int64_t* chosen;
  Rows normed, q_a, absorbed, context, attended, act, shared_act, joined, last;
};

// All that is multiplied with one input. They may be stored in different kinds.
using Readers = std::array<const Matrix*, 5>;
Readers of_attention(const MingaLayer& L) { return {&L.kv, L.q_a.kind == NONE ? &L.q : &L.q_a, &L.k, &L.v}; }
Readers of_feed_forward(const MingaLayer& L) { return {&L.expert_gate_up, &L.gate, &L.up, &L.router}; }

using Blocks = std::array<int64_t, ROUNDINGS>;  // of each rounding that an input needs; 0: it needs it not
void add_blocks(Blocks& to, const Readers& readers) {
  for (const Matrix* m : readers)
    if (m && m->is_rounded()) to[m->rounding()] = m->block;
}
Blocks blocks_of(const Matrix& m) {
  Blocks result = {};
  add_blocks(result, {&m});
  return result;
}

class Forward {
 public:
  Forward(const MingaNet& net, const MingaCall& call, Team& team)
      : n_(net), c_(call), team_(team), N_(call.N), solo_(call.N == 1 && team.threads > 1) {
    own_.resize(solo_ ? team.threads : 1);
    held_.resize(team.threads);
    for (int64_t i = 0; i < N_; i++) identity_.push_back((int32_t)i);
    for (int64_t h = 0; h < net.H; h++)
      for (int64_t i = 0; i < N_; i++) by_head_.push_back((int32_t)(i * net.H + h));
    for (int64_t i = 0; i < N_; i++) pages_ = std::max(pages_, call.positions[i] / PAGE + 1);
  }
  void lay_out(Arena& arena);
  void run(int t);

 private:
  const MingaLayer& layer(int64_t l) const { return n_.layers[l]; }
  bool latent() const { return layer(first_layer()).attention == LATENT; }
  int64_t first_layer() const { return c_.mtp ? n_.num_layers : 0; }
  int64_t last_layer() const { return c_.mtp ? n_.num_layers + 1 : n_.num_layers; }
  int64_t num_logits() const { return c_.wanted ? c_.num_wanted : N_; }
  bool writes(int t) const { return !solo_ || t == 0; }  // to what all threads read
  uint8_t* place(int64_t l, int64_t i, int64_t position) const {
    int64_t page = c_.tables[c_.sequence[i] * c_.table_width + position / PAGE];
    return c_.slots + l * c_.layer_stride + page * c_.page_stride + position % PAGE * c_.row_stride;
  }
  void keep(int64_t l, int64_t i, const float* row) const;
  template <class F>
  Blocks blocks(F readers) const;

  // f(i) for all rows: by every thread for itself, or split, with a wait at the end.
  template <class F>
  void each(int t, int64_t n, F f) {
    int64_t from = solo_ ? 0 : n * t / team_.threads, to = solo_ ? n : n * (t + 1) / team_.threads;
    for (int64_t i = from; i < to; i++) f(i);
    if (!solo_) team_.wait();
  }
  // Once for each way in which the readers want it.
  static void round(Rows& r, int64_t i, const Readers& readers) {
    bool done[ROUNDINGS] = {};
    for (const Matrix* m : readers) {
      if (!m || !m->is_rounded() || done[m->rounding()]) continue;
      round_row(r, i, m->rounding());
      done[m->rounding()] = true;
    }
  }
  static void round(Rows& r, int64_t i, const Matrix& m) { round(r, i, Readers{&m}); }
  void products(int t, const std::vector<Job>& jobs);
  void attention(int t, Own& me, int64_t l);
  template <class T>
  void attend(int t, int64_t l, T);
  void attend(int t, int64_t l) { c_.cached == CACHE_FLOAT16 ? attend(t, l, uint16_t{}) : attend(t, l, float{}); }
  const float* widened(int t, const uint8_t* page, int64_t rows);
  void feed_forward(int t, Own& me, const MingaLayer& L);
  void choose(Own& me, int64_t i, const MingaLayer& L);

  const MingaNet& n_;
  const MingaCall& c_;
  Team& team_;
  int64_t N_, pages_ = 1;
  bool solo_;
  std::vector<Own> own_;
  std::vector<int32_t> identity_, by_head_;
  // written by `products` and `attend`, read by all
  float *q_a_, *query_, *kv_, *k_, *v_, *latent_query_, *context_, *attended_, *projected_;
  float *kept_, *dense_, *logits_, *gate_up_, *down_, *top_, *sum_, *partial_, *wide_;
  std::vector<std::pair<const uint8_t*, int64_t>> held_;  // what each thread's part of wide_ holds: a page, its first rows
};

Rows make_rows(Arena& arena, int64_t n, int64_t width, const Blocks& blocks, bool has_x = true) {
  Rows r;
  for (int how = 0; how < ROUNDINGS; how++) r.rounded[how].block = blocks[how];
  r.set_width(width);
  if (has_x) r.x = arena.take<float>(n * width);
  for (Rounded& to : r.rounded) {
    if (!to.block) continue;
    to.q = arena.take<int8_t>(n * to.padded);
    to.scale = arena.take<float>(n * to.blocks);
    to.sum = arena.take<int32_t>(n * to.sums);
    to.shift = arena.take<float>(n * to.blocks);
  }
  return r;
}

// Of all layers, where readers(layer) are those of one.
template <class F>
Blocks Forward::blocks(F readers) const {
  Blocks result = {};
  for (int64_t l = first_layer(); l < last_layer(); l++) add_blocks(result, readers(layer(l)));
  return result;
}

void Forward::lay_out(Arena& arena) {
  auto most = [&](auto of) {
    int64_t result = 0;
    for (int64_t l = first_layer(); l < last_layer(); l++) result = std::max(result, (int64_t)of(layer(l)));
    return result;
  };
  int64_t D = n_.D, H = n_.H, E = most([](const MingaLayer& L) { return L.experts; });
  int64_t hidden = most([](const MingaLayer& L) { return L.gate.rows; });
  int64_t W = n_.C + n_.R, key_width = latent() ? W : n_.K, value_width = latent() ? n_.C : n_.V;
  for (Own& o : own_) {
    o.stream = arena.take<float>(N_ * D);
    o.scores = arena.take<float>(N_ * E);
    o.weight = arena.take<float>(N_ * n_.A);
    o.chosen = arena.take<int64_t>(N_ * n_.A);
    Blocks normed = blocks(of_attention);
    for (int64_t l = first_layer(); l < last_layer(); l++) add_blocks(normed, of_feed_forward(layer(l)));
    o.normed = make_rows(arena, N_, D, normed);
    if (latent()) {
      int64_t width = most([](const MingaLayer& L) { return L.q.cols; });
      o.q_a = make_rows(arena, N_, width, blocks([](const MingaLayer& L) { return Readers{&L.q}; }));
      o.absorbed = make_rows(arena, N_ * H, n_.K, blocks([](const MingaLayer& L) { return Readers{&L.uk}; }));
      o.context = make_rows(arena, N_ * H, n_.C, blocks([](const MingaLayer& L) { return Readers{&L.uv}; }), false);
    }
    o.attended = make_rows(arena, N_, H * n_.V, blocks([](const MingaLayer& L) { return Readers{&L.o}; }), false);
    if (E) o.act = make_rows(arena, N_ * n_.A, n_.active_width, blocks([](const MingaLayer& L) { return Readers{&L.expert_down}; }));
    if (hidden) o.shared_act = make_rows(arena, N_, hidden, blocks([](const MingaLayer& L) { return Readers{&L.down}; }));
    if (c_.mtp) o.joined = make_rows(arena, N_, 2 * D, blocks_of(n_.eh_proj));
    if (c_.logits) o.last = make_rows(arena, num_logits(), D, blocks_of(n_.head));
  }
  q_a_ = arena.take<float>(N_ * most([](const MingaLayer& L) { return L.q_a.rows; }));
  query_ = arena.take<float>(N_ * H * (n_.K + (latent() ? n_.R : 0)));
  kv_ = arena.take<float>(N_ * W);
  k_ = arena.take<float>(N_ * n_.G * n_.K);
  v_ = arena.take<float>(N_ * n_.G * n_.V);
  latent_query_ = arena.take<float>(N_ * H * key_width);
  context_ = arena.take<float>(N_ * H * value_width);
  attended_ = latent() ? arena.take<float>(N_ * H * n_.V) : context_;
  projected_ = arena.take<float>(N_ * D);
  kept_ = arena.take<float>(N_ * c_.width);
  dense_ = arena.take<float>(N_ * 2 * hidden);
  logits_ = arena.take<float>(N_ * E);
  gate_up_ = arena.take<float>(N_ * n_.A * 2 * n_.active_width);
  down_ = arena.take<float>(N_ * n_.A * D);
  top_ = arena.take<float>(N_ * H * pages_);
  sum_ = arena.take<float>(N_ * H * pages_);
  partial_ = arena.take<float>(N_ * H * pages_ * value_width);
  wide_ = arena.take<float>(c_.cached == CACHE_INT8 ? team_.threads * PAGE * c_.width : 0);
}

void Forward::products(int t, const std::vector<Job>& jobs) {
  double total = 0;
  for (const Job& job : jobs) total += job.cost() * (double)job.units();
  double from = total * t / team_.threads, to = total * (t + 1) / team_.threads, at = 0;
  std::vector<float*> out;
  for (const Job& job : jobs) {
    int64_t units = job.units();
    auto unit = [&](double bound) { return std::max<int64_t>(0, std::min<int64_t>(units, (int64_t)std::ceil((bound - at) / job.cost()))); };
    int64_t u0 = unit(from), u1 = t + 1 == team_.threads ? units : unit(to);
    at += job.cost() * (double)units;
    if (u0 >= u1 || !job.count) continue;
    out.resize(job.count);
    for (int64_t i = 0; i < job.count; i++) out[i] = job.out + job.to[i] * job.stride;
    product(*job.m, job.number, u0, u1, *job.x, job.from, job.count, out.data());
  }
  team_.wait();
}

void Forward::run(int t) {
  Own& me = own_[solo_ ? t : 0];
  int64_t D = n_.D;
  const int32_t* all = identity_.data();
  if (c_.mtp) {
    each(t, N_, [&](int64_t i) {
      float* row = me.joined.row(i);
      read_row(n_.embed, c_.ids[i], row + D);
      rms_norm(row + D, n_.enorm, D, n_.eps, row);
      rms_norm(c_.hidden + i * D, n_.hnorm, D, n_.eps, row + D);
      round(me.joined, i, n_.eh_proj);
    });
    products(t, {{&n_.eh_proj, 0, &me.joined, all, all, N_, projected_, D}});
    each(t, N_, [&](int64_t i) { std::memcpy(me.stream + i * D, projected_ + i * D, (size_t)D * 4); });
  } else {
    each(t, N_, [&](int64_t i) { read_row(n_.embed, c_.ids[i], me.stream + i * D); });
  }
  for (int64_t l = first_layer(); l < last_layer(); l++) {
    attention(t, me, l);
    feed_forward(t, me, layer(l));
  }
  const float* norm = c_.mtp ? n_.mtp_norm : n_.norm;
  if (writes(t)) each(t, N_, [&](int64_t i) { rms_norm(me.stream + i * D, norm, D, n_.eps, c_.out + i * D); });
  if (!c_.logits) return;
  each(t, num_logits(), [&](int64_t i) {
    rms_norm(me.stream + (c_.wanted ? c_.wanted[i] : i) * D, norm, D, n_.eps, me.last.row(i));
    round(me.last, i, n_.head);
  });
  products(t, {{&n_.head, 0, &me.last, all, all, num_logits(), c_.logits, n_.head.rows}});
}

void Forward::attention(int t, Own& me, int64_t l) {
  const MingaLayer& L = layer(l);
  int64_t D = n_.D, H = n_.H, K = n_.K, R = n_.R, V = n_.V, C = n_.C, G = n_.G;
  const int32_t* all = identity_.data();
  each(t, N_, [&](int64_t i) {
    rms_norm(me.stream + i * D, L.input_norm, D, n_.eps, me.normed.row(i));
    round(me.normed, i, of_attention(L));
  });
  if (L.attention == LATENT) {
    bool two_steps = L.q_a.kind != NONE;
    Job kv = {&L.kv, 0, &me.normed, all, all, N_, kv_, C + R};
    if (two_steps) {
      products(t, {{&L.q_a, 0, &me.normed, all, all, N_, q_a_, L.q_a.rows}, kv});
      each(t, N_, [&](int64_t i) {
        rms_norm(q_a_ + i * L.q_a.rows, L.q_a_norm, L.q_a.rows, 1e-6, me.q_a.row(i));
        round(me.q_a, i, L.q);
      });
      products(t, {{&L.q, 0, &me.q_a, all, all, N_, query_, H * (K + R)}});
    } else {
      products(t, {{&L.q, 0, &me.normed, all, all, N_, query_, H * (K + R)}, kv});
    }
    each(t, N_, [&](int64_t i) {
      const float *cos = c_.cos + c_.positions[i] * R / 2, *sin = c_.sin + c_.positions[i] * R / 2;
      for (int64_t h = 0; h < H; h++) {
        const float* q = query_ + (i * H + h) * (K + R);
        float* nope = me.absorbed.row(i * H + h);
        for (int64_t k = 0; k < K; k++) nope[k] = q[k] * (float)n_.attention_scale;
        round(me.absorbed, i * H + h, L.uk);
        if (writes(t)) {
          rotate_row(q + K, cos, sin, R / 2, n_.halves, (float)n_.attention_scale, latent_query_ + (i * H + h) * (C + R) + C);
        }
      }
      if (writes(t)) {
        float* row = kept_ + i * c_.width;
        rms_norm(kv_ + i * (C + R), L.latent_norm, C, 1e-6, row);
        rotate_row(kv_ + i * (C + R) + C, cos, sin, R / 2, n_.halves, 1.0f, row + C);
        keep(l, i, row);
      }
    });
    std::vector<Job> jobs;
    for (int64_t h = 0; h < H; h++)
      jobs.push_back({&L.uk, h, &me.absorbed, &by_head_[h * N_], &by_head_[h * N_], N_, latent_query_, C + R});
    products(t, jobs);
    attend(t, l);
    me.context.x = context_;
    each(t, N_, [&](int64_t i) {
      for (int64_t h = 0; h < H; h++) round(me.context, i * H + h, L.uv);
    });
    jobs.clear();
    for (int64_t h = 0; h < H; h++) jobs.push_back({&L.uv, h, &me.context, &by_head_[h * N_], all, N_, attended_ + h * V, H * V});
    products(t, jobs);
  } else {
    products(t, {{&L.q, 0, &me.normed, all, all, N_, query_, H * K},
                 {&L.k, 0, &me.normed, all, all, N_, k_, G * K},
                 {&L.v, 0, &me.normed, all, all, N_, v_, G * V}});
    if (writes(t))
      each(t, N_, [&](int64_t i) {
        const float *cos = c_.cos + c_.positions[i] * K / 2, *sin = c_.sin + c_.positions[i] * K / 2;
        for (int64_t h = 0; h < H; h++) {
          float* q = query_ + (i * H + h) * K;
          if (L.q_norm) rms_norm(q, L.q_norm, K, n_.eps, q);
          rotate_row(q, cos, sin, K / 2, n_.halves, (float)n_.attention_scale, latent_query_ + (i * H + h) * K);
        }
        float* row = kept_ + i * c_.width;
        for (int64_t g = 0; g < G; g++) {
          float* k = k_ + (i * G + g) * K;
          if (L.k_norm) rms_norm(k, L.k_norm, K, n_.eps, k);
          rotate_row(k, cos, sin, K / 2, n_.halves, 1.0f, row + g * K);
        }
        std::memcpy(row + G * K, v_ + i * G * V, (size_t)(G * V) * 4);
        keep(l, i, row);
      });
    if (solo_) team_.wait();
    attend(t, l);
  }
  me.attended.x = attended_;
  each(t, N_, [&](int64_t i) { round(me.attended, i, L.o); });
  products(t, {{&L.o, 0, &me.attended, all, all, N_, projected_, D}});
}

// A token's row of the cache.
void Forward::keep(int64_t l, int64_t i, const float* row) const {
  uint8_t* to = place(l, i, c_.positions[i]);
  if (c_.cached == CACHE_FLOAT32) std::memcpy(to, row, (size_t)c_.width * 4);
  if (c_.cached == CACHE_FLOAT16) {
    int64_t j = 0;
#if defined(__AVX512F__)
    for (; j + 16 <= c_.width; j += 16) _mm256_storeu_si256((__m256i*)(to + 2 * j), _mm512_cvtps_ph(_mm512_loadu_ps(row + j), 0));
#endif
    for (; j < c_.width; j++) store(to + 2 * j, float_to_half(row[j]));
  }
  if (c_.cached == CACHE_INT8) keep_int8(row, c_.width, to);
}

// A page of the cache in int8 as floats, in this thread's own memory.
const float* Forward::widened(int t, const uint8_t* page, int64_t rows) {
  float* to = wide_ + t * PAGE * c_.width;
  auto& [held, num] = held_[t];
  if (held != page) held = page, num = 0;
  for (; num < rows; num++) widen_int8(page + num * c_.row_stride, c_.width, to + num * c_.width);
  return to;
}

// latent_query_ and the cache -> context_. A unit of work is a token, a group of heads with the same keys, a page of the
// cache and at most HEADS of those heads; a thread takes units that follow each other, so it reads a page once for all.
template <class T>
void Forward::attend(int t, int64_t l, T) {
  bool latent = layer(l).attention == LATENT;
  int64_t groups = latent ? 1 : n_.G, heads = n_.H / groups, tiles = ceil_div(heads, HEADS), tile = ceil_div(heads, tiles);
  int64_t key_width = latent ? n_.C + n_.R : n_.K, value_width = latent ? n_.C : n_.V;
  int64_t units = N_ * groups * pages_ * tiles, from = units * t / team_.threads, to = units * (t + 1) / team_.threads;
  held_[t].first = nullptr;  // the layer before left another page there
  for (int64_t unit = from; unit < to; unit++) {
    int64_t s = unit / tiles % pages_, g = unit / tiles / pages_ % groups, i = unit / tiles / pages_ / groups;
    int64_t first = unit % tiles * tile, n = std::min(tile, heads - first), length = c_.positions[i] + 1;
    if (s * PAGE >= length || n <= 0) continue;
    const uint8_t* page = place(l, i, s * PAGE);
    Stretch<T> a;
    float* out[HEADS];
    int64_t head = i * n_.H + g * heads + first, at = head * pages_ + s;
    for (int64_t h = 0; h < n; h++) {
      a.q[h] = latent_query_ + (head + h) * key_width;
      out[h] = partial_ + (at + h * pages_) * value_width;
    }
    a.rows = std::min(PAGE, length - s * PAGE);
    const T* base = c_.cached == CACHE_INT8 ? (const T*)widened(t, page, a.rows) : (const T*)page;
    a.keys = base + (latent ? 0 : g * n_.K);
    a.values = base + (latent ? 0 : n_.G * n_.K + g * n_.V);
    a.width = c_.width, a.key_width = key_width, a.value_width = value_width;
    float top[HEADS], sum[HEADS];
    if (n == 1) attend_stretch<1>(a, top, sum, out);
    if (n == 2) attend_stretch<2>(a, top, sum, out);
    if (n == 3) attend_stretch<3>(a, top, sum, out);
    if (n == 4) attend_stretch<4>(a, top, sum, out);
    for (int64_t h = 0; h < n; h++) top_[at + h * pages_] = top[h], sum_[at + h * pages_] = sum[h];
  }
  team_.wait();
  for (int64_t head = t; head < N_ * n_.H; head += team_.threads) {
    int64_t count = c_.positions[head / n_.H] / PAGE + 1, at = head * pages_;
    const float* part = partial_ + at * value_width;
    float *out = context_ + head * value_width, top = top_[at], sum = sum_[at];
    std::memcpy(out, part, (size_t)value_width * 4);
    for (int64_t s = 1; s < count; s++) join(&top, &sum, out, top_[at + s], sum_[at + s], part + s * value_width, value_width);
    for (int64_t j = 0; j < value_width; j++) out[j] /= sum;
  }
  team_.wait();
}

void Forward::feed_forward(int t, Own& me, const MingaLayer& L) {
  int64_t D = n_.D, A = n_.A, F = n_.active_width, S = L.gate.rows, E = L.experts;
  const int32_t* all = identity_.data();
  each(t, N_, [&](int64_t i) {
    float* x = me.stream + i * D;
    for (int64_t d = 0; d < D; d++) x[d] += projected_[i * D + d];
    rms_norm(x, L.post_norm, D, n_.eps, me.normed.row(i));
    round(me.normed, i, of_feed_forward(L));
  });
  std::vector<Job> jobs;
  if (S) {
    jobs.push_back({&L.gate, 0, &me.normed, all, all, N_, dense_, 2 * S});
    jobs.push_back({&L.up, 0, &me.normed, all, all, N_, dense_ + S, 2 * S});
  }
  if (E) jobs.push_back({&L.router, 0, &me.normed, all, all, N_, logits_, E});
  products(t, jobs);
  jobs.clear();
  std::vector<int32_t> token, place;
  std::vector<int64_t> start(E + 1, 0);
  if (E) {
    each(t, N_, [&](int64_t i) { choose(me, i, L); });
    for (int64_t j = 0; j < N_ * A; j++) start[me.chosen[j] + 1]++;
    for (int64_t e = 0; e < E; e++) start[e + 1] += start[e];
    token.resize(N_ * A), place.resize(N_ * A);
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t j = 0; j < N_ * A; j++) {
      int64_t at = next[me.chosen[j]]++;
      token[at] = (int32_t)(j / A), place[at] = (int32_t)j;
    }
    for (int64_t e = 0; e < E; e++)
      if (start[e + 1] > start[e])
        jobs.push_back({&L.expert_gate_up, e, &me.normed, &token[start[e]], &place[start[e]], start[e + 1] - start[e], gate_up_, 2 * F});
    products(t, jobs);
    jobs.clear();
  }
  auto activate = [&](Rows& act, int64_t row, const float* gate_up, int64_t width, const Matrix& down) {
    swiglu_row(gate_up, width, 1.0f, act.row(row));
    round(act, row, down);
  };
  me.shared_act.set_width(S);  // dense layers are wider than shared experts
  each(t, N_, [&](int64_t i) {
    if (S) activate(me.shared_act, i, dense_ + i * 2 * S, S, L.down);
    for (int64_t a = 0; E && a < A; a++) activate(me.act, i * A + a, gate_up_ + (i * A + a) * 2 * F, F, L.expert_down);
  });
  if (S) jobs.push_back({&L.down, 0, &me.shared_act, all, all, N_, projected_, D});
  for (int64_t e = 0; e < E; e++)
    if (start[e + 1] > start[e])
      jobs.push_back({&L.expert_down, e, &me.act, &place[start[e]], &place[start[e]], start[e + 1] - start[e], down_, D});
  products(t, jobs);
  each(t, N_, [&](int64_t i) {
    float* x = me.stream + i * D;
    for (int64_t d = 0; S && d < D; d++) x[d] += projected_[i * D + d];
    for (int64_t a = 0; E && a < A; a++) {
      float w = me.weight[i * A + a];
      const float* y = down_ + (i * A + a) * D;
      for (int64_t d = 0; d < D; d++) x[d] += w * y[d];
    }
  });
}

// `minga/model/experts.py` Router, for one token.
void Forward::choose(Own& me, int64_t i, const MingaLayer& L) {
  const float* bias = L.router_bias;
  int64_t E = L.experts, A = n_.A;
  float *score = me.scores + i * E, *logit = logits_ + i * E;
  if (n_.softmax) {
    float top = *std::max_element(logit, logit + E), sum = 0;
    for (int64_t e = 0; e < E; e++) sum += score[e] = std::exp(logit[e] - top);
    for (int64_t e = 0; e < E; e++) score[e] /= sum;
  } else {
    for (int64_t e = 0; e < E; e++) score[e] = 1.0f / (1.0f + std::exp(-logit[e]));
  }
  std::vector<float> rank(E);
  for (int64_t e = 0; e < E; e++) rank[e] = score[e] + (bias ? bias[e] : 0.0f);
  if (n_.groups > 1) {
    int64_t size = E / n_.groups;
    std::vector<float> best(n_.groups);
    for (int64_t g = 0; g < n_.groups; g++) {
      float first = -INFINITY, second = -INFINITY;
      for (int64_t e = g * size; e < (g + 1) * size; e++) {
        if (rank[e] > first) second = first, first = rank[e];
        else if (rank[e] > second) second = rank[e];
      }
      best[g] = n_.noaux && size > 1 ? first + second : first;  // V3 scores a group by its two best experts, V2 by its best
    }
    std::vector<char> kept(n_.groups, 0);
    for (int64_t k = 0; k < n_.kept_groups; k++) {
      int64_t at = -1;
      for (int64_t g = 0; g < n_.groups; g++)
        if (!kept[g] && (at < 0 || best[g] > best[at])) at = g;
      kept[at] = 1;
    }
    for (int64_t e = 0; e < E; e++)
      if (!kept[e / size]) rank[e] = -INFINITY;
  }
  float sum = 0;
  for (int64_t a = 0; a < A; a++) {
    int64_t at = (int64_t)(std::max_element(rank.begin(), rank.end()) - rank.begin());
    me.chosen[i * A + a] = at;
    sum += me.weight[i * A + a] = score[at];
    rank[at] = -INFINITY;
  }
  for (int64_t a = 0; a < A; a++) {
    float& w = me.weight[i * A + a];
    if (n_.normalise) w /= sum + 1e-20f;
    w *= (float)n_.routed_scale;
  }
}

// ------------------------------------------------------------------------------------------------------ the next token

// Where the largest number is, the first of equals, as torch.argmax has it; -1 if there is no number at all.
int64_t first_largest(const float* x, int64_t n) {
  vf tops = splat(-INFINITY);
  int64_t i = 0;
  for (; i + VL <= n; i += VL) {
    vf v = load<vf>(x + i);
    tops = v > tops ? v : tops;
  }
  float top = -INFINITY;
  for (int l = 0; l < VL; l++) top = std::max(top, tops[l]);
  for (; i < n; i++) top = std::max(top, x[i]);
  int64_t at = std::find(x, x + n, top) - x;
  return at < n ? at : -1;
}

// A draw's two words: of a seed and the position that is being filled.
uint64_t draw_key(int64_t seed, int64_t position) {
  uint64_t z = (uint64_t)seed * 0x9e3779b97f4a7c15u + (uint64_t)position + 1;
  for (int turn = 0; turn < 2; turn++) {
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    z ^= z >> 31;
  }
  return z;
}

template <class U>
U mix(U x) {
  x = (x ^ x >> 16) * 0x85ebca6bu;
  x = (x ^ x >> 13) * 0xc2b2ae35u;
  return x ^ x >> 16;
}

// Which token wins the race: its weight over an exponential number of its own (minga/engine/sampler.py `race`).
struct Race {
  uint64_t key;
  vf best = {};
  vu winner = {};

  // weights[l] of the tokens first + l, or of those listed
  void run(vf weights, int64_t first, const int32_t* tokens = nullptr) {
    vu token;
    if (tokens) token = load<vu>(tokens);
    else for (int l = 0; l < VL; l++) token[l] = (uint32_t)(first + l);
    vu h = mix(token * 0x9e3779b1u ^ (uint32_t)key);
    h = mix(h + (uint32_t)(key >> 32));
    vf u = (__builtin_convertvector(h, vf) + 0.5f) * 0x1p-32f;
    vf score = weights / minus_log1m(u);
    winner = score > best ? token : winner;
    best = score > best ? score : best;
  }

  // The first of equals; `otherwise` where no weight is above 0.
  int64_t end(int64_t otherwise) const {
    int at = 0;
    for (int l = 1; l < VL; l++)
      if (best[l] > best[at] || (best[l] == best[at] && winner[l] < winner[at])) at = l;
    return best[at] > 0 ? (int64_t)winner[at] : otherwise;
  }
};

// The tokens that the cuts leave, with their weights: minga/engine/sampler.py `distribution`.
struct Chooser {
  std::vector<float> masked, weight;
  std::vector<std::pair<float, int32_t>> kept;
  std::vector<int32_t> token;

  // allowed: a bit for each token, 0 where it may not come; null: all may
  int64_t operator()(const float* logits, int64_t V, const MingaSampling& how, int64_t position, const uint32_t* allowed) {
    if (allowed) logits = mask(logits, V, allowed);
    int64_t likeliest = first_largest(logits, V);
    if (how.temperature == 0 || likeliest < 0) return likeliest;
    float top = logits[likeliest], sharp = (float)(1.0 / how.temperature);
    if (!std::isfinite(top)) return std::isnan(top) ? -1 : likeliest;
    weight.resize(V + VL);
    vf totals = {};
    for (int64_t i = 0; i < V; i += VL) {
      vf v = splat(-INFINITY);
      if (i + VL <= V) v = load<vf>(logits + i);
      else for (int64_t l = 0; i + l < V; l++) v[l] = logits[i + l];
      v = (v - top) * sharp;
      vf w = v > -87.0f ? exp_v(v) : vf{};
      totals += w;
      store(&weight[i], w);
    }
    float total = sum_v(totals), least = (float)how.min_p;  // the largest weight is 1
    Race race{draw_key(how.seed, position)};
    bool few = (how.top_k > 0 && how.top_k < V) || how.top_p < 1;
    if (!few) {
      for (int64_t i = 0; i < V; i += VL) {
        vf w = load<vf>(&weight[i]);
        race.run(w >= least ? w : vf{}, i);
      }
      return race.end(likeliest);
    }
    cut(V, how, total, least);
    token.resize(kept.size() + VL);
    weight.resize(std::max(weight.size(), kept.size() + VL));
    for (size_t k = 0; k < kept.size(); k++) weight[k] = kept[k].first, token[k] = kept[k].second;
    for (size_t k = kept.size(); k < kept.size() + VL; k++) weight[k] = 0, token[k] = 0;
    for (size_t k = 0; k < kept.size(); k += VL) race.run(load<vf>(&weight[k]), 0, &token[k]);
    return race.end(likeliest);
  }

 private:
  // The logits, minus infinity for those that are not allowed.
  const float* mask(const float* logits, int64_t V, const uint32_t* allowed) {
    masked.resize(V);
    vu lanes;
    for (int l = 0; l < VL; l++) lanes[l] = (uint32_t)l;
    for (int64_t first = 0; first < V; first += 32) {
      uint32_t word = allowed[first / 32];
      int64_t end = std::min(V, first + 32), i = first;
      for (; i + VL <= end; i += VL) {
        vu bit = (word >> (lanes + (uint32_t)(i - first))) & 1u;
        store(&masked[i], bit != 0 ? load<vf>(logits + i) : splat(-INFINITY));
      }
      for (; i < end; i++) masked[i] = word >> (i - first) & 1 ? logits[i] : -INFINITY;
    }
    return masked.data();
  }

  static bool before(const std::pair<float, int32_t>& a, const std::pair<float, int32_t>& b) {
    return a.first > b.first || (a.first == b.first && a.second < b.second);
  }

  void cut(int64_t V, const MingaSampling& how, float total, float least) {
    kept.clear();
    for (int64_t i = 0; i < V; i++)
      if (weight[i] > 0 && weight[i] >= least) kept.push_back({weight[i], (int32_t)i});
    if (least > 0) {
      total = 0;
      for (auto& k : kept) total += k.first;
    }
    if (how.top_k > 0 && (size_t)how.top_k < kept.size()) {
      std::nth_element(kept.begin(), kept.begin() + how.top_k - 1, kept.end(), before);
      kept.resize(how.top_k);
      total = 0;
      for (auto& k : kept) total += k.first;
    }
    if (how.top_p >= 1) return;
    // the likeliest first, a few at a time: they nearly always hold the mass
    double mass = 0, wanted = how.top_p * total;
    for (size_t sorted = 0, look = 256; sorted < kept.size(); look *= 8) {
      size_t end = std::min(kept.size(), sorted + look);
      std::partial_sort(kept.begin() + sorted, kept.begin() + end, kept.end(), before);
      for (; sorted < end; sorted++) {
        if (mass >= wanted && sorted) return kept.resize(sorted);
        mass += kept[sorted].first;
      }
    }
  }
};

Arena& arena() {
  static thread_local Arena of_this_thread;
  return of_this_thread;
}

}  // namespace

extern "C" {

// Asks for pages of 2 MB in memory that has not been touched yet.
void minga_large_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  uintptr_t page = 4096, from = ((uintptr_t)data + page - 1) / page * page, to = ((uintptr_t)data + bytes) / page * page;
  if (to > from) madvise((void*)from, to - from, MADV_HUGEPAGE);
#endif
}

// Gives back what was freed: the rows that panels were made from would else stay in the allocator's hands.
void minga_give_back() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

// Lets this thread's helpers go. As long as they are there, OpenMP takes the machine for crowded, and those of the thread that
// runs a model go to sleep after each call instead of waiting for the next.
void minga_let_go() {
#if defined(_OPENMP) && _OPENMP >= 201511
  omp_pause_resource_all(omp_pause_soft);
#endif
}

int64_t minga_net_size() { return sizeof(MingaNet) + sizeof(MingaLayer) + sizeof(MingaCall) + sizeof(MingaSampling) + PAGE + CACHE_BLOCK + KINDS; }

void minga_net_forward(const MingaNet* net, const MingaCall* call) {
  Team team{(int)call->threads};
  Forward forward(*net, *call, team);
  Arena& memory = arena();
  memory.begin();
  forward.lay_out(memory);
  if (!memory.fits()) {
    memory.begin();
    forward.lay_out(memory);
  }
#pragma omp parallel num_threads(team.threads)
  {
#pragma omp single
    team.threads = threads_here();
    team.join(thread_here());
    forward.run(thread_here());
  }
}

// The token of each of N rows of logits, -1 where they are not numbers; `rows` says which of `how` and `positions` what
// each draws for, `allowed` (null: everything, for one or for all) what it may take.
void minga_net_choose(const float* logits, int64_t N, int64_t V, const MingaSampling* how, const int64_t* rows,
                      const int64_t* positions, const uint32_t* const* allowed, int64_t* tokens, int64_t threads) {
#pragma omp parallel num_threads((int)std::min(threads, N))
  {
    Chooser choose;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < N; i++)
      tokens[i] = choose(logits + i * V, V, how[rows[i]], positions[i], allowed ? allowed[i] : nullptr);
  }
}

// `steps` steps of B sequences, each with K guesses by the first MTP module which the model checks: what
// minga/engine/runner.py does in single steps. Goes in: the tokens of the last step of each, new_ids (B, T) of which
// count (B) are there, the states that chose them, hidden (B, T, D), the position of the last of them, its row of the
// tables, and how it draws; T > K. The first four come out as the last step leaves them; tokens (steps, B, T) and counts
// (steps, B) are what came. Without guesses `hidden` may be null.
void minga_net_decode(const MingaNet* net, const MingaCall* call, int64_t steps, int64_t B, int64_t T, int64_t K, int64_t* new_ids,
                      int64_t* count, float* hidden, int64_t* positions, const int64_t* rows, const MingaSampling* how, int64_t* tokens,
                      int64_t* counts) {
  int64_t V = net->head.rows, D = net->D, R = K + 1, threads = call->threads;
  std::vector<int64_t> ids(B * T), at(B * T), sequence(B * T), last(B), guess(B * T), owner(B * T), next(B * T), chosen(B * T);
  std::vector<float> state(K ? B * T * D : 0), out(B * T * D), logits(B * T * V);
  MingaCall step = *call;
  step.ids = ids.data(), step.positions = at.data(), step.sequence = sequence.data();
  step.out = out.data(), step.logits = logits.data();
  for (int64_t s = 0; s < steps; s++) {
    // the module reads what came last, and guesses; then it reads its own guesses
    step.mtp = 1, step.hidden = state.data(), step.N = 0;
    for (int64_t b = 0; K && b < B; b++) {
      for (int64_t j = 0; j < count[b]; j++) {
        int64_t i = step.N++;
        ids[i] = new_ids[b * T + j], at[i] = positions[b] - count[b] + j, sequence[i] = rows[b];
        std::memcpy(&state[i * D], hidden + (b * T + j) * D, (size_t)D * 4);
      }
      last[b] = step.N - 1;
    }
    step.wanted = last.data(), step.num_wanted = B;
    for (int64_t k = 0; k < K; k++) {
      minga_net_forward(net, &step);
      for (int64_t b = 0; b < B; b++) owner[b] = b, next[b] = positions[b] + k + 1;
      minga_net_choose(logits.data(), B, V, how, owner.data(), next.data(), nullptr, chosen.data(), threads);
      for (int64_t b = 0; b < B; b++) std::memcpy(&state[b * D], &out[last[b] * D], (size_t)D * 4);
      for (int64_t b = 0; b < B; b++) {
        guess[b * T + k + 1] = ids[b] = std::max<int64_t>(0, chosen[b]);
        at[b] = positions[b] + k, sequence[b] = rows[b], last[b] = b;
      }
      step.N = B;
    }
    // the model reads the last token and the guesses
    step.mtp = 0, step.hidden = nullptr, step.wanted = nullptr, step.N = B * R;
    for (int64_t b = 0; b < B; b++) {
      guess[b * T] = new_ids[b * T + count[b] - 1];
      for (int64_t j = 0; j < R; j++) {
        int64_t i = b * R + j;
        ids[i] = guess[b * T + j], at[i] = positions[b] + j, sequence[i] = rows[b], owner[i] = b, next[i] = positions[b] + j + 1;
      }
    }
    minga_net_forward(net, &step);
    minga_net_choose(logits.data(), B * R, V, how, owner.data(), next.data(), nullptr, chosen.data(), threads);
    for (int64_t b = 0; b < B; b++) {
      int64_t n = 0, *came = tokens + (s * B + b) * T;
      do {
        came[n] = chosen[b * R + n];
        new_ids[b * T + n] = std::max<int64_t>(0, came[n]);
        n++;
      } while (n < R && guess[b * T + n] == came[n - 1]);
      counts[s * B + b] = count[b] = n;
      positions[b] += n;
      if (K) std::memcpy(hidden + b * T * D, &out[b * R * D], (size_t)(n * D) * 4);
    }
  }
}

// out (N, rows of the head) = head x; x (N, D).
void minga_net_head(const MingaNet* net, const float* x, int64_t N, float* out, int64_t threads) {
  const Matrix& m = net->head;
  Arena& memory = arena();
  Rows r;
  for (int turn = 0; turn < 2; turn++) {
    memory.begin();
    r = make_rows(memory, N, net->D, blocks_of(m), false);
    if (memory.fits()) break;
  }
  r.x = const_cast<float*>(x);
  std::vector<int32_t> token(N);
  std::vector<float*> to(N);
  for (int64_t i = 0; i < N; i++) {
    token[i] = (int32_t)i;
    to[i] = out + i * m.rows;
    if (m.is_rounded()) round_row(r, i, m.rounding());
  }
  int64_t parts = threads;
#pragma omp parallel for num_threads((int)threads) schedule(static)
  for (int64_t t = 0; t < parts; t++) product(m, 0, m.panels() * t / parts, m.panels() * (t + 1) / parts, r, token.data(), N, to.data());
}

}  // extern "C"
