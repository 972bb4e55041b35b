// Piecewise sparse attention on CPUs: the C interface and the table of vector kernels.
//
// Shapes: B batch, H query heads, G key/value heads, Tq and Tk tokens, D head_dim of query and
// key, E head_dim of value, N key blocks, W query rows of a tile (16, 32 or 64).

#ifndef PISA_H
#define PISA_H

#include <cstdint>

namespace pisa {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum Routing : int32_t { kTopK = 0, kTopKCovariance = 1, kThreshold = 2 };
enum Order : int32_t { kNone = 0, kZeroth = 1, kHybrid = 2, kCorrected = 3 };

// Runs body(argument) on a team of `threads` threads, the caller among them: the type of
// GOMP_parallel, which every OpenMP runtime of GCC and Clang exports.
using Parallel = void (*)(void (*body)(void*), void* argument, uint32_t threads, uint32_t flags);

// One call. `kernels/cpu/native.py` mirrors this structure; change both and kAbiVersion together.
struct Call {
  const void* query;      // [B, H, Tq, D] through query_stride, last dimension contiguous
  const void* key;        // [B, G, Tk, D]
  const void* value;      // [B, G, Tk, E]
  const uint8_t* mask;    // [B, Tk] contiguous, or null
  // [T] the token at each place of the block structure, every token once, or null: token t is at
  // place t. The mask, the output and the LSE are in the tokens' own order.
  const int64_t* permutation;
  const int64_t* top_k;   // [H] routed exact blocks; 0 means every block is exact
  const double* beta;     // [H] threshold routing: standard deviations above the mean
  void* out;              // [B, H, Tq, E] through out_stride, last dimension contiguous
  float* lse;             // [B, H, Tq] contiguous
  float* workspace;       // pisa_workspace_floats(call) floats, 64-byte aligned
  Parallel parallel;      // the team to run on, or null: the library's own threads
  int64_t batch, heads, kv_heads, query_len, key_len, head_dim, value_dim;
  int64_t query_stride[3], key_stride[3], value_stride[3], out_stride[3];  // elements: b, h, t
  int64_t query_block, key_block;   // tokens per block
  int64_t free_first, free_last;    // key blocks that routing may choose from
  int64_t query_first, query_last;  // query blocks outside this range attend densely
  double scale;
  double mass_limit;      // order kCorrected: the largest factor on the mass of a block
  double routing_weight;  // times the log weight of a block, added to its score; 0 for none
  int32_t dtype, routing, order, threads;
};

// Rows that lie one after the other, for products over rows from several places.
struct Rows {
  const float* first;
  int64_t count;
};

// Vector kernels of one instruction set. All scratch memory is 64-byte aligned and row strides
// (`ld`, in floats) are multiples of 16.
struct Kernels {
  // dst[r, c] = float(src[at[r], c]), at[r] = r where `at` is null, for the rows with keep[at[r]]
  // (null: all), packed densely; columns from `cols` to `ld` become zero. Returns the number of
  // rows kept.
  int64_t (*load_rows)(float* dst, int64_t ld, const void* src, int64_t src_stride,
                       const int64_t* at, int64_t rows, int64_t cols, int32_t dtype,
                       const uint8_t* keep);
  // dst[at[r], c] = src[r, c], with `at` as in load_rows.
  void (*store_rows)(void* dst, int64_t dst_stride, const int64_t* at, const float* src,
                     int64_t ld, int64_t rows, int64_t cols, int32_t dtype);
  // dst[c, r] = src[r, c]; rows and cols are multiples of 16.
  void (*transpose)(float* dst, int64_t ld_dst, const float* src, int64_t ld_src, int64_t rows,
                    int64_t cols);
  // mean[c] = sum_r src[r, c] / divisor over `ld` columns.
  void (*column_mean)(float* mean, const float* src, int64_t ld, int64_t rows, float divisor);
  // sum[c] += factor * sum_r float(src[r, c])^2 over `cols` columns.
  void (*add_row_squares)(float* sum, const void* src, int64_t src_stride, int64_t rows,
                          int64_t cols, int32_t dtype, float factor);
  // sum[c] += factor * sum_r src[r, c]^2 over `ld` columns.
  void (*add_squares)(float* sum, const float* src, int64_t ld, int64_t rows, float factor);
  // dst[r, c] = src[r, c] - mean[c] over `ld` columns.
  void (*centre)(float* dst, const float* src, const float* mean, int64_t ld, int64_t rows);
  // out[r] = x . rows[r] over `ld` columns.
  void (*dots)(float* out, const float* x, const float* rows, int64_t ld, int64_t count);
  // The k-th largest of x[i]; count is a multiple of 16, k >= 1, and x holds no NaN.
  float (*kth_largest)(const float* x, int64_t count, int64_t k);
  // sum over i of x[i]^2; count is a multiple of 16.
  double (*norm2)(const float* x, int64_t count);
  // dst[r, w] = src[r, w] * factor[w].
  void (*scale_columns)(float* dst, const float* src, const float* factor, int64_t width,
                        int64_t rows);
  // logit[n, w] = factor * sum_d keys[n, d] * query[d, w] + bias[n] (null: 0), and
  // peak[w] = max(peak[w], max_n logit[n, w]).
  void (*scores)(float* logit, float* peak, const float* keys, int64_t ld_keys, int64_t count,
                 const float* query, int64_t head_dim, int64_t width, float factor,
                 const float* bias);
  // One online-softmax step in powers of two: top = max(top, peak), alpha = 2^(old top - top),
  // logit = 2^(logit - top) in place, mass = mass * alpha + sum_n logit.
  void (*softmax)(float* logit, int64_t count, int64_t width, const float* peak, float* top,
                  float* mass, float* alpha);
  // acc[m, w] = acc[m, w] * alpha[w] (null: 1) + sum_n a[n, m] * b[n, w], m < columns, over the
  // rows n of all `pieces` of a, one after the other; acc and b have stride `width`.
  void (*accumulate)(float* acc, const float* alpha, const Rows* a, int64_t pieces, int64_t ld_a,
                     int64_t columns, const float* b, int64_t width);
};

// Raise whenever Call, a signature or the meaning of a field changes.
constexpr int32_t kAbiVersion = 4;

}  // namespace pisa

#endif  // PISA_H
