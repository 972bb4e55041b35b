// The vector kernels, compiled once per instruction set with PISA_VARIANT naming the copy.
//
// Query rows run along the vector lanes: the softmax then needs no horizontal operation, keys and
// values are only ever broadcast, and no head dimension, odd ones included, needs padding.

#include "pisa.h"

#ifndef PISA_VARIANT
#error "PISA_VARIANT must name the instruction set"
#endif
#define PISA_JOIN(a, b) a##b
#define PISA_TABLE(variant) PISA_JOIN(kernels_, variant)

namespace pisa {
namespace {

#include "vec.h"

constexpr int kRows = 6;  // rows of the register tile, see kTileVectors

// ---- Register tile ----

// sum[i, v] += sum_k a(i, k) * b[k, v], with a(i, k) at a[i * ld_a + k], or at a[k * ld_a + i]
// when kTransposed.
template <int kR, int kV, bool kTransposed>
PISA_INLINE void multiply(vf (&sum)[kR][kV], const float* a, int64_t ld_a, const float* b,
                          int64_t ld_b, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    vf right[kV];
#pragma GCC unroll 8
    for (int v = 0; v < kV; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kR; ++i) {
      const vf left = splat(kTransposed ? a[i] : a[i * ld_a]);
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) sum[i][v] += left * right[v];
    }
    a += kTransposed ? ld_a : 1;
    b += ld_b;
  }
}

struct ScoreArgs {
  float* logit;
  float* peak;
  const float* keys;
  int64_t ld_keys;
  const float* query;
  int64_t head_dim, width;
  float factor;
  const float* bias;
};

template <int kR, int kV>
PISA_INLINE void score_tile(const ScoreArgs& s, int64_t row, int64_t column) {
  vf sum[kR][kV] = {};
  multiply<kR, kV, false>(sum, s.keys + row * s.ld_keys, s.ld_keys, s.query + column, s.width,
                          s.head_dim);
  vf peak[kV];
#pragma GCC unroll 8
  for (int v = 0; v < kV; ++v) peak[v] = load(s.peak + column + v * kLanes);
#pragma GCC unroll 16
  for (int i = 0; i < kR; ++i) {
    const float bias = s.bias ? s.bias[row + i] : 0.0f;
#pragma GCC unroll 8
    for (int v = 0; v < kV; ++v) {
      const vf logit = sum[i][v] * s.factor + bias;
      store(s.logit + (row + i) * s.width + column + v * kLanes, logit);
      peak[v] = maximum(peak[v], logit);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kV; ++v) store(s.peak + column + v * kLanes, peak[v]);
}

struct AccumulateArgs {
  float* acc;
  const float* alpha;
  const Rows* a;
  int64_t pieces, ld_a;
  const float* b;
  int64_t width;
};

template <int kR, int kV>
PISA_INLINE void accumulate_tile(const AccumulateArgs& s, int64_t row, int64_t column) {
  vf sum[kR][kV];
  float* acc = s.acc + row * s.width + column;
#pragma GCC unroll 16
  for (int i = 0; i < kR; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < kV; ++v) {
      sum[i][v] = load(acc + i * s.width + v * kLanes);
      if (s.alpha) sum[i][v] *= load(s.alpha + column + v * kLanes);
    }
  const float* b = s.b + column;
  for (const Rows* a = s.a; a < s.a + s.pieces; b += a++->count * s.width)
    multiply<kR, kV, true>(sum, a->first + row, s.ld_a, b, s.width, a->count);
#pragma GCC unroll 16
  for (int i = 0; i < kR; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < kV; ++v) store(acc + i * s.width + v * kLanes, sum[i][v]);
}

// Covers `rows` with tiles of kRows rows and one smaller remainder.
#define PISA_COVER_ROWS(tile)                                        \
  template <int kV, typename Args>                                   \
  static void tile##_column(const Args& s, int64_t rows, int64_t column) { \
    int64_t row = 0;                                                 \
    for (; row + kRows <= rows; row += kRows) tile<kRows, kV>(s, row, column); \
    switch (rows - row) {                                            \
      case 1: tile<1, kV>(s, row, column); break;                    \
      case 2: tile<2, kV>(s, row, column); break;                    \
      case 3: tile<3, kV>(s, row, column); break;                    \
      case 4: tile<4, kV>(s, row, column); break;                    \
      case 5: tile<5, kV>(s, row, column); break;                    \
      default: break;                                                \
    }                                                                \
  }                                                                  \
  template <typename Args>                                           \
  static void tile##_all(const Args& s, int64_t rows) {              \
    int64_t column = 0;                                              \
    for (; column + kTileVectors * kLanes <= s.width; column += kTileVectors * kLanes) \
      tile##_column<kTileVectors>(s, rows, column);                  \
    if (column + 2 * kLanes <= s.width) {                            \
      tile##_column<2>(s, rows, column);                             \
      column += 2 * kLanes;                                          \
    }                                                                \
    if (column < s.width) tile##_column<1>(s, rows, column);         \
  }

PISA_COVER_ROWS(score_tile)
PISA_COVER_ROWS(accumulate_tile)

void scores(float* logit, float* peak, const float* keys, int64_t ld_keys, int64_t count,
            const float* query, int64_t head_dim, int64_t width, float factor,
            const float* bias) {
  score_tile_all(
      ScoreArgs{logit, peak, keys, ld_keys, query, head_dim, width, factor, bias}, count);
}

void accumulate(float* acc, const float* alpha, const Rows* a, int64_t pieces, int64_t ld_a,
                int64_t columns, const float* b, int64_t width) {
  accumulate_tile_all(AccumulateArgs{acc, alpha, a, pieces, ld_a, b, width}, columns);
}

// ---- Online softmax ----

void softmax(float* logit, int64_t count, int64_t width, const float* peak, float* top,
             float* mass, float* alpha) {
  const vf infinity = splat(__builtin_inff());
  for (int64_t column = 0; column < width; column += kLanes) {
    const vf old_top = load(top + column);
    const vf new_top = maximum(load(peak + column), old_top);
    // -inf - -inf would be NaN: rows that have seen no key keep weight 0 against reference 0.
    const vf reference = new_top == -infinity ? vf{} : new_top;
    const vf rescale = exp2_nonpositive(old_top - reference);
    vf sum = load(mass + column) * rescale;
    for (int64_t n = 0; n < count; ++n) {
      float* p = logit + n * width + column;
      const vf weight = exp2_nonpositive(load(p) - reference);
      store(p, weight);
      sum += weight;
    }
    store(top + column, new_top);
    store(mass + column, sum);
    store(alpha + column, rescale);
  }
}

// ---- Rows in and out ----

// A vector from memory that holds `count` values, followed by zeros where those are too few.
PISA_INLINE vf float_part(const float* src, int64_t count) {
  if (count >= kLanes) return *reinterpret_cast<const vf_any*>(src);
  vf part = {};
  for (int64_t i = 0; i < count; ++i) part[i] = src[i];
  return part;
}

PISA_INLINE vh half_part(const uint16_t* src, int64_t count) {
  if (count >= kLanes) return *reinterpret_cast<const vh_any*>(src);
  vh part = {};
  for (int64_t i = 0; i < count; ++i) part[i] = src[i];
  return part;
}

template <typename Convert>
PISA_INLINE void load_half_row(float* dst, const uint16_t* src, int64_t cols, Convert convert) {
  for (int64_t c = 0; c < cols; c += kLanes) store(dst + c, convert(half_part(src + c, cols - c)));
}

PISA_INLINE void load_float_row(float* dst, const float* src, int64_t cols) {
  for (int64_t c = 0; c < cols; c += kLanes) store(dst + c, float_part(src + c, cols - c));
}

int64_t load_rows(float* dst, int64_t ld, const void* src, int64_t src_stride, const int64_t* at,
                  int64_t rows, int64_t cols, int32_t dtype, const uint8_t* keep) {
  constexpr int64_t kAhead = 8;
  const int64_t element = dtype == kFloat32 ? 4 : 2;
  int64_t kept = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t r = at ? at[i] : i;
    // Rows lie apart, so that the processor sees no stream to prefetch by itself.
    const int64_t ahead = i + kAhead < rows ? (at ? at[i + kAhead] : i + kAhead) : r;
    const char* next = static_cast<const char*>(src) + ahead * src_stride * element;
    for (int64_t byte = 0; byte < cols * element; byte += 64) __builtin_prefetch(next + byte);
    if (keep && !keep[r]) continue;
    float* to = dst + kept++ * ld;
    // The vector that holds the last column is padded by load_*_row, whole vectors are not.
    for (int64_t c = ld - 16; c < ld; c += kLanes) store(to + c, vf{});
    if (dtype == kFloat32) {
      load_float_row(to, static_cast<const float*>(src) + r * src_stride, cols);
      continue;
    }
    const uint16_t* from = static_cast<const uint16_t*>(src) + r * src_stride;
    if (dtype == kBFloat16)
      load_half_row(to, from, cols, [](vh x) { return from_bfloat16(x); });
    else
      load_half_row(to, from, cols, [](vh x) { return from_float16(x); });
  }
  return kept;
}

template <typename Convert>
PISA_INLINE void store_half_row(uint16_t* dst, const float* src, int64_t cols, Convert convert) {
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes)
    *reinterpret_cast<vh_any*>(dst + c) = convert(load(src + c));
  if (c < cols) {
    const vh tail = convert(load(src + c));
    for (int64_t i = c; i < cols; ++i) dst[i] = tail[i - c];
  }
}

void store_rows(void* dst, int64_t dst_stride, const int64_t* at, const float* src, int64_t ld,
                int64_t rows, int64_t cols, int32_t dtype) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* from = src + i * ld;
    const int64_t r = at ? at[i] : i;
    if (dtype == kFloat32) {
      float* to = static_cast<float*>(dst) + r * dst_stride;
      int64_t c = 0;
      for (; c + kLanes <= cols; c += kLanes)
        *reinterpret_cast<vf_any*>(to + c) = load(from + c);
      for (; c < cols; ++c) to[c] = from[c];
      continue;
    }
    uint16_t* to = static_cast<uint16_t*>(dst) + r * dst_stride;
    if (dtype == kBFloat16)
      store_half_row(to, from, cols, [](vf x) { return to_bfloat16(x); });
    else
      store_half_row(to, from, cols, [](vf x) { return to_float16(x); });
  }
}

void transpose(float* dst, int64_t ld_dst, const float* src, int64_t ld_src, int64_t rows,
               int64_t cols) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < cols; c += kLanes) {
      vf tile[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) tile[i] = load(src + (r + i) * ld_src + c);
      transpose_tile(tile);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(dst + (c + i) * ld_dst + r, tile[i]);
    }
}

// ---- Block statistics ----

void column_mean(float* mean, const float* src, int64_t ld, int64_t rows, float divisor) {
  for (int64_t c = 0; c < ld; c += kLanes) {
    vf sum = {};
    for (int64_t r = 0; r < rows; ++r) sum += load(src + r * ld + c);
    store(mean + c, sum / divisor);
  }
}

void add_squares(float* sum, const float* src, int64_t ld, int64_t rows, float factor) {
  for (int64_t c = 0; c < ld; c += kLanes) {
    vf part[4] = {};  // several sums, since each addition waits for the one before it
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const vf x = load(src + (r + i) * ld + c);
        part[i] += x * x;
      }
    for (; r < rows; ++r) part[0] += load(src + r * ld + c) * load(src + r * ld + c);
    const vf squares = (part[0] + part[1]) + (part[2] + part[3]);
    store(sum + c, load(sum + c) + squares * factor);
  }
}

template <typename At>
PISA_INLINE void square_rows(float* sum, int64_t rows, int64_t cols, float factor, At at) {
  constexpr int kStrip = 4;
  for (int64_t c = 0; c < cols; c += kStrip * kLanes) {
    vf part[kStrip] = {};
    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kStrip; ++v)
        if (c + v * kLanes < cols) {
          const vf x = at(r, c + v * kLanes);
          part[v] += x * x;
        }
    for (int v = 0; v < kStrip && c + v * kLanes < cols; ++v) {
      float* to = sum + c + v * kLanes;
      store(to, load(to) + part[v] * factor);
    }
  }
}

void add_row_squares(float* sum, const void* src, int64_t src_stride, int64_t rows, int64_t cols,
                     int32_t dtype, float factor) {
  const auto half_row = [=](int64_t r) {
    return static_cast<const uint16_t*>(src) + r * src_stride;
  };
  if (dtype == kFloat32)
    square_rows(sum, rows, cols, factor, [=](int64_t r, int64_t c) {
      return float_part(static_cast<const float*>(src) + r * src_stride + c, cols - c);
    });
  else if (dtype == kBFloat16)
    square_rows(sum, rows, cols, factor, [=](int64_t r, int64_t c) {
      return from_bfloat16(half_part(half_row(r) + c, cols - c));
    });
  else
    square_rows(sum, rows, cols, factor, [=](int64_t r, int64_t c) {
      return from_float16(half_part(half_row(r) + c, cols - c));
    });
}

void centre(float* dst, const float* src, const float* mean, int64_t ld, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < ld; c += kLanes)
      store(dst + r * ld + c, load(src + r * ld + c) - load(mean + c));
}

void dots(float* out, const float* x, const float* rows, int64_t ld, int64_t count) {
  for (int64_t r = 0; r < count; r += kLanes) {
    const int64_t filled = count - r < kLanes ? count - r : kLanes;
    vf sum[kLanes] = {};
    for (int64_t i = 0; i < filled; ++i)
      for (int64_t c = 0; c < ld; c += kLanes)
        sum[i] += load(x + c) * load(rows + (r + i) * ld + c);
    // Transposed, the sums over the lanes of all rows are additions of vectors.
    transpose_tile(sum);
    vf dot = {};
    for (int i = 0; i < kLanes; ++i) dot += sum[i];
    for (int64_t i = 0; i < filled; ++i) out[r + i] = dot[i];
  }
}

// Whole numbers in the order of the floats that x are the bits of.
PISA_INLINE vi in_order(vi x) { return x ^ ((x >> 31) & 0x7fffffff); }

float kth_largest(const float* x, int64_t count, int64_t k) {
  int32_t least = INT32_MIN;  // the result is built from the top bit down
  for (int bit = 31; bit >= 0; --bit) {
    const int32_t higher = static_cast<int32_t>(static_cast<uint32_t>(least) + (1u << bit));
    const vi bound = vi{} + higher;
    vi seen = {};  // minus the number of values that are not below it
    for (int64_t i = 0; i < count; i += kLanes) seen += in_order(as_int(load(x + i))) >= bound;
    // Through memory, where the compiler sees a sum that it can do in vectors.
    alignas(sizeof(vi)) int32_t lanes[kLanes];
    *reinterpret_cast<vi*>(lanes) = seen;
    int32_t total = 0;
    for (int i = 0; i < kLanes; ++i) total -= lanes[i];
    if (total < k) continue;
    least = higher;
    if (total == k) break;  // the smallest of these is the result
  }
  vf smallest = splat(__builtin_inff());
  for (int64_t i = 0; i < count; i += kLanes) {
    const vf value = load(x + i);
    const vf candidate = in_order(as_int(value)) >= vi{} + least ? value : smallest;
    smallest = candidate < smallest ? candidate : smallest;
  }
  float result = smallest[0];
  for (int i = 1; i < kLanes; ++i) result = smallest[i] < result ? smallest[i] : result;
  return result;
}

double norm2(const float* x, int64_t count) {
  double total = 0.0;
  for (int64_t i = 0; i < count;) {
    vf sum = {};
    // Short runs in float, the total in double: one float sum of D * E terms would drift.
    for (const int64_t end = i + 256 < count ? i + 256 : count; i < end; i += kLanes)
      sum += load(x + i) * load(x + i);
    total += horizontal_sum(sum);
  }
  return total;
}

void scale_columns(float* dst, const float* src, const float* factor, int64_t width,
                   int64_t rows) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; c += kLanes)
      store(dst + r * width + c, load(src + r * width + c) * load(factor + c));
}

}  // namespace

extern const Kernels PISA_TABLE(PISA_VARIANT);
const Kernels PISA_TABLE(PISA_VARIANT) = {
    load_rows, store_rows,  transpose, column_mean,   add_row_squares, add_squares, centre,
    dots,      kth_largest, norm2,     scale_columns, scores,          softmax,     accumulate,
};

}  // namespace pisa
