// Orchestration: block statistics, routing, and the three phases of every query tile.
//
// Method: PISA (arXiv 2602.01077); threshold routing: Sol-Attn (arXiv 2607.24027). A tile runs one
// online softmax through three phases: the centroids of the approximated blocks with the
// logarithm of the block length as a bias, then the first-order term with the mass gathered so
// far (the tail mass), then the tokens of the exact blocks. Every partial sum is rescaled whenever
// the running maximum grows, so the maximum may lie anywhere.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <vector>

#include "dispatch.h"
#include "plan.h"
#include "pool.h"

namespace pisa {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kCovarianceEps = 1e-6f;  // as in kernels/reference.py

constexpr int kSpins = 1000;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

class Attention {
 public:
  Attention(const Call& call, const Kernels& kernels) : c(call), k(kernels), p(call) {}

  void run();

 private:
  // Work that is cut into independent units; a phase starts when the one before is complete.
  struct Phase {
    void (Attention::*unit)(const Scratch&, int64_t head_offset, int64_t unit);
    int64_t first_head, units;
  };

  void work();
  Scratch scratch(int64_t thread) const;
  Head head(int64_t first, int64_t offset) const;
  const void* row(const void* base, const int64_t* stride, int64_t b, int64_t h, int64_t t) const {
    const int64_t element = c.dtype == kFloat32 ? 4 : 2;
    return static_cast<const char*>(base) +
           (b * stride[0] + h * stride[1] + t * stride[2]) * element;
  }
  // The tokens at the places from `t` on are start(t) + tokens(t)[i], or start(t) + i if null.
  const int64_t* tokens(int64_t t) const { return c.permutation ? c.permutation + t : nullptr; }
  int64_t start(int64_t t) const { return c.permutation ? 0 : t; }
  int64_t block_rows(int64_t j) const { return std::min(c.key_block, c.key_len - j * c.key_block); }
  const uint8_t* keep(int64_t b, int64_t t) const {
    return c.mask ? c.mask + b * c.key_len + start(t) : nullptr;
  }
  // The valid keys and values among `rows` tokens from place `t`, as float32. Returns their number.
  int64_t load(const Head& head, float* keys, float* values, int64_t t, int64_t rows) const {
    k.load_rows(keys, p.ld_key, row(c.key, c.key_stride, head.b, head.g, start(t)),
                c.key_stride[2], tokens(t), rows, c.head_dim, c.dtype, keep(head.b, t));
    return k.load_rows(values, p.ld_value, row(c.value, c.value_stride, head.b, head.g, start(t)),
                       c.value_stride[2], tokens(t), rows, c.value_dim, c.dtype, keep(head.b, t));
  }

  void count_lengths(int64_t b);
  void statistics(const Scratch& s, int64_t first_head, int64_t unit);
  void energies(const Scratch& s, int64_t first_head, int64_t unit);
  void reduce(const Scratch& s, int64_t first_head, int64_t unit);
  void covariance(const Scratch& s, int64_t first_head, int64_t unit);
  void tile(const Scratch& s, int64_t first_head, int64_t unit);

  void select(const Scratch& s, const Head& head, int64_t query_head, bool dense) const;
  int64_t keep_best(const Scratch& s, int64_t count, int64_t top_k) const;
  int64_t keep_above(const Scratch& s, int64_t count, double beta) const;
  void approximate(const Scratch& s, const Head& head, int64_t width) const;
  void exact(const Scratch& s, const Head& head, int64_t width) const;
  void attend(const Scratch& s, const Rows* keys, const Rows* values, int64_t pieces,
              int64_t width, const float* bias) const;

  const Call& c;
  const Kernels& k;
  const Plan p;
  std::vector<Phase> phases;
  std::vector<int64_t> valid_keys;                // [B]
  std::vector<std::atomic<int64_t>> next, done;  // units begun and completed, per phase
  std::atomic<int64_t> arrived{0};                // threads that have begun
  std::mutex mutex;
  std::condition_variable finished;
};

Scratch Attention::scratch(int64_t thread) const {
  float* base = c.workspace + thread * p.per_thread;
  float* rows = base + p.rows;
  return Scratch{base + p.keys,
                 base + p.values,
                 base + p.query,
                 base + p.logits,
                 base + p.acc,
                 rows,
                 rows + kTile,
                 rows + 2 * kTile,
                 rows + 3 * kTile,
                 rows + 4 * kTile,
                 rows + 5 * kTile,
                 base + p.score,
                 base + p.bias,
                 reinterpret_cast<int32_t*>(base + p.index),
                 base + p.block_matrix};
}

Head Attention::head(int64_t first, int64_t offset) const {
  const int64_t b = (first + offset) / c.kv_heads;
  float* keys = c.workspace + p.pack + offset * p.packed_size;
  return Head{b,
              (first + offset) % c.kv_heads,
              c.workspace + p.key_mean + offset * p.blocks * p.ld_key,
              c.workspace + p.value_mean + offset * p.blocks * p.ld_value,
              c.workspace + p.matrix + offset * p.chunks * p.matrix_size,
              c.workspace + p.norm + offset * p.blocks,
              c.workspace + p.log_weight + offset * p.blocks,
              c.workspace + p.variance + offset * p.blocks * p.ld_key,
              c.workspace + p.energy + (first + offset) * p.chunks * p.ld_key,
              keys,
              keys + p.blocks * c.key_block * p.ld_key,
              reinterpret_cast<int32_t*>(c.workspace + p.length) + b * p.blocks};
}

// ---- Block statistics ----

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

// ---- Routing ----

// Splits the key blocks for one query block: `index` receives the exact ones in ascending order,
// followed by -1, and `bias` the log weight of the approximated ones and -inf elsewhere.
void Attention::select(const Scratch& s, const Head& h, int64_t query_head, bool dense) const {
  const int64_t first = dense ? 0 : c.free_first, last = dense ? 0 : c.free_last;
  int64_t picked = 0;
  if (first < last) {
    const float scale = static_cast<float>(c.scale);
    const float weight = static_cast<float>(c.routing_weight * std::log(2.0));
    std::fill_n(s.score, round_up(p.blocks), -kInfinity);
    k.dots(s.score + first, s.query_mean, h.key_mean + first * p.ld_key, p.ld_key, last - first);
    for (int64_t j = first; j < last; ++j) s.score[j] *= scale;
    if (p.covariance)
      for (int64_t j = first; j < last; ++j) s.score[j] += h.norm[j];
    if (weight != 0.0f)
      for (int64_t j = first; j < last; ++j) s.score[j] += weight * h.log_weight[j];
    for (int64_t j = first; j < last; ++j) {
      const bool candidate = h.length[j] > 0;
      // A NaN would break the ordering; like torch.topk, take it for the largest value.
      s.score[j] = std::isnan(s.score[j]) ? kInfinity : s.score[j];
      s.score[j] = candidate ? s.score[j] : -kInfinity;
      s.index[picked] = static_cast<int32_t>(j);
      picked += candidate;
    }
    picked = c.routing == kThreshold ? keep_above(s, picked, c.beta[query_head])
                                     : keep_best(s, picked, c.top_k[query_head]);
  }
  std::fill_n(s.bias, p.blocks, -kInfinity);
  for (int64_t j = first; j < last; ++j)
    s.bias[j] = h.length[j] > 0 ? h.log_weight[j] : -kInfinity;
  for (int64_t i = 0; i < picked; ++i) s.bias[s.index[i]] = -kInfinity;
  picked = 0;
  for (int64_t j = 0; j < p.blocks; ++j) {
    s.index[picked] = static_cast<int32_t>(j);
    picked += h.length[j] > 0 && s.bias[j] == -kInfinity;
  }
  if (picked < p.blocks) s.index[picked] = -1;
}

// Keeps the `top_k` best of the first `count` entries of `index`, the earlier ones among equals.
// Scores are -inf wherever there is no candidate.
int64_t Attention::keep_best(const Scratch& s, int64_t count, int64_t top_k) const {
  if (count <= top_k) return count;
  const float limit = k.kth_largest(s.score, round_up(p.blocks), top_k);
  const auto better = [=](float score) { return score > limit; };
  int64_t ties = top_k - std::count_if(s.score, s.score + p.blocks, better);
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t j = s.index[i];
    const bool tie = s.score[j] == limit && ties > 0;
    ties -= tie;
    s.index[kept] = j;
    kept += tie || better(s.score[j]);
  }
  return kept;
}

// Keeps the entries of `index` whose score exceeds mu + beta * sigma, and always the best.
int64_t Attention::keep_above(const Scratch& s, int64_t count, double beta) const {
  if (count == 0) return 0;
  double mean = 0.0, variance = 0.0;
  for (int64_t i = 0; i < count; ++i) mean += s.score[s.index[i]];
  mean /= static_cast<double>(count);
  for (int64_t i = 0; i < count; ++i) {
    const double deviation = s.score[s.index[i]] - mean;
    variance += deviation * deviation;
  }
  const double threshold = mean + beta * std::sqrt(variance / static_cast<double>(count));
  const float* score = s.score;
  const int32_t best = *std::max_element(s.index, s.index + count, [score](int32_t x, int32_t y) {
    return score[x] < score[y];
  });
  int32_t* end = std::remove_if(s.index, s.index + count, [=](int32_t j) {
    return !(score[j] > threshold) && j != best;
  });
  return end - s.index;
}

// ---- One query tile ----

// One step of the online softmax, over at most kTile keys in all; `bias` [keys] may be null.
void Attention::attend(const Scratch& s, const Rows* keys, const Rows* values, int64_t pieces,
                       int64_t width, const float* bias) const {
  std::fill_n(s.peak, width, -kInfinity);
  int64_t count = 0;
  for (const Rows* piece = keys; piece < keys + pieces; count += piece++->count)
    k.scores(s.logits + count * width, s.peak, piece->first, p.ld_key, piece->count, s.query,
             c.head_dim, width, static_cast<float>(c.scale * kLog2E), bias ? bias + count : bias);
  k.softmax(s.logits, count, width, s.peak, s.top, s.mass, s.alpha);
  k.accumulate(s.acc, s.alpha, values, pieces, p.ld_value, c.value_dim, s.logits, width);
}

void Attention::approximate(const Scratch& s, const Head& h, int64_t width) const {
  bool any = false;
  for (int64_t j = 0; j < p.blocks; j += kTile) {
    const int64_t count = std::min(kTile, p.blocks - j);
    if (std::all_of(s.bias + j, s.bias + j + count, [](float x) { return x == -kInfinity; }))
      continue;
    any = true;
    const Rows keys{h.key_mean + j * p.ld_key, count};
    const Rows values{h.value_mean + j * p.ld_value, count};
    attend(s, &keys, &values, 1, width, s.bias + j);
  }
  if (!any || (c.order != kHybrid && c.order != kCorrected)) return;
  // The mass so far is the tail mass g, and the term (g / Tk) * scale * q @ H has the form of
  // one more product with H in the place of the values.
  const double per_key = c.scale / static_cast<double>(valid_keys[h.b]);
  for (int64_t w = 0; w < width; ++w)
    s.factor[w] = static_cast<float>(s.mass[w] * per_key);
  k.scale_columns(s.keys, s.query, s.factor, width, c.head_dim);
  const Rows matrix{h.matrix, c.head_dim};
  k.accumulate(s.acc, nullptr, &matrix, 1, p.ld_value, c.value_dim, s.keys, width);
}

void Attention::exact(const Scratch& s, const Head& h, int64_t width) const {
  // Small blocks are attended to several at a time: in place where they have been packed, else
  // gathered in scratch.
  Rows keys[kTile], values[kTile];
  int64_t pieces = 0, filled = 0;
  const auto flush = [&] {
    if (filled > 0) attend(s, keys, values, pieces, width, nullptr);
    pieces = filled = 0;
  };
  const auto add = [&](const float* key, const float* value, int64_t count) {
    if (count == 0) return;
    filled += count;
    if (pieces > 0 && keys[pieces - 1].first + keys[pieces - 1].count * p.ld_key == key) {
      keys[pieces - 1].count += count;  // values lie as keys do
      values[pieces - 1].count += count;
      return;
    }
    keys[pieces] = {key, count};
    values[pieces++] = {value, count};
  };
  for (int64_t i = 0; i < p.blocks && s.index[i] >= 0; ++i) {
    const int64_t j = s.index[i];
    const int64_t length = p.packed ? h.length[j] : block_rows(j);
    for (int64_t n = 0; n < length; n += kTile) {
      const int64_t rows = std::min(kTile, length - n), place = j * c.key_block + n;
      if (filled + rows > kTile) flush();
      if (p.packed) {
        add(h.packed_keys + place * p.ld_key, h.packed_values + place * p.ld_value, rows);
        continue;
      }
      float* key = s.keys + filled * p.ld_key;
      float* value = s.values + filled * p.ld_value;
      add(key, value, load(h, key, value, place, rows));
    }
  }
  flush();
}

void Attention::tile(const Scratch& s, int64_t first_head, int64_t unit) {
  const int64_t offset = unit / p.tiles / p.group;
  const Head h = head(first_head, offset);
  const int64_t query_head = h.g * p.group + unit / p.tiles % p.group;
  const int64_t t = unit % p.tiles * p.width, query_block = t / c.query_block;
  const int64_t rows = std::min(p.width, c.query_len - t);
  const int64_t width = rows <= 16 ? 16 : rows <= 32 ? 32 : 64;

  const int64_t block_start = query_block * c.query_block;
  const int64_t block_rows = std::min(c.query_block, c.query_len - block_start);
  k.load_rows(s.keys, p.ld_key,
              row(c.query, c.query_stride, h.b, query_head, start(block_start)),
              c.query_stride[2], tokens(block_start), block_rows, c.head_dim, c.dtype, nullptr);
  k.column_mean(s.query_mean, s.keys, p.ld_key, block_rows, static_cast<float>(block_rows));
  select(s, h, query_head,
         c.top_k[query_head] == 0 || query_block < c.query_first || query_block >= c.query_last);

  float* tile_rows = s.keys + (t - block_start) * p.ld_key;
  std::fill_n(tile_rows + rows * p.ld_key, (width - rows) * p.ld_key, 0.0f);
  k.transpose(s.query, width, tile_rows, p.ld_key, width, p.ld_key);

  std::fill_n(s.top, width, -kInfinity);
  std::fill_n(s.mass, width, 0.0f);
  std::fill_n(s.acc, p.ld_value * width, 0.0f);
  if (c.order != kNone) approximate(s, h, width);
  exact(s, h, width);

  const int64_t* at = tokens(t);
  float* lse = c.lse + (h.b * c.heads + query_head) * c.query_len + start(t);
  for (int64_t w = 0; w < rows; ++w)
    lse[at ? at[w] : w] =
        static_cast<float>((s.top[w] + std::log2(static_cast<double>(s.mass[w]))) / kLog2E);
  for (int64_t w = 0; w < width; ++w) s.factor[w] = s.mass[w] != 0.0f ? 1.0f / s.mass[w] : 0.0f;
  k.scale_columns(s.acc, s.acc, s.factor, width, p.ld_value);
  k.transpose(s.values, p.ld_value, s.acc, width, p.ld_value, width);
  void* out = const_cast<void*>(row(c.out, c.out_stride, h.b, query_head, start(t)));
  k.store_rows(out, c.out_stride[2], at, s.values, p.ld_value, rows, c.value_dim, c.dtype);
}

// ---- Threads ----

// Units are handed out by a counter, so a thread that loses its core delays one unit only; a
// phase is complete when its units are, whichever threads took them.
void Attention::work() {
  const Scratch s = scratch(arrived.fetch_add(1));
  for (size_t phase = 0; phase < phases.size(); ++phase) {
    const int64_t units = phases[phase].units;
    for (int64_t unit; (unit = next[phase].fetch_add(1)) < units;) {
      (this->*phases[phase].unit)(s, phases[phase].first_head, unit);
      if (done[phase].fetch_add(1) + 1 == units) {
        const std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    }
    // The last units usually end within microseconds, sooner than a sleeping thread wakes.
    for (int spin = 0; spin < kSpins && done[phase].load() < units; ++spin) pause();
    std::unique_lock<std::mutex> lock(mutex);
    finished.wait(lock, [&] { return done[phase].load() == units; });
  }
}

void Attention::run() {
  valid_keys.assign(c.batch, 0);
  for (int64_t b = 0; b < c.batch; ++b) count_lengths(b);
  const int64_t kv = c.batch * c.kv_heads;
  if (p.corrected && p.token_major)
    phases.push_back({&Attention::energies, 0, c.batch * p.chunks});
  for (int64_t first = 0; first < kv; first += p.heads) {
    const int64_t heads = std::min(p.heads, kv - first);
    // Where a head's queries lie together, shortly before they are attended with.
    if (p.corrected && !p.token_major)
      phases.push_back({&Attention::energies, first, heads * p.chunks});
    if (p.sparse || p.packed)
      phases.push_back({&Attention::statistics, first, heads * p.chunks});
    if (p.corrected || (p.first_order && p.chunks > 1))
      phases.push_back({&Attention::reduce, first, heads});
    if (p.covariance) phases.push_back({&Attention::covariance, first, heads * p.chunks});
    phases.push_back({&Attention::tile, first, heads * p.group * p.tiles});
  }
  next = std::vector<std::atomic<int64_t>>(phases.size());
  done = std::vector<std::atomic<int64_t>>(phases.size());
  const auto body = [](void* self) { static_cast<Attention*>(self)->work(); };
  if (p.threads == 1)
    body(this);
  else if (c.parallel)
    c.parallel(body, this, static_cast<uint32_t>(p.threads), 0);
  else
    Pool::instance().run(p.threads, body, this);
}

}  // namespace
}  // namespace pisa

#define PISA_EXPORT extern "C" __attribute__((visibility("default")))

PISA_EXPORT int32_t pisa_abi_version() { return pisa::kAbiVersion; }

// Size of Call: a second guard against a mirror that has drifted.
PISA_EXPORT int64_t pisa_call_size() { return sizeof(pisa::Call); }

PISA_EXPORT int64_t pisa_workspace_floats(const pisa::Call* call) {
  return pisa::Plan(*call).total;
}

// Runs on the `variant`-th supported instruction set, see pisa_variant. Returns 0 on success.
PISA_EXPORT int32_t pisa_attention(const pisa::Call* call, int32_t variant) {
  const pisa::Kernels* kernels = pisa::supported_kernels(variant);
  if (!kernels) return 1;
  try {
    pisa::Attention(*call, *kernels).run();
  } catch (const std::bad_alloc&) {
    return 2;
  }
  return 0;
}
