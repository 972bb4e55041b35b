// What the approximation knows of each key block: means, variances and log weights, the first-order
// matrix H of a head, and contiguous float32 copies of keys and values where there is room.

#include <algorithm>
#include <cmath>

#include "attention.h"

namespace pisa {
namespace {

constexpr float kCovarianceEps = 1e-6f;  // as in kernels/reference.py

}  // namespace

void Attention::count_lengths(int64_t b) {
  int32_t* length = reinterpret_cast<int32_t*>(call.workspace + plan.length) + b * plan.blocks;
  valid_keys[b] = 0;
  for (int64_t j = 0; j < plan.blocks; ++j) {
    const uint8_t* kept = keep(b, j * call.key_block);
    const int64_t* at = tokens(j * call.key_block);
    int64_t count = kept ? 0 : block_rows(j);
    if (kept)
      for (int64_t i = 0; i < block_rows(j); ++i) count += kept[at ? at[i] : i] != 0;
    length[j] = static_cast<int32_t>(count);
    valid_keys[b] += count;
  }
}

// A chunk of blocks: their contiguous copies, means and variances, and their part of
// H = sum_j (K_j - kbar_j)^T V_j.
void Attention::statistics(const Scratch& s, int64_t first_head, int64_t unit) {
  const Head h = head(first_head, unit / plan.chunks);
  const int64_t first = unit % plan.chunks * plan.chunk_blocks;
  const int64_t last = std::min(plan.blocks, first + plan.chunk_blocks);
  float* matrix = h.matrix + unit % plan.chunks * plan.matrix_size;
  if (plan.first_order) std::fill_n(matrix, plan.matrix_size, 0.0f);
  // Centred keys in scratch whose product with their values is still to be added to `matrix`.
  Rows centred{s.keys, 0};
  const float* their_values = nullptr;
  const auto add_product = [&] {
    if (centred.count > 0)
      kernels.accumulate(matrix, nullptr, &centred, 1, plan.ld_key, call.head_dim, their_values, plan.ld_value);
    centred.count = 0;
  };
  for (int64_t j = first; j < last; ++j) {
    if (centred.count + block_rows(j) > kTile) add_product();
    float* centre = s.keys + centred.count * plan.ld_key;
    float* keys = plan.packed ? h.packed_keys + j * call.key_block * plan.ld_key : centre;
    float* values = plan.packed ? h.packed_values + j * call.key_block * plan.ld_value
                             : s.values + centred.count * plan.ld_value;
    const int64_t count = load(h, keys, values, j * call.key_block, block_rows(j));
    if (!plan.sparse) continue;
    float* mean = h.key_mean + j * plan.ld_key;
    const float divisor = static_cast<float>(std::max<int64_t>(count, 1));
    kernels.column_mean(mean, keys, plan.ld_key, count, divisor);
    kernels.column_mean(h.value_mean + j * plan.ld_value, values, plan.ld_value, count, divisor);
    h.log_weight[j] = std::log2(static_cast<float>(count));
    if (!plan.first_order) continue;
    // Centred before the product: K^T V - sum_j b_j kbar_j vbar_j^T would cancel.
    if (their_values + centred.count * plan.ld_value != values) {
      add_product();
      centre = s.keys;
      their_values = values;
    }
    kernels.centre(centre, keys, mean, plan.ld_key, count);
    centred.count += count;
    if (!plan.corrected) continue;
    float* variance = h.variance + j * plan.ld_key;
    std::fill_n(variance, plan.ld_key, 0.0f);
    kernels.add_squares(variance, centre, plan.ld_key, count, 1.0f / divisor);
  }
  add_product();
}

// The part of one chunk of queries in the mean of q_d^2 over the queries that share a key head.
void Attention::energies(const Scratch&, int64_t first_head, int64_t unit) {
  const int64_t chunk = unit % plan.chunks, kv_heads = plan.token_major ? call.kv_heads : 1;
  const int64_t kv_head = first_head + unit / plan.chunks * kv_heads;  // counted over the batch too
  const int64_t b = kv_head / call.kv_heads, query_head = kv_head % call.kv_heads * plan.group;
  float* energy = call.workspace + plan.energy + (kv_head * plan.chunks + chunk) * plan.ld_key;
  const int64_t next_head = plan.chunks * plan.ld_key;
  for (int64_t g = 0; g < kv_heads; ++g) std::fill_n(energy + g * next_head, plan.ld_key, 0.0f);
  const int64_t rows = ceil_div(call.query_len, plan.chunks);
  const int64_t first = chunk * rows, last = std::min(call.query_len, first + rows);
  const float factor = 1.0f / static_cast<float>(plan.group * call.query_len);
  // In memory order, since a sum needs no other. Heads of one token share pages.
  const int64_t at_a_time = plan.token_major ? 16 : rows;
  for (int64_t t = first; t < last; t += at_a_time)
    for (int64_t q = 0; q < kv_heads * plan.group; ++q)
      kernels.add_row_squares(energy + q / plan.group * next_head,
                        row(call.query, call.query_stride, b, query_head + q, t), call.query_stride[2],
                        std::min(at_a_time, last - t), call.head_dim, call.dtype, factor);
}

// Sums what the chunks of a head have gathered, and corrects the mass of its blocks.
void Attention::reduce(const Scratch& s, int64_t first_head, int64_t unit) {
  const Head h = head(first_head, unit);
  const auto sum = [this](float* parts, int64_t size) {
    for (int64_t chunk = 1; chunk < plan.chunks; ++chunk)
      for (int64_t i = 0; i < size; ++i) parts[i] += parts[chunk * size + i];
  };
  sum(h.matrix, plan.matrix_size);
  if (!plan.corrected) return;
  sum(h.energy, plan.ld_key);
  kernels.dots(s.score, h.energy, h.variance, plan.ld_key, plan.blocks);
  for (int64_t j = 0; j < plan.blocks; ++j) {
    const double beta = 0.5 * call.scale * call.scale * s.score[j];
    // A NaN (0 * inf) compares false: it meets the limit as well.
    const double factor = beta < call.mass_limit - 1.0 ? 1.0 + beta : call.mass_limit;
    h.log_weight[j] += static_cast<float>(std::log2(factor));
  }
}

// log(||H_j - Hbar|| + eps) of a chunk of blocks. A second pass over the keys, because keeping
// every H_j would take B * G * N * D * E floats.
void Attention::covariance(const Scratch& s, int64_t first_head, int64_t unit) {
  const Head h = head(first_head, unit / plan.chunks);
  const int64_t first = unit % plan.chunks * plan.chunk_blocks;
  const int64_t last = std::min(plan.blocks, first + plan.chunk_blocks);
  const int64_t valid = std::max<int64_t>(
      1, std::count_if(h.length, h.length + plan.blocks, [](int32_t n) { return n > 0; }));
  for (int64_t j = first; j < last; ++j) {
    const int64_t count = load(h, s.keys, s.values, j * call.key_block, block_rows(j));
    kernels.centre(s.keys, s.keys, h.key_mean + j * plan.ld_key, plan.ld_key, count);
    // Starts at -Hbar, so that H_j - Hbar is what accumulates.
    for (int64_t i = 0; i < plan.matrix_size; ++i)
      s.block_matrix[i] = -h.matrix[i] / static_cast<float>(valid);
    const Rows centred{s.keys, count};
    kernels.accumulate(s.block_matrix, nullptr, &centred, 1, plan.ld_key, call.head_dim, s.values, plan.ld_value);
    const double norm = std::sqrt(kernels.norm2(s.block_matrix, plan.matrix_size));
    h.norm[j] = static_cast<float>(std::log(norm + kCovarianceEps));
  }
}

}  // namespace pisa
