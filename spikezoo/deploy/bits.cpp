// Layers of spikes that are one bit each: sums of weights by look-ups or by events, then norm, membrane and threshold.
//
// Spikes are bytes [T][ceil(C / 8)][H][W][B]: bit c % 8 of byte c / 8 is channel c of one place of one sample. Whole
// numbers are summed, so that every way gives the same; floating point is multiplied and added as torch does, without
// contraction but for the one multiply-add of its batch norm (compile with -ffp-contract=off).
//
// Look-ups: the spikes of WIDTH channels are a number, whose place in a table has the sum of the weights that they
// select. Tables of tickets, whose weights are -1, 0 and 1, are of bytes, and so few that all stand ready; those of
// eight-bit weights are of words and built where they are needed. One vector holds many places: maps are laid out with
// borders of zeros that neighbours share, so that a tap of a kernel is a shift, and a stride several maps. Events: every
// spike adds its row of weights to the sums of its neighbours.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

enum Kind : int32_t { BYTES, WORDS, ROWS, BITS, FLOATS };  // how a summand is computed; the last two are read as they are

struct Term {  // one summand of a neuron's current, and the norm behind it
  int32_t kind, channels, height, width, kernel[2], stride[2], padding[2], dilation[2], pool[3], segment;
  float levels;                                // what the sums are divided by, a power of two
  // Of BYTES numbers of tables [O/8][steps][8]; of WORDS [O/8][steps][8][WIDTH], of ROWS [O/64][taps][C][64].
  const void *input, *weight;
  const float *scale, *bias, *gain, *shift;    // [O] each; bias, gain and shift may be missing
  int64_t strides[5];                          // of FLOATS [T, B, O, H, W]
};

struct Layer {
  int32_t T, B, O, H, W, terms, threads, charge, soft, elements;
  float factor, v_reset, start, threshold;
  const float *at, *sign;  // fires where sign * potential >= at; of channels or of [O, H, W]
  uint8_t* out;
  Term term[2];
};

#if defined(__AVX512VBMI__)
constexpr int SIMD = 64;
struct Bytes {
  using Elem = int8_t;
  using Vec = __m512i;
  static constexpr int LANES = 64, WIDTH = 6, ENTRIES = 64, OUTS = 8, MOST = 3;
  static Vec zero() { return _mm512_setzero_si512(); }
  static Vec index(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Vec table(const Elem* p) { return _mm512_loadu_si512(p); }
  static Vec add(Vec sum, Vec table, Vec index) { return _mm512_add_epi8(sum, _mm512_permutexvar_epi8(index, table)); }
  static void spill(Vec sum, Elem* p) { _mm512_storeu_si512(p, sum); }
};
struct Words : Bytes {
  using Elem = int16_t;
  static constexpr int LANES = 32, WIDTH = 5, ENTRIES = 32;
  static Vec index(const uint8_t* p) { return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
  static Vec table(const Elem* p) { return _mm512_loadu_si512(p); }
  static Vec add(Vec sum, Vec table, Vec index) { return _mm512_add_epi16(sum, _mm512_permutexvar_epi16(index, table)); }
  static void spill(Vec sum, Elem* p) { _mm512_storeu_si512(p, sum); }
};
#elif defined(__AVX2__)
constexpr int SIMD = 32;
struct Bytes {
  using Elem = int8_t;
  using Vec = __m256i;
  static constexpr int LANES = 32, WIDTH = 4, ENTRIES = 16, OUTS = 4, MOST = 2;
  static Vec zero() { return _mm256_setzero_si256(); }
  static Vec index(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static Vec table(const Elem* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)); }
  static Vec add(Vec sum, Vec table, Vec index) { return _mm256_add_epi8(sum, _mm256_shuffle_epi8(table, index)); }
  static void spill(Vec sum, Elem* p) { _mm256_storeu_si256((__m256i*)p, sum); }
};
struct Two {
  __m256i a, b;
};
struct Words {  // the low and the high bytes of a table are looked up apart
  using Elem = int16_t;
  using Vec = Two;
  static constexpr int LANES = 32, WIDTH = 4, ENTRIES = 16, OUTS = 2, MOST = 2;
  static Vec zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static __m256i index(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static Vec table(const Elem* p) {
    const __m128i first = _mm_loadu_si128((const __m128i*)p), second = _mm_loadu_si128((const __m128i*)(p + 8));
    const __m128i low = _mm_set1_epi16(255);
    return {_mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(first, low), _mm_and_si128(second, low))),
            _mm256_broadcastsi128_si256(_mm_packs_epi16(_mm_srai_epi16(first, 8), _mm_srai_epi16(second, 8)))};
  }
  static Vec add(Vec sum, Vec table, __m256i index) {
    const __m256i low = _mm256_shuffle_epi8(table.a, index), high = _mm256_shuffle_epi8(table.b, index);
    return {_mm256_add_epi16(sum.a, _mm256_unpacklo_epi8(low, high)),
            _mm256_add_epi16(sum.b, _mm256_unpackhi_epi8(low, high))};
  }
  static void spill(Vec sum, Elem* p) {
    _mm256_storeu_si256((__m256i*)p, _mm256_permute2x128_si256(sum.a, sum.b, 0x20));
    _mm256_storeu_si256((__m256i*)(p + 16), _mm256_permute2x128_si256(sum.a, sum.b, 0x31));
  }
};
#else
constexpr int SIMD = 16;
template <class E>
struct Plain {
  using Elem = E;
  static constexpr int LANES = 16, WIDTH = 4, ENTRIES = 16, OUTS = 2, MOST = 1;
  struct Vec {
    E v[LANES];
  };
  static Vec zero() { return {}; }
  static const uint8_t* index(const uint8_t* p) { return p; }
  static const E* table(const E* p) { return p; }
  static Vec add(Vec sum, const E* table, const uint8_t* index) {
    for (int l = 0; l < LANES; ++l) sum.v[l] += table[index[l]];
    return sum;
  }
  static void spill(Vec sum, E* p) { std::memcpy(p, sum.v, sizeof sum.v); }
};
using Bytes = Plain<int8_t>;
using Words = Plain<int16_t>;
#endif

static_assert(Words::WIDTH * 127 * 48 < 32768, "a word holds as many look-ups as a segment has");
constexpr int GROUP = 8, BLOCK = 64;        // outputs of a byte of spikes, and of a row of weights
constexpr int64_t SLACK = 256, PLACES = 4096;  // what a vector may read beyond the end; places that are summed together

struct Axis {  // the places of a convolution along one axis, and how far apart the rows of its input are laid out
  int in, out, kernel, stride, padding, dilation, low, high, pitch;
  Axis() = default;
  Axis(const Term& t, int a)
      : in(a ? t.width : t.height), kernel(t.kernel[a]), stride(t.stride[a]), padding(t.padding[a]), dilation(t.dilation[a]) {
    const int reach = dilation * (kernel - 1);
    out = (in + 2 * padding - reach - 1) / stride + 1;
    low = -((padding + stride - 1) / stride), high = (reach - padding) / stride;
    const int real = std::min((in + stride - 1) / stride, out + high);
    pitch = t.kind == ROWS ? out : out + high - low - std::min(-low, out + high - real);
  }
  int first(int tap) const { return tap * dilation - padding; }
  int phase(int tap) const { return ((first(tap) % stride) + stride) % stride; }
  int shift(int tap) const { return (first(tap) - phase(tap)) / stride; }
  int content(int phase) const { return std::max(0, std::min((in - phase + stride - 1) / stride, out + high)); }
};

struct Map {  // a summand with its geometry and the numbers of its input's spikes
  const Term* t;
  Axis y, x;
  int width = 0, planes = 0;
  int64_t frame = 0, lead = 0, size = 0;
  std::vector<uint8_t>* numbers = nullptr;
  std::vector<const uint8_t*> from;  // the first number of every look-up
  void find(int B) {
    for (int ky = 0; ky < y.kernel; ++ky)
      for (int kx = 0; kx < x.kernel; ++kx)
        for (int plane = 0; plane < planes; ++plane) {
          const int unit = (y.phase(ky) * x.stride + x.phase(kx)) * planes + plane;
          const uint8_t* first = numbers->data() + unit * size + lead;
          from.push_back(first + (int64_t(y.shift(ky)) * x.pitch + x.shift(kx)) * B);
        }
  }
};

// One plane of numbers: WIDTH channels of a phase, with borders of zeros.
void lay_out(const Layer& l, const Map& m, int unit) {
  const int plane = unit % m.planes, phase = unit / m.planes, B = l.B, mask = (1 << m.width) - 1;
  const int py = phase / m.x.stride, px = phase % m.x.stride, channel = plane * m.width, bit = channel % 8;
  const int groups = (m.t->channels + 7) / 8, rows = m.y.content(py), columns = m.x.content(px);
  const int64_t map = int64_t(m.y.in) * m.x.in * B;
  uint8_t* to = m.numbers->data() + unit * m.size;
  std::memset(to, 0, m.size);
  const bool two = bit + m.width > 8 && channel / 8 + 1 < groups;
  for (int t = 0; t < l.T; ++t)
    for (int y = 0; y < rows; ++y) {
      const uint8_t* from = (const uint8_t*)m.t->input + (int64_t(t) * groups + channel / 8) * map;
      from += (int64_t(y * m.y.stride + py) * m.x.in + px) * B;
      uint8_t* row = to + m.lead + t * m.frame + int64_t(y) * m.x.pitch * B;
      const int pieces = m.x.stride == 1 ? 1 : columns, count = m.x.stride == 1 ? columns * B : B;
      for (int x = 0; x < pieces; ++x, from += m.x.stride * B, row += B) {
        if (two)
          for (int i = 0; i < count; ++i) row[i] = ((from[i] | from[i + map] << 8) >> bit) & mask;
        else
          for (int i = 0; i < count; ++i) row[i] = (from[i] >> bit) & mask;
      }
    }
}

// Tables of `count` look-ups of an output: copies of those of tickets, others from their weights.
void build(const void* weights, int64_t first, int8_t* table, int count) {
  constexpr int WIDTH = Bytes::WIDTH, ENTRIES = Bytes::ENTRIES;
  static const auto all = [] {
    int tables = 1;
    for (int j = 0; j < WIDTH; ++j) tables *= 3;
    std::vector<int8_t> sums(tables * ENTRIES);
    for (int i = 0; i < tables * ENTRIES; ++i)
      for (int j = 0, digits = i / ENTRIES; j < WIDTH; ++j, digits /= 3) sums[i] += (digits % 3 - 1) * (i >> j & 1);
    return sums;
  }();
  const uint16_t* number = (const uint16_t*)weights + first;
  for (int k = 0; k < count; ++k) std::memcpy(table + k * ENTRIES, all.data() + number[k] * ENTRIES, ENTRIES);
}

void build(const void* weights, int64_t first, int16_t* table, int count) {
  constexpr int WIDTH = Words::WIDTH, ENTRIES = Words::ENTRIES;
  typedef int16_t Vec __attribute__((vector_size(ENTRIES * 2)));
  static const auto masks = [] {  // whether a channel fires
    std::vector<int16_t> m(WIDTH * ENTRIES);
    for (int i = 0; i < WIDTH * ENTRIES; ++i) m[i] = -((i % ENTRIES) >> (i / ENTRIES) & 1);
    return m;
  }();
  Vec mask[WIDTH];
  std::memcpy(mask, masks.data(), sizeof mask);
  const int8_t* weight = (const int8_t*)weights + first * WIDTH;
  for (int k = 0; k < count; ++k, weight += WIDTH) {
    Vec sum = {};
#pragma GCC unroll 8
    for (int j = 0; j < WIDTH; ++j) sum += (Vec{} + int16_t(weight[j])) & mask[j];
    std::memcpy(table + k * ENTRIES, &sum, sizeof sum);
  }
}

// Adds up, or on request begins with, the look-ups of N vectors of places. All loops over sums are unrolled, so that they
// stay in registers.
template <class K, int N>
void look_up(const typename K::Elem* table, const uint8_t* const* from, int steps, int64_t at, int32_t* sums, int64_t pitch,
             bool begin) {
  for (int first = 0; first < GROUP; first += K::OUTS) {
    typename K::Vec sum[K::OUTS][N];
#pragma GCC unroll 8
    for (int o = 0; o < K::OUTS; ++o)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[o][n] = K::zero();
    for (int s = 0; s < steps; ++s) {
      decltype(K::index(from[s])) index[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) index[n] = K::index(from[s] + at + n * K::LANES);
#pragma GCC unroll 8
      for (int o = 0; o < K::OUTS; ++o) {
        const auto one = K::table(table + (s * GROUP + first + o) * K::ENTRIES);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[o][n] = K::add(sum[o][n], one, index[n]);
      }
    }
#pragma GCC unroll 8
    for (int o = 0; o < K::OUTS; ++o)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        typename K::Elem out[K::LANES];
        K::spill(sum[o][n], out);
        int32_t* to = sums + (first + o) * pitch + n * K::LANES;
        if (begin)
          for (int i = 0; i < K::LANES; ++i) to[i] = out[i];
        else
          for (int i = 0; i < K::LANES; ++i) to[i] += out[i];
      }
  }
}

// Where a unit's sums lie: a row of places for every output, in it the time steps and the rows of the map.
struct Span {
  int y0, y1;
  bool whole;  // all rows of all time steps in one piece
  int64_t row, step, pitch;
  Span(const Layer& l, const Map& m, int from, int to) : y0(from), y1(to), whole(from == 0 && to == m.y.out) {
    row = int64_t(m.x.pitch) * l.B;
    step = m.t->kind == ROWS ? (y1 - y0) * row : whole ? m.frame : ((y1 - y0) * row + 63) / 64 * 64 + SLACK;
    pitch = l.T * step + SLACK;
  }
};

template <class K>
void sum_by_tables(const Layer& l, const Map& m, const Span& s, int group, int32_t* sums) {
  static thread_local std::vector<typename K::Elem> table;
  const int steps = m.from.size(), segment = m.t->segment;
  table.resize(int64_t(segment) * GROUP * K::ENTRIES);
  for (int begin = 0; begin < steps; begin += segment) {
    const int count = std::min(segment, steps - begin);
    build(m.t->weight, (int64_t(group) * steps + begin) * GROUP, table.data(), count * GROUP);
    for (int t = 0; t < (s.whole ? 1 : l.T); ++t) {
      const int64_t length = s.whole ? l.T * m.frame : (s.y1 - s.y0) * s.row, at = t * m.frame + s.y0 * s.row;
      for (int64_t p = 0; p < length;) {
        const int64_t left = (length - p + K::LANES - 1) / K::LANES;
        auto some = [&](auto vectors) {
          constexpr int N = decltype(vectors)::value;
          look_up<K, N>(table.data(), m.from.data() + begin, count, at + p, sums + t * s.step + p, s.pitch, begin == 0);
          p += N * K::LANES;
        };
        if (K::MOST >= 3 && left >= 3)
          some(std::integral_constant<int, 3>());
        else if (K::MOST >= 2 && left >= 2)
          some(std::integral_constant<int, 2>());
        else
          some(std::integral_constant<int, 1>());
      }
    }
  }
}

void sum_by_rows(const Layer& l, const Map& m, const Span& s, int block, int32_t* sums) {
  typedef int16_t Vec __attribute__((vector_size(SIMD)));
  constexpr int VECS = BLOCK * 2 / SIMD, SAFE = 256;  // so many rows of eight-bit weights fit into 16 bits
  const int C = m.t->channels, groups = (C + 7) / 8, taps = m.t->kernel[0] * m.t->kernel[1];
  const int in0 = std::max(0, s.y0 * m.y.stride - m.y.padding);
  const int in1 = std::min(m.y.in, m.y.first(m.y.kernel - 1) + (s.y1 - 1) * m.y.stride + 1);
  const int64_t row = int64_t(m.x.in) * l.B, places = std::max(0, in1 - in0) * row;
  const int16_t* weight = (const int16_t*)m.t->weight + int64_t(block) * taps * C * BLOCK;
  std::vector<uint16_t> events(places * C);
  std::vector<int> count(places);
  for (int t = 0; t < l.T; ++t) {
    std::fill(count.begin(), count.end(), 0);
    for (int g = 0; g < groups; ++g) {
      const uint8_t* from = (const uint8_t*)m.t->input + (int64_t(t) * groups + g) * m.y.in * row + in0 * row;
      for (int64_t p = 0; p < places; ++p)
        for (unsigned bits = from[p]; bits; bits &= bits - 1) events[p * C + count[p]++] = g * 8 + __builtin_ctz(bits);
    }
    for (int y = s.y0; y < s.y1; ++y)
      for (int64_t p = 0; p < s.row; ++p) {
        const int x = p / l.B, b = p % l.B;
        Vec sum[VECS] = {};
        int32_t wide[BLOCK] = {};
        int added = 0;
        auto flush = [&] {
          int16_t out[BLOCK];
          std::memcpy(out, sum, sizeof out);
          for (int o = 0; o < BLOCK; ++o) wide[o] += out[o];
          for (auto& one : sum) one = Vec{};
          added = 0;
        };
        for (int ky = 0; ky < m.y.kernel; ++ky)
          for (int kx = 0; kx < m.x.kernel; ++kx) {
            const int iy = y * m.y.stride + m.y.first(ky), ix = x * m.x.stride + m.x.first(kx);
            if (iy < 0 || iy >= m.y.in || ix < 0 || ix >= m.x.in) continue;
            const int64_t place = (iy - in0) * row + int64_t(ix) * l.B + b;
            const uint16_t* event = events.data() + place * C;
            const int16_t* tap = weight + int64_t(ky * m.x.kernel + kx) * C * BLOCK;
            for (int e = 0, end = count[place]; e < end;) {
              const int stop = std::min(end, e + SAFE - added);
              added += stop - e;
              for (; e < stop; ++e) {
                const Vec* one = (const Vec*)(tap + int64_t(event[e]) * BLOCK);
#pragma GCC unroll 8
                for (int v = 0; v < VECS; ++v) sum[v] += one[v];
              }
              if (added == SAFE) flush();
            }
          }
        flush();
        int32_t* to = sums + t * s.step + (y - s.y0) * s.row + p;
        for (int o = 0; o < BLOCK; ++o) to[o * s.pitch] = wide[o];
      }
  }
}

// Maxima along a row of `in` places, of windows of some places, to `out` of them.
void widest(const int32_t* row, int32_t* to, int in, int out, int B, int size, int stride, int padding) {
  std::fill(to, to + out * B, INT32_MIN);
  for (int k = -padding; k < size - padding; ++k) {
    const int first = k < 0 ? (stride - 1 - k) / stride : 0, end = std::min(out, (in - k + stride - 1) / stride);
    const int32_t* from = row + k * B;
    if (B == 1 && stride == 2)  // a constant, so that many places are taken at once
      for (int x = first; x < end; ++x) to[x] = std::max(to[x], from[2 * x]);
    else
      for (int x = first; x < end; ++x)
        for (int b = 0; b < B; ++b) to[x * B + b] = std::max(to[x * B + b], from[int64_t(x) * stride * B + b]);
  }
}

// What a summand adds to the current of one channel, rows y0 to y1 of one time step: after pooling, scale and norm.
void read(const Layer& l, const Map& m, const Span& s, const int32_t* sums, int t, int channel, int y0, int y1, float* to) {
  const Term& term = *m.t;
  const int W = l.W, B = l.B;
  const int64_t n = int64_t(y1 - y0) * W * B;
  if (term.kind == BITS) {
    const int64_t at = ((int64_t(t) * ((l.O + 7) / 8) + channel / 8) * l.H + y0) * W * B;
    const uint8_t* from = (const uint8_t*)term.input + at;
    for (int64_t i = 0; i < n; ++i) to[i] = from[i] >> channel % 8 & 1;
  } else if (term.kind == FLOATS) {
    const int64_t* d = term.strides;
    const float* from = (const float*)term.input + t * d[0] + channel * d[2];
    for (int y = y0; y < y1; ++y, to += W * B)
      for (int b = 0; b < B; ++b)
        for (int x = 0; x < W; ++x) to[x * B + b] = from[b * d[1] + y * d[3] + x * d[4]];
    to -= n;
  } else {
    const float scale = term.scale[channel], part = 1 / term.levels, bias = term.bias ? term.bias[channel] : 0;
    const int size = term.pool[0], stride = term.pool[1], padding = term.pool[2];
    static thread_local std::vector<int32_t> tall, most;
    const int count = m.x.out * B;
    if (size) tall.resize(count), most.resize(W * B);
    for (int y = y0; y < y1; ++y, to += W * B) {
      const int32_t* from = sums + t * s.step + (y - s.y0) * s.row;
      if (size) {
        const int top = std::max(0, y * stride - padding), end = std::min(m.y.out, y * stride - padding + size);
        from = sums + t * s.step + (top - s.y0) * s.row;
        std::copy(from, from + count, tall.begin());
        for (int py = top + 1; py < end; ++py) {
          from += s.row;
          for (int i = 0; i < count; ++i) tall[i] = std::max(tall[i], from[i]);
        }
        widest(tall.data(), most.data(), m.x.out, W, B, size, stride, padding);
        from = most.data();
      }
      for (int i = 0; i < W * B; ++i) to[i] = float(from[i]) * part * scale;
      if (term.bias)
        for (int i = 0; i < W * B; ++i) to[i] += bias;
    }
    to -= n;
  }
  if (term.gain) {
    const float gain = term.gain[channel], shift = term.shift[channel];
    for (int64_t i = 0; i < n; ++i) to[i] = __builtin_fmaf(to[i], gain, shift);
  }
}

template <int CHARGE>
void fire(const Layer& l, const float* x, float* v, const float* at, float sign, int bit, int64_t n, uint8_t* out) {
  const float factor = l.factor, rest = l.v_reset, threshold = l.threshold;
  const bool soft = l.soft;
  for (int64_t i = 0; i < n; ++i) {
    float u;
    if (CHARGE == 0) u = rest + factor * (v[i] - rest) + x[i];
    if (CHARGE == 1) u = v[i] + (x[i] - (v[i] - rest)) / factor;
    if (CHARGE == 2) u = v[i] + x[i];
    if (CHARGE == 3) u = v[i] + (x[i] - (v[i] - rest)) * factor;
    const bool fired = sign * u >= at[i];
    v[i] = fired ? (soft ? u - threshold : rest) : u;
    out[i] |= uint8_t(fired) << bit;
  }
}

// Rows y0 to y1 of `outputs` channels from `first`, at all time steps.
void unit(const Layer& l, const Map* maps, int first, int outputs, int y0, int y1) {
  static thread_local std::vector<int32_t> sums[2];
  static thread_local std::vector<float> x, other, v, at;
  std::vector<Span> spans;
  for (int i = 0; i < l.terms; ++i) {
    const Map& m = maps[i];
    const int *p = m.t->pool, from = p[0] ? std::max(0, y0 * p[1] - p[2]) : y0;
    spans.emplace_back(l, m, from, p[0] ? std::min(m.y.out, (y1 - 1) * p[1] - p[2] + p[0]) : y1);
    if (m.t->kind > ROWS) continue;
    sums[i].resize(std::max<int64_t>(sums[i].size(), spans[i].pitch * outputs));
    if (m.t->kind == ROWS) sum_by_rows(l, m, spans[i], first / BLOCK, sums[i].data());
    for (int g = 0; m.t->kind < ROWS && g < outputs && first + g < l.O; g += GROUP)
      (m.t->kind == BYTES ? sum_by_tables<Bytes> : sum_by_tables<Words>)(l, m, spans[i], (first + g) / GROUP,
                                                                         sums[i].data() + g * spans[i].pitch);
  }
  const int64_t n = int64_t(y1 - y0) * l.W * l.B;
  for (auto* buffer : {&x, &other, &v, &at}) buffer->resize(n);
  for (int o = 0; o < outputs && first + o < l.O; ++o) {
    const int channel = first + o;
    std::fill(v.begin(), v.end(), l.start);
    for (int64_t i = 0; i < n; i += l.elements ? l.B : n) {
      const float limit = l.elements ? l.at[(int64_t(channel) * l.H + y0) * l.W + i / l.B] : l.at[channel];
      std::fill(at.begin() + i, at.begin() + i + (l.elements ? l.B : n), limit);
    }
    for (int t = 0; t < l.T; ++t) {
      uint8_t* out = l.out + ((int64_t(t) * ((l.O + 7) / 8) + channel / 8) * l.H + y0) * l.W * l.B;
      if (o % 8 == 0) std::memset(out, 0, n);
      const bool again = l.terms == 1 && maps[0].t->kind == FLOATS && maps[0].t->strides[0] == 0 && t;  // a repeated image
      for (int i = 0; i < l.terms && !again; ++i) {
        const int32_t* mine = sums[i].data() + o * spans[i].pitch;
        read(l, maps[i], spans[i], mine, t, channel, y0, y1, i ? other.data() : x.data());
        for (int64_t k = 0; i && k < n; ++k) x[k] += other[k];
      }
      constexpr decltype(&fire<0>) kinds[] = {fire<0>, fire<1>, fire<2>, fire<3>};
      kinds[l.charge](l, x.data(), v.data(), at.data(), l.sign[channel], channel % 8, n, out);
    }
  }
}

// With OpenMP by the threads that torch, too, has: they wait busily for its next layer, and others would have to share
// their cores.
template <class F>
void in_parallel(int threads, F work) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  work();
#else
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (auto& other : others) other.join();
#endif
}

}  // namespace

extern "C" {

int bits_widths() { return Bytes::WIDTH * 16 + Words::WIDTH; }

void bits_layer(const Layer* layer) {
  static thread_local std::vector<uint8_t> numbers[2];
  const Layer& l = *layer;
  Map maps[2];
  int outputs = GROUP, laying[2] = {0, 0};
  int64_t row = int64_t(l.W) * l.B;
  for (int i = 0; i < l.terms; ++i) {
    Map& m = maps[i];
    m.t = &l.term[i];
    if (m.t->kind > ROWS) continue;
    m.y = Axis(*m.t, 0), m.x = Axis(*m.t, 1);
    row = std::max(row, int64_t(m.x.pitch) * l.B * (m.t->pool[0] ? m.t->pool[1] : 1));
    m.frame = int64_t(m.y.pitch) * m.x.pitch * l.B;
    if (m.t->kind == ROWS) {
      outputs = BLOCK;
      continue;
    }
    m.width = m.t->kind == BYTES ? Bytes::WIDTH : Words::WIDTH;
    m.planes = (m.t->channels + m.width - 1) / m.width;
    m.lead = (int64_t(-m.y.low) * m.x.pitch - m.x.low) * l.B;
    m.size = m.lead + l.T * m.frame + (int64_t(m.y.high) * m.x.pitch + m.x.high) * l.B + SLACK;
    laying[i] = m.planes * m.y.stride * m.x.stride;
    m.numbers = &numbers[i];
    if (int64_t(numbers[i].size()) < laying[i] * m.size) numbers[i].resize(laying[i] * m.size);
    m.find(l.B);
  }
  const int rows = std::max<int64_t>(1, std::min<int64_t>(l.H, PLACES / (row * l.T)));
  const int blocks = (l.H + rows - 1) / rows, all = laying[0] + laying[1], parts = (l.O + outputs - 1) / outputs;
  std::atomic<int> next{0}, laid{0}, done{0};
  in_parallel(std::min(l.threads, std::max(all, parts * blocks)), [&] {
    for (int i; (i = next++) < all; ++laid) lay_out(l, maps[i >= laying[0]], i < laying[0] ? i : i - laying[0]);
    while (laid < all) std::this_thread::yield();
    for (int i; (i = done++) < parts * blocks;) {
      const int y0 = i % blocks * rows;
      unit(l, maps, i / blocks * outputs, outputs, y0, std::min(l.H, y0 + rows));
    }
  });
}

// Bytes 0 or 1, of any strides, to bits.
void bits_pack(const uint8_t* x, const int64_t* shape, const int64_t* d, uint8_t* out) {
  const int64_t T = shape[0], B = shape[1], C = shape[2], H = shape[3], W = shape[4];
  for (int64_t t = 0; t < T; ++t)
    for (int64_t c = 0; c < C; c += 8)
      for (int64_t y = 0; y < H; ++y)
        for (int64_t w = 0; w < W; ++w)
          for (int64_t b = 0; b < B; ++b, ++out) {
            const uint8_t* from = x + t * d[0] + b * d[1] + c * d[2] + y * d[3] + w * d[4];
            unsigned byte = 0;
            for (int64_t k = 0; k < std::min<int64_t>(8, C - c); ++k) byte |= from[k * d[2]] << k;
            *out = byte;
          }
}

// Bits to bytes [T][B][H][W][C].
void bits_unpack(const uint8_t* x, const int64_t* shape, uint8_t* out) {
  const int64_t T = shape[0], B = shape[1], C = shape[2], places = shape[3] * shape[4];
  for (int64_t t = 0; t < T; ++t)
    for (int64_t c = 0; c < C; c += 8)
      for (int64_t p = 0; p < places; ++p)
        for (int64_t b = 0; b < B; ++b, ++x) {
          uint8_t* to = out + ((t * B + b) * places + p) * C + c;
          for (int64_t k = 0; k < std::min<int64_t>(8, C - c); ++k) to[k] = *x >> k & 1;
        }
}
}
