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
  int32_t* length = reinterpret_cast<int32_t*>(c.workspace + p.length) + b * p.blocks;
  valid_keys[b] = 0;
  for (int64_t j = 0; j < p.blocks; ++j) {
    const uint8_t* kept = keep(b, j * c.key_block);
    const int64_t* at = tokens(j * c.key_block);
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
  const Head h = head(first_head, unit / p.chunks);
  const int64_t first = unit % p.chunks * p.chunk_blocks;
  const int64_t last = std::min(p.blocks, first + p.chunk_blocks);
  float* matrix = h.matrix + unit % p.chunks * p.matrix_size;
  if (p.first_order) std::fill_n(matrix, p.matrix_size, 0.0f);
  // Centred keys in scratch whose product with their values is still to be added to `matrix`.
  Rows centred{s.keys, 0};
  const float* their_values = nullptr;
  const auto add_product = [&] {
    if (centred.count > 0)
      k.accumulate(matrix, nullptr, &centred, 1, p.ld_key, c.head_dim, their_values, p.ld_value);
    centred.count = 0;
  };
  for (int64_t j = first; j < last; ++j) {
    if (centred.count + block_rows(j) > kTile) add_product();
    float* centre = s.keys + centred.count * p.ld_key;
    float* keys = p.packed ? h.packed_keys + j * c.key_block * p.ld_key : centre;
    float* values = p.packed ? h.packed_values + j * c.key_block * p.ld_value
                             : s.values + centred.count * p.ld_value;
    const int64_t count = load(h, keys, values, j * c.key_block, block_rows(j));
    if (!p.sparse) continue;
    float* mean = h.key_mean + j * p.ld_key;
    const float divisor = static_cast<float>(std::max<int64_t>(count, 1));
    k.column_mean(mean, keys, p.ld_key, count, divisor);
    k.column_mean(h.value_mean + j * p.ld_value, values, p.ld_value, count, divisor);
    h.log_weight[j] = std::log2(static_cast<float>(count));
    if (!p.first_order) continue;
    // Centred before the product: K^T V - sum_j b_j kbar_j vbar_j^T would cancel.
    if (their_values + centred.count * p.ld_value != values) {
      add_product();
      centre = s.keys;
      their_values = values;
    }
    k.centre(centre, keys, mean, p.ld_key, count);
    centred.count += count;
    if (!p.corrected) continue;
    float* variance = h.variance + j * p.ld_key;
    std::fill_n(variance, p.ld_key, 0.0f);
    k.add_squares(variance, centre, p.ld_key, count, 1.0f / divisor);
  }
  add_product();
}

// The part of one chunk of queries in the mean of q_d^2 over the queries that share a key head.
void Attention::energies(const Scratch&, int64_t first_head, int64_t unit) {
  const int64_t chunk = unit % p.chunks, kv_heads = p.token_major ? c.kv_heads : 1;
  const int64_t kv_head = first_head + unit / p.chunks * kv_heads;  // counted over the batch too
  const int64_t b = kv_head / c.kv_heads, query_head = kv_head % c.kv_heads * p.group;
  float* energy = c.workspace + p.energy + (kv_head * p.chunks + chunk) * p.ld_key;
  const int64_t next_head = p.chunks * p.ld_key;
  for (int64_t g = 0; g < kv_heads; ++g) std::fill_n(energy + g * next_head, p.ld_key, 0.0f);
  const int64_t rows = ceil_div(c.query_len, p.chunks);
  const int64_t first = chunk * rows, last = std::min(c.query_len, first + rows);
  const float factor = 1.0f / static_cast<float>(p.group * c.query_len);
  // In memory order, since a sum needs no other. Heads of one token share pages.
  const int64_t at_a_time = p.token_major ? 16 : rows;
  for (int64_t t = first; t < last; t += at_a_time)
    for (int64_t q = 0; q < kv_heads * p.group; ++q)
      k.add_row_squares(energy + q / p.group * next_head,
                        row(c.query, c.query_stride, b, query_head + q, t), c.query_stride[2],
                        std::min(at_a_time, last - t), c.head_dim, c.dtype, factor);
}

// Sums what the chunks of a head have gathered, and corrects the mass of its blocks.
void Attention::reduce(const Scratch& s, int64_t first_head, int64_t unit) {
  const Head h = head(first_head, unit);
  const auto sum = [this](float* parts, int64_t size) {
    for (int64_t chunk = 1; chunk < p.chunks; ++chunk)
      for (int64_t i = 0; i < size; ++i) parts[i] += parts[chunk * size + i];
  };
  sum(h.matrix, p.matrix_size);
  if (!p.corrected) return;
  sum(h.energy, p.ld_key);
  k.dots(s.score, h.energy, h.variance, p.ld_key, p.blocks);
  for (int64_t j = 0; j < p.blocks; ++j) {
    const double beta = 0.5 * c.scale * c.scale * s.score[j];
    // A NaN (0 * inf) compares false: it meets the limit as well.
    const double factor = beta < c.mass_limit - 1.0 ? 1.0 + beta : c.mass_limit;
    h.log_weight[j] += static_cast<float>(std::log2(factor));
  }
}

// log(||H_j - Hbar|| + eps) of a chunk of blocks. A second pass over the keys, because keeping
// every H_j would take B * G * N * D * E floats.
void Attention::covariance(const Scratch& s, int64_t first_head, int64_t unit) {
  const Head h = head(first_head, unit / p.chunks);
  const int64_t first = unit % p.chunks * p.chunk_blocks;
  const int64_t last = std::min(p.blocks, first + p.chunk_blocks);
  const int64_t valid = std::max<int64_t>(
      1, std::count_if(h.length, h.length + p.blocks, [](int32_t n) { return n > 0; }));
  for (int64_t j = first; j < last; ++j) {
    const int64_t count = load(h, s.keys, s.values, j * c.key_block, block_rows(j));
    k.centre(s.keys, s.keys, h.key_mean + j * p.ld_key, p.ld_key, count);
    // Starts at -Hbar, so that H_j - Hbar is what accumulates.
    for (int64_t i = 0; i < p.matrix_size; ++i)
      s.block_matrix[i] = -h.matrix[i] / static_cast<float>(valid);
    const Rows centred{s.keys, count};
    k.accumulate(s.block_matrix, nullptr, &centred, 1, p.ld_key, c.head_dim, s.values, p.ld_value);
    const double norm = std::sqrt(k.norm2(s.block_matrix, p.matrix_size));
    h.norm[j] = static_cast<float>(std::log(norm + kCovarianceEps));
  }
}

}  // namespace pisa
