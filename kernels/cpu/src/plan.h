// Sizes, the layout of the workspace, and the schedule of one call.

#ifndef PISA_PLAN_H
#define PISA_PLAN_H

#include <algorithm>
#include <cstdint>

#include "pisa.h"

namespace pisa {

constexpr int64_t kTile = 64;      // query rows of a tile and keys of a chunk, at most
constexpr int64_t kMaxChunks = 8;  // parts of H that are summed separately, at most

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a) { return ceil_div(a, 16) * 16; }

// Offsets are in floats. Threads affect the schedule only, never the order of any sum, so results
// do not depend on their number.
struct Plan {
  explicit Plan(const Call& c)
      : blocks(ceil_div(c.key_len, c.key_block)),
        width(std::min(c.query_block, kTile)),
        tiles(ceil_div(c.query_len, width)),
        ld_key(round_up(c.head_dim)),
        ld_value(round_up(c.value_dim)),
        group(c.heads / c.kv_heads),
        token_major(c.query_stride[1] < c.query_stride[2]),
        sparse(std::any_of(c.top_k, c.top_k + c.heads, [](int64_t k) { return k > 0; })),
        covariance(sparse && c.routing == kTopKCovariance),
        corrected(sparse && c.order == kCorrected),
        first_order(sparse && (covariance || corrected || c.order == kHybrid)) {
    const int64_t kv = c.batch * c.kv_heads;
    chunk_blocks = std::max<int64_t>(ceil_div(blocks, kMaxChunks), ceil_div(512, c.key_block));
    chunks = ceil_div(blocks, chunk_blocks);
    threads = std::clamp<int64_t>(c.threads, 1, kv * group * tiles);
    // Enough tiles at a time that waiting for the last one costs little, and no more, because
    // the memory of one set of heads serves the next.
    heads = std::min(kv, ceil_div(32 * threads, group * tiles));
    packed_size = blocks * c.key_block * (ld_key + ld_value);
    const int64_t inputs = c.batch * (c.heads * c.query_len * c.head_dim +
                                      c.kv_heads * c.key_len * (c.head_dim + c.value_dim));
    // In floats, and so that everything together stays below the size of the inputs.
    const int64_t budget = inputs * 3 / (c.dtype == kFloat32 ? 4 : 8);
    packed = packed_size <= budget;
    if (packed) heads = std::min(heads, budget / packed_size);

    length = take(c.batch * blocks);
    key_mean = take(heads * blocks * ld_key);
    value_mean = take(heads * blocks * ld_value);
    matrix_size = c.head_dim * ld_value;
    matrix = take(first_order ? heads * chunks * matrix_size : 0);
    norm = take(covariance ? heads * blocks : 0);
    log_weight = take(heads * blocks);
    variance = take(corrected ? heads * blocks * ld_key : 0);
    energy = take(corrected ? kv * chunks * ld_key : 0);
    pack = take(packed ? heads * packed_size : 0);
    shared = total;
    const int64_t rows_in_scratch = std::max({c.query_block, c.key_block, kTile});
    keys = take(rows_in_scratch * ld_key);
    values = take(rows_in_scratch * ld_value);
    query = take(kTile * ld_key);
    logits = take(kTile * kTile);
    acc = take(kTile * ld_value);
    rows = take(5 * kTile + ld_key);
    score = take(blocks);
    bias = take(blocks);
    index = take(blocks);
    block_matrix = take(covariance ? matrix_size : 0);
    per_thread = total - shared;
    total = shared + threads * per_thread;
  }

  int64_t take(int64_t floats) {
    const int64_t at = total;
    total += round_up(floats);
    return at;
  }

  int64_t blocks, width, tiles, ld_key, ld_value;
  int64_t group;     // query heads per key/value head
  bool token_major;  // the heads of one query lie together, not the queries of one head
  bool sparse, covariance, corrected, first_order;
  bool packed;    // keys and values are copied once, as contiguous float32 blocks
  int64_t chunks, chunk_blocks;  // units that the statistics of one head are cut into
  int64_t heads;                 // key/value heads in work at a time
  int64_t threads, matrix_size, packed_size;
  int64_t total = 0, shared, per_thread;
  // Offsets: shared by all threads, then within the memory of one thread.
  int64_t length, key_mean, value_mean, matrix, norm, log_weight, variance, energy, pack;
  int64_t keys, values, query, logits, acc, rows, score, bias, index, block_matrix;
};

// One key/value head in work: where it is in the inputs, and its part of the workspace.
struct Head {
  int64_t b, g;
  float* key_mean;       // [N, ld_key]
  float* value_mean;     // [N, ld_value]
  float* matrix;         // [chunks, D, ld_value]; the first is their sum once reduced
  float* norm;           // [N]
  float* log_weight;     // [N] log2 of the weight of a block's mean, exp(s(q, kbar_j)) left out
  float* variance;       // [N, ld_key] of the valid keys of a block
  float* energy;         // [chunks, ld_key] mean of q_d^2, the first of them once reduced
  float* packed_keys;    // [N, block, ld_key], the valid keys of a block first
  float* packed_values;  // [N, block, ld_value]
  int32_t* length;       // [N]
};

// What one thread works in.
struct Scratch {
  float *keys, *values, *query, *logits, *acc;
  float *top, *mass, *alpha, *peak, *factor, *query_mean;
  float *score, *bias;
  int32_t* index;
  float* block_matrix;
};

}  // namespace pisa

#endif  // PISA_PLAN_H
